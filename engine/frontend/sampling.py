"""What a request asks for. How a token is drawn stands in ``layers/sampler.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

# Below the first, logits divided by the temperature may overflow; above the second, they no longer make a difference.
GREEDY_BELOW = 1e-5
MAX_TEMPERATURE = 1e6
MAX_LOGPROBS = 20
MAX_N = 16_384
MAX_BIAS = 100.0
MAX_PENALTY = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Names and defaults as in vLLM. What a model's ``generation_config.json`` recommends is not applied.

    Attributes:
        n: completions per prompt, up to 16,384. They share the prompt's blocks in the cache, and the first is the one that
            ``n=1`` gives.
        temperature: below 1e-5 is greedy; otherwise logits are divided by it.
        top_k: keep the k best tokens; -1 or 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches top_p (nucleus sampling, Holtzman et al. 2020).
        min_p: keep the tokens whose probability is at least min_p times the best one's (Nguyen et al. 2024); before top_k and
            top_p.
        presence_penalty: taken from the logit of each token that was generated before, from -2 to 2.
        frequency_penalty: taken from it once for each time that it was generated, from -2 to 2.
        repetition_penalty: divides the positive and multiplies the negative logit of each token of the prompt or the text
            (Keskar et al. 2019); above 0, and 1 changes nothing.
        logit_bias: added to the logits of some token ids, cut off at -100 and 100.
        allowed_token_ids: no other token is drawn; ``None`` allows all.
        bad_words: strings that are not generated: the last token of one is not drawn where those before it stand. Each is
            looked for as the tokenizer writes it, at the beginning of a text and after a space.
        seed: the same seed and prompt give the same text at any tp_size and in any batch, up to rounding of the logits;
            without one, the engine's seed and the request's number are used. Completions of one prompt differ by their index.
        max_tokens: most tokens to generate; ``None``: up to the model's length.
        min_tokens: no stop token is drawn before so many tokens were, and no stop string is seen that ends in their text.
        stop: strings that end the text. What ends first counts, and of several that end together the longest.
        stop_token_ids: end the sequence, beside the model's own end-of-sequence tokens.
        include_stop_str_in_output: keep the stop string, or the stop token's text, at the end of the text.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
        logprobs: log-probabilities of so many best tokens beside the drawn one, up to 20; ``None``: none at all.
        prompt_logprobs: the same of each prompt token, by the tokens before it; -1: of the whole vocabulary. Such a prompt is
            run whole: what the prefix cache holds of it has no logits.
        detokenize: make text of the tokens; without it texts stay empty, and stop strings are refused.
        skip_special_tokens: leave special tokens out of the text.
        truncate_prompt_tokens: run the last so many tokens of the prompt; -1: as many as leave room for ``max_tokens``.

    Raises:
        ValueError: for a value that breaks its rule; the message says which.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # a dict, which has no hash
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        _check("n", self.n, is_integer(self.n) and 1 <= self.n <= MAX_N, f"must be at least 1, and at most {MAX_N}")
        _check("temperature", self.temperature, _is_number(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE,
               f"must lie in [0, {MAX_TEMPERATURE:g}]; 0 is greedy")
        _check("n", self.n, self.n == 1 or not self.is_greedy,
               f"must be 1 with temperature={self.temperature}: greedy completions are all the same")
        _check("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= -1, "must be -1 or 0 (all), or above")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "must lie in (0, 1]")
        _check("min_p", self.min_p, _is_number(self.min_p) and 0 <= self.min_p <= 1, "must lie in [0, 1]; 0 keeps all")
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            _check(name, penalty, _is_number(penalty) and abs(penalty) <= MAX_PENALTY, "must lie in [-2, 2]; 0 changes nothing")
        _check("repetition_penalty", self.repetition_penalty,
               _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
               "must be a number above 0; 1 changes nothing")
        bias: Any = {} if self.logit_bias is None else self.logit_bias
        _check("logit_bias", self.logit_bias, isinstance(bias, Mapping) and all(map(is_integer, bias)) and
               all(_is_number(value) and not math.isnan(value) for value in bias.values()), "must map token ids to numbers")
        _check("allowed_token_ids", self.allowed_token_ids, self.allowed_token_ids is None
               or (_is_list(self.allowed_token_ids) and bool(self.allowed_token_ids)
                   and all(is_integer(each) for each in self.allowed_token_ids)),
               "must be a list of token ids with at least one, or None")
        words: Any = () if self.bad_words is None else self.bad_words
        _check("bad_words", self.bad_words, _is_list(words) and all(isinstance(each, str) and each.strip() for each in words),
               "must be a list of strings, none of them empty or of spaces alone")
        _check("seed", self.seed, self.seed is None or (is_integer(self.seed) and 0 <= self.seed < 2**63),
               "must lie in [0, 2**63), or be None")
        _check("max_tokens", self.max_tokens, self.max_tokens is None or (is_integer(self.max_tokens) and self.max_tokens >= 1),
               "must be at least 1, or None")
        _check("min_tokens", self.min_tokens, is_integer(self.min_tokens) and self.min_tokens >= 0
               and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
               f"must lie between 0 and max_tokens={self.max_tokens}")
        _check("logprobs", self.logprobs,
               self.logprobs is None or (is_integer(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
               f"must lie between 0 and {MAX_LOGPROBS}, or be None")
        _check("prompt_logprobs", self.prompt_logprobs, self.prompt_logprobs is None
               or (is_integer(self.prompt_logprobs) and -1 <= self.prompt_logprobs <= MAX_LOGPROBS),
               f"must lie between 0 and {MAX_LOGPROBS}, or be -1 (the whole vocabulary) or None")
        _check("truncate_prompt_tokens", self.truncate_prompt_tokens, self.truncate_prompt_tokens is None
               or (is_integer(self.truncate_prompt_tokens) and (self.truncate_prompt_tokens == -1
                                                                or self.truncate_prompt_tokens >= 1)),
               "must be at least 1, or be -1 (as many as leave room) or None")
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "must be True or False")
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        _check("stop", self.stop, _is_list(stop) and all(isinstance(each, str) and each for each in stop),
               "must be a string or a list of strings, none of them empty")
        _check("stop", self.stop, not stop or self.detokenize, "needs detokenize=True: it is looked for in the text")
        stop_ids: Any = self.stop_token_ids
        stop_ids = () if stop_ids is None else stop_ids  # None is vLLM's default
        _check("stop_token_ids", self.stop_token_ids, _is_list(stop_ids) and
               all(is_integer(each) and each >= 0 for each in stop_ids), "must be a list of token ids")
        # Plain numbers from here on, whatever library they came from.
        for name in ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
                     "truncate_prompt_tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(map(int, stop_ids)))
        object.__setattr__(self, "logit_bias", {int(token_id): min(max(float(value), -MAX_BIAS), MAX_BIAS)
                                                for token_id, value in bias.items()})
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(map(int, self.allowed_token_ids)))
        object.__setattr__(self, "bad_words", tuple(words))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether some logits become others before they are divided by the temperature; bad words apart."""
        return bool(self.has_penalties or self.logit_bias or self.allowed_token_ids or self.min_p)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop  # type: ignore[return-value]  # __post_init__ made it a tuple


def _check(name: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} {rule}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def is_integer(value: Any) -> bool:
    """Whether it is an integer of any library, and no boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)

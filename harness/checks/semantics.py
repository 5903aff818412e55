"""What a request must bring, by its parameters and the reference's logits alone: a plain model of the sampling parameters.

It knows nothing of batches, caches or schedules. Whatever drew the tokens, each must be one that could be drawn where it stands,
the completion must end where the first of its conditions holds, and text, reasons and log-probabilities follow from the tokens.

Shape suffixes: T = tokens of a completion, V = vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.subjects.base import SubjectFailure
from harness.verification.budgets import improbability, improbable_counts

DEFAULTS: dict[str, Any] = {
    "n": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": None, "max_tokens": 16, "min_tokens": 0, "stop": (),
    "stop_token_ids": (), "include_stop_str_in_output": False, "ignore_eos": False, "logprobs": None, "prompt_logprobs": None,
    "detokenize": True, "truncate_prompt_tokens": None, "skip_special_tokens": True,
    "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
    "logit_bias": None, "allowed_token_ids": None, "bad_words": (),
}
"""vLLM's names and defaults, but for ``top_k``: 0 and -1 both keep all."""
FAR_BELOW = 1e6
"""What is filtered out lies so far below the rest, in units of the temperature: no draw reaches it."""


class WrongAnswerError(AssertionError):
    """An answer is not what its request must bring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt and what is asked of it."""

    prompt: tuple[int, ...] | str
    params: dict[str, Any]
    """Fields of SamplingParams; those that are missing have their defaults."""
    abort_after: int | None = None
    """Give up after so many items of its stream."""

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Asked:
        """From JSON values."""
        prompt, params = values["prompt"], dict(values["params"])
        if "logit_bias" in params:  # JSON has no numbers as keys
            params["logit_bias"] = {int(token_id): bias for token_id, bias in params["logit_bias"].items()}
        return cls(prompt=prompt if isinstance(prompt, str) else tuple(prompt), params=params, abort_after=values["abort_after"])

    def __getattr__(self, name: str) -> Any:
        if name not in DEFAULTS:
            raise AttributeError(name)
        value = self.params.get(name, DEFAULTS[name])
        return (value,) if name == "stop" and isinstance(value, str) else value

    def __str__(self) -> str:
        size = f"prompt of {len(self.prompt)} {'characters' if isinstance(self.prompt, str) else 'tokens'}"
        given = ", ".join(f"{name}={_short(value)}" for name, value in self.params.items())
        return f"{size}, {given or 'no parameters'}{'' if self.abort_after is None else f', aborted after {self.abort_after}'}"


def _short(value: Any) -> str:
    return f"<{len(value)} ids>" if isinstance(value, (list, tuple)) and len(value) > 6 else repr(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a completion must end after some token."""

    reason: str
    stop_reason: int | str | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """All that the semantics need to know of a model."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    max_model_len: int
    tokenizer: Any
    dtype: str
    """What the tokens were drawn in."""
    tie: float
    """The largest difference between two logits, or in one, that rounding may make."""
    logits: Callable[[Sequence[int]], Tensor]
    """Token ids -> exact logits ``[T, V]`` after each of them."""

    def encode(self, asked: Asked) -> list[int]:
        """The token ids that run."""
        ids = list(self.tokenizer(asked.prompt).input_ids) if isinstance(asked.prompt, str) else list(asked.prompt)
        most = asked.truncate_prompt_tokens
        if most == -1:
            most = max(1, self.max_model_len - (asked.max_tokens or 1))
        return ids if most is None else ids[-most:]

    def judge(self, asked: Asked, answer: Any) -> int:
        """Hold a finished answer (vLLM's ``RequestOutput``) against its request. Returns how many tokens were judged.

        Raises:
            WrongAnswerError: saying what is wrong.
        """
        require(not getattr(answer, "error", None), f"a request that can run was refused: {getattr(answer, 'error', None)}")
        prompt = self.encode(asked)
        require(list(answer.prompt_token_ids) == prompt, f"prompt_token_ids={answer.prompt_token_ids}, asked was {prompt}")
        indices = [completion.index for completion in answer.outputs]
        require(indices == list(range(asked.n)), f"completions have the indices {indices}, n={asked.n}")
        require(answer.finished, "it never finished")
        for completion in answer.outputs:
            try:
                self._judge_completion(asked, prompt, completion)
            except WrongAnswerError as wrong:
                raise WrongAnswerError(f"completion {completion.index}: {wrong}" if asked.n > 1 else str(wrong)) from None
        self._judge_prompt_logprobs(asked, prompt, answer)
        return sum(len(completion.token_ids) for completion in answer.outputs)

    def judge_frequencies(self, asked: Asked, answer: Any) -> int:
        """Hold how often each token came first, of many completions, against its probability. Returns how many there were."""
        prompt = self.encode(asked)
        row_V = self._open(asked, prompt, [], self.logits(prompt)[-1:])[0]
        first = torch.tensor([completion.token_ids[0] for completion in answer.outputs])
        order_V = row_V.sort(descending=True, stable=True)
        kept_V = order_V.indices[: asked.top_k] if asked.top_k > 0 else order_V.indices
        sorted_p = (row_V[kept_V] / asked.temperature).softmax(0)
        kept_V = kept_V[(sorted_p.cumsum(0) - sorted_p < asked.top_p) | (asked.top_p == 1)]
        probability_V = torch.zeros_like(row_V)
        probability_V[kept_V] = (row_V[kept_V] / asked.temperature).softmax(0)
        unlikely = improbable_counts(first.bincount(minlength=self.vocab_size), probability_V)
        require(unlikely <= 1, f"first tokens come with frequencies that are {unlikely:.3g} of what can be believed")
        return len(first)

    def _judge_completion(self, asked: Asked, prompt: list[int], completion: Any) -> None:
        ids = list(completion.token_ids)
        was_aborted = completion.finish_reason == "abort" and asked.abort_after is not None
        require(bool(ids) or was_aborted, "it has no token")
        if not all(0 <= token_id < self.vocab_size for token_id in ids):
            raise WrongAnswerError(f"token_ids={ids} are not all in the vocabulary of {self.vocab_size}")
        endings = [self._ending(asked, len(prompt), ids[:count]) for count in range(1, len(ids) + 1)]
        early = next((count for count, ending in enumerate(endings, 1) if ending is not None), None)
        exact_TV = self.logits([*prompt, *ids[:-1]])[len(prompt) - 1 :]
        self._judge_tokens(asked, prompt, ids[:early], exact_TV)
        require(early in (None, len(ids)), f"it goes on for {len(ids)} tokens, and must end after {early}: {ids}")
        self._judge_logprobs(asked, completion, exact_TV)
        ending = endings[-1] if endings else None
        if asked.abort_after is not None:  # with so many tokens left that none gets to its end before
            require(was_aborted, f"it was aborted, and finish_reason={completion.finish_reason!r}")
        if ending is None:
            require(was_aborted, f"it ended after {len(ids)} tokens ({completion.finish_reason}), where nothing ends it: {ids}")
            require(completion.text == self._text(asked, ids), f"text={completion.text!r} of {ids} when it was aborted")
            return
        found = completion.finish_reason, completion.stop_reason, completion.text
        expected = ending.reason, ending.stop_reason, ending.text
        for name, was, must in zip(("finish_reason", "stop_reason", "text"), found, expected, strict=True):
            require(was == must, f"{name}={was!r}, must be {must!r}, after {ids}")

    def _judge_tokens(self, asked: Asked, prompt: list[int], ids: list[int], exact_TV: Tensor) -> None:
        """Each token is among those that could be drawn, and together they can be believed."""
        open_TV, tie = self._open(asked, prompt, ids, exact_TV[: len(ids)]), self._tie(asked)
        for step, token_id in enumerate(ids):
            row_V = open_TV[step]
            require(bool(row_V[token_id] > -torch.inf), f"step {step}: token {token_id} may not be drawn: "
                    f"{self._forbidden(asked, ids[:step]).get(token_id, 'min_p')} forbids it")
            above_V = row_V > row_V[token_id] + tie
            if asked.temperature == 0:
                require(not above_V.any(), f"step {step}: token {token_id}, greedy is {int(row_V.argmax())}")
                continue
            num_above = int(above_V.sum())
            require(asked.top_k <= 0 or num_above < asked.top_k, f"step {step}: token {token_id} is the {num_above + 1}th best")
            kept_V = row_V if asked.top_k <= 0 else row_V.where(row_V >= row_V.topk(asked.top_k).values[-1], -torch.inf)
            before = float((kept_V / asked.temperature).softmax(0)[above_V].sum())
            slack = 2 * tie / asked.temperature
            require(asked.top_p == 1 or before * (1 - slack) < asked.top_p,
                    f"step {step}: token {token_id}, with better ones of probability {before:.3g} before it")
        if asked.temperature > 0 and ids:
            lowest = open_TV[open_TV > -torch.inf].min() - FAR_BELOW * asked.temperature
            drawn_from_TV = open_TV.masked_fill(open_TV == -torch.inf, float(lowest))
            # A filter makes what is left more probable; the nucleus by 1 / top_p at most.
            if asked.top_k > 0:
                border_T1 = open_TV.topk(asked.top_k).values[:, -1:] - tie
                drawn_from_TV = drawn_from_TV.where(open_TV >= border_T1, lowest)
            unlikely = improbability(drawn_from_TV, drawn_from_TV, ids, temperature=asked.temperature, top_p=asked.top_p)
            require(unlikely <= 1, f"{ids} are not what would be drawn: {unlikely:.3g} of what can be believed")

    def _open(self, asked: Asked, prompt: list[int], ids: list[int], exact_TV: Tensor) -> Tensor:
        """Logits as bias and penalties change them, with -inf for what may not be drawn."""
        open_TV = exact_TV.clone()
        for step, row_V in enumerate(open_TV):
            drawn = Counter(ids[:step])
            for token_id, bias in (asked.logit_bias or {}).items():
                row_V[token_id] += min(max(bias, -100.0), 100.0)
            if asked.repetition_penalty != 1:
                for token_id in {*prompt, *drawn}:
                    row_V[token_id] *= asked.repetition_penalty if row_V[token_id] < 0 else 1 / asked.repetition_penalty
            if asked.frequency_penalty or asked.presence_penalty:
                for token_id, count in drawn.items():
                    row_V[token_id] -= asked.frequency_penalty * count + asked.presence_penalty
            if forbidden := self._forbidden(asked, ids[:step]):
                row_V[list(forbidden)] = -torch.inf
            if asked.min_p and asked.temperature:
                lowest = row_V.max() + asked.temperature * math.log(asked.min_p) - self._tie(asked)
                row_V[row_V < lowest] = -torch.inf
        return open_TV

    def _tie(self, asked: Asked) -> float:
        """The repetition penalty scales a logit's rounding error as it scales the logit."""
        penalty: float = asked.repetition_penalty
        return self.tie * max(penalty, 1 / penalty)

    def _forbidden(self, asked: Asked, before: list[int]) -> dict[int, str]:
        """Tokens that may not be drawn after these, whatever their logits, and the parameter that forbids each."""
        forbidden: dict[int, str] = {}
        if asked.allowed_token_ids is not None:
            forbidden |= dict.fromkeys(set(range(self.vocab_size)) - set(asked.allowed_token_ids), "allowed_token_ids")
        for word in asked.bad_words:
            *beginning, last = self.tokenizer(word, add_special_tokens=False).input_ids
            if before[len(before) - len(beginning) :] == beginning:
                forbidden[last] = "bad_words"
        if len(before) < asked.min_tokens:
            forbidden |= dict.fromkeys(self._stop_ids(asked), "min_tokens")
        return forbidden

    def _stop_ids(self, asked: Asked) -> frozenset[int]:
        return frozenset(asked.stop_token_ids) | (frozenset() if asked.ignore_eos else self.eos_token_ids)

    def _text(self, asked: Asked, ids: Sequence[int]) -> str:
        if not asked.detokenize:
            return ""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=asked.skip_special_tokens, clean_up_tokenization_spaces=False)
        return text

    def _ending(self, asked: Asked, num_prompt_tokens: int, ids: list[int]) -> Ending | None:
        """How it ends with the last of these tokens; None if it goes on."""
        is_stop_id = ids[-1] in self._stop_ids(asked)
        text = self._text(asked, ids[:-1] if is_stop_id and not asked.include_stop_str_in_output else ids)
        exempt = len(self._text(asked, ids[: asked.min_tokens])) if asked.min_tokens else 0
        ends = [(start + len(stop), -len(stop), stop) for stop in asked.stop for start in range(len(text))
                if text.startswith(stop, start) and start + len(stop) > exempt]
        if ends:
            end, _, stop = min(ends)
            return Ending(reason="stop", stop_reason=stop,
                          text=text[: end if asked.include_stop_str_in_output else end - len(stop)])
        if is_stop_id:
            is_own = ids[-1] in asked.stop_token_ids and (asked.ignore_eos or ids[-1] not in self.eos_token_ids)
            return Ending(reason="stop", stop_reason=ids[-1] if is_own else None, text=text)
        room = self.max_model_len - num_prompt_tokens
        if len(ids) >= min(room, asked.max_tokens or room):
            return Ending(reason="length", stop_reason=None, text=text)
        return None

    def _judge_logprobs(self, asked: Asked, completion: Any, exact_TV: Tensor) -> None:
        """Log-probabilities are of the raw logits, whatever is banned, filtered or divided by a temperature."""
        if asked.logprobs is None:
            require(completion.logprobs is None, "there are log-probabilities that nobody asked for")
            return
        require(completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids),
                f"of {len(completion.token_ids)} tokens {len(completion.logprobs or ())} have log-probabilities")
        logprob_TV = exact_TV.log_softmax(-1)
        for step, (token_id, found) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            self._judge_row(f"step {step}", asked, found, token_id, asked.logprobs, logprob_TV[step])
        total = 0.0
        for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True):
            total += found[token_id].logprob
        require(completion.cumulative_logprob == total,
                f"cumulative_logprob={completion.cumulative_logprob}, the tokens' sum is {total}")


    def _judge_prompt_logprobs(self, asked: Asked, prompt: list[int], answer: Any) -> None:
        """The same of every prompt token, by the tokens before it."""
        told, num_best = answer.prompt_logprobs, asked.prompt_logprobs
        if num_best is None or (asked.abort_after is not None and not answer.outputs[0].token_ids):
            require(told is None, "there are log-probabilities of the prompt that nobody asked for")
            return
        require(told is not None and len(told) == len(prompt),
                f"of {len(prompt)} prompt tokens {len(told or ())} have log-probabilities")
        require(told[0] is None, f"the first prompt token, which nothing stands before, has the log-probabilities {told[0]}")
        logprob_TV = self.logits(prompt).log_softmax(-1)
        for place, (token_id, found) in enumerate(zip(prompt[1:], told[1:], strict=True), 1):
            self._judge_row(f"prompt token {place}", asked, found, token_id, self.vocab_size if num_best == -1 else num_best,
                            logprob_TV[place - 1])

    def _judge_row(self, place: str, asked: Asked, found: Mapping[int, Any] | None, token_id: int, num_best: int,
                   row_V: Tensor) -> None:
        """Log-probabilities at one place: those of the token that stands there and of the best."""
        found, tie = found or {}, self.tie
        others = [other for other in found if other != token_id]
        best = row_V.topk(min(num_best, self.vocab_size)).values if num_best else row_V[:0]
        is_best = bool(len(best)) and bool(row_V[token_id] >= best[-1] - tie)
        require(next(iter(found), None) == token_id, f"{place}: log-probabilities of {list(found)}, and {token_id} stands there")
        require(len(others) in ({len(best), len(best) - 1} if is_best else {len(best)}),
                f"{place}: log-probabilities of {len(others)} tokens beside its own, asked were {num_best}")
        require(all(0 <= other < self.vocab_size for other in found),
                f"{place}: {sorted(found)} are not all in the vocabulary of {self.vocab_size}")
        exact_K = row_V[list(found)]
        least_K = 1 + (row_V > exact_K[:, None] + tie).sum(1)
        most_K = (row_V > exact_K[:, None] - tie).sum(1)
        bounds = zip(exact_K.tolist(), least_K.tolist(), most_K.tolist(), strict=True)
        for (other, entry), (exact, least, most) in zip(found.items(), bounds, strict=True):
            where = f"{place}: token {other}"
            require(abs(entry.logprob - exact) <= tie, f"{where} has logprob={entry.logprob}, the model gives it {exact:.6g}")
            require(least <= entry.rank <= most, f"{where} has rank={entry.rank}, must be {least}")
            require(other == token_id or exact >= float(best[-1]) - tie, f"{where} is not among the best")
            text = self.tokenizer.decode([other]) if asked.detokenize else None
            require(entry.decoded_token == text, f"{where} is {entry.decoded_token!r}, must be {text!r}")


@contextmanager
def answered(what: str = "the subject raised") -> Iterator[None]:
    """What a subject raises where it can do what it is asked for is a wrong answer too. A rank's failure is told as it is.

    Raises:
        WrongAnswerError: instead of what was raised.
    """
    try:
        yield
    except (SubjectFailure, WrongAnswerError):
        raise
    except Exception as failure:
        raise WrongAnswerError(f"{what}: {type(failure).__name__}: {failure}") from failure


def require(holds: bool, what: str) -> None:
    """Raise WrongAnswerError unless it holds."""
    if not holds:
        raise WrongAnswerError(what)

"""Admission: prompts and parameters become requests for the ranks, or are refused before anything runs."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Sequence
from itertools import count
from typing import Any

from engine.config import ModelConfig
from engine.frontend.detokenizer import Pieces
from engine.frontend.ongoing import OngoingCompletion, OngoingRequest
from engine.frontend.outputs import RequestOutput
from engine.frontend.prompts import Prompt, list_prompts, read_prompt
from engine.frontend.sampling import SamplingParams, is_integer
from engine.scheduling.sequence import Request


class Admission:
    """Knows what a model can run.

    Args:
        tokenizer: a Hugging Face tokenizer, or None: prompts must be token ids then.
        seed: of requests that have none of their own.
    """

    def __init__(self, model_config: ModelConfig, tokenizer: Any, *, max_model_len: int, seed: int) -> None:
        self.model_config = model_config
        self.tokenizer = tokenizer
        self._pieces = {skip: None if tokenizer is None else Pieces(tokenizer, skip_special_tokens=skip)
                        for skip in (True, False)}
        self.max_model_len = max_model_len
        self.seed = seed
        self._request_numbers = count()
        self._sequence_numbers = count()

    def admit(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, *,
              streams: bool) -> list[OngoingRequest]:
        """One request a prompt. A prompt that can't run gets one that is finished, its output saying why in ``error``.

        Raises:
            ValueError: if there are prompts and all were refused, or the numbers of prompts and parameters differ.
        """
        prompt_list = list_prompts(prompts)
        each = _one_each(params, len(prompt_list))
        requests = [self._admit(place, prompt, own, streams)
                    for place, (prompt, own) in enumerate(zip(prompt_list, each, strict=True))]
        errors = [request.output.error for request in requests if request.output.error]
        if errors and len(errors) == len(requests):
            raise ValueError("; ".join(errors))
        return requests

    def _admit(self, place: int, prompt: Prompt, params: SamplingParams, streams: bool) -> OngoingRequest:
        output = RequestOutput(request_id=next(self._request_numbers), prompt=None, prompt_token_ids=[])
        try:
            output.prompt, token_ids = read_prompt(prompt, self.tokenizer)
            output.prompt_token_ids = self._check(self._truncated(token_ids, params), params)
        except ValueError as refusal:
            output.error, output.finished = f"prompt {place}: {refusal}", True
            return OngoingRequest(output, {})
        room = self.max_model_len - len(output.prompt_token_ids)
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        seed = derive_seed("request", self.seed, output.request_id) if params.seed is None else params.seed
        prompt_token_ids = tuple(output.prompt_token_ids)
        bad_words = tuple(ids for word in params.bad_words or () for ids in _as_written(self.tokenizer, word))
        pieces = self._pieces[params.skip_special_tokens] if params.detokenize else None
        completions = {}
        for index in range(params.n):
            request = Request(
                request_id=next(self._sequence_numbers),
                prompt_token_ids=prompt_token_ids,
                params=params,
                seed=derive_seed("completion", seed, index) if index else seed,
                max_tokens=min(room, params.max_tokens or room),
                stop_token_ids=frozenset((*params.stop_token_ids, *eos)),
                bad_words=bad_words,
                num_prompt_logprobs=None if index else params.prompt_logprobs,
            )
            completions[request.request_id] = OngoingCompletion(request, index, pieces, eos, streams=streams)
        return OngoingRequest(output, completions)

    def _truncated(self, token_ids: list[Any], params: SamplingParams) -> list[Any]:
        most = params.truncate_prompt_tokens
        if most == -1:
            most = max(1, self.max_model_len - (params.max_tokens or 1))
        return token_ids if most is None else token_ids[-most:]

    def _check(self, token_ids: Sequence[Any], params: SamplingParams) -> list[int]:
        """The ids as plain ints, of a prompt that the model can run."""
        if not token_ids:
            raise ValueError("len(token_ids)=0: an empty prompt can't be completed")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(f"len(token_ids)={len(token_ids)} leaves no room to generate in max_model_len={self.max_model_len}")
        vocab_size = self.model_config.vocab_size
        named: dict[str, Sequence[Any]] = {
            "token_id": token_ids, "stop_token_id": params.stop_token_ids, "allowed_token_id": params.allowed_token_ids or (),
            "logit_bias token_id": tuple(params.logit_bias or ())}
        are_plain = {name: _are_ints_below(vocab_size, ids) for name, ids in named.items()}
        for name, ids in named.items():
            if are_plain[name]:
                continue
            for token_id in ids:
                if not is_integer(token_id):
                    raise ValueError(f"{name}={reprlib.repr(token_id)} must be an integer")
                if not 0 <= int(token_id) < vocab_size:
                    raise ValueError(f"{name}={token_id!r} is outside the vocabulary of vocab_size={vocab_size}")
        for name, strings, instead in (("stop", params.stop_strings, "stop_token_ids"),
                                       ("bad_words", params.bad_words, "logit_bias")):
            if strings and self.tokenizer is None:
                raise ValueError(f"{name}={strings!r} needs a tokenizer, and the model folder holds none: give {instead}")
        return list(token_ids) if are_plain["token_id"] else [int(token_id) for token_id in token_ids]


def _as_written(tokenizer: Any, word: str) -> list[tuple[int, ...]]:
    """Token ids of a word at the beginning of a text, and after a space where that changes its first token alone.

    As in vLLM: after a space counts if it has as many tokens and another first one.
    """
    bare, spaced = (tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
    return [bare, spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]


def _are_ints_below(limit: int, values: Sequence[Any]) -> bool:
    """Whether all are plain ints from 0 up: a prompt's usual case, and thirty times as fast to see as one by one."""
    return set(map(type, values)) <= {int} and (not values or (min(values) >= 0 and max(values) < limit))


def derive_seed(what: str, seed: int, number: int) -> int:
    """A key of random numbers, below 2**63, of its own for each ``what`` and ``number``."""
    digest = hashlib.blake2b(f"{what}:{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    each = [SamplingParams() if params is None else params] * num_prompts if not isinstance(params, Sequence) else list(params)
    if len(each) != num_prompts:
        raise ValueError(f"len(sampling_params)={len(each)} does not match len(prompts)={num_prompts}: give one for all, "
                         "or one for each")
    for own in each:
        if not isinstance(own, SamplingParams):
            raise ValueError(f"sampling_params={own!r} must be SamplingParams, or a list of them")
    return each

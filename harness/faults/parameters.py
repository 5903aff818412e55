"""Faults in what a request asks for: parameters misread, forgotten, or applied at the wrong place. Alike on all ranks.

Some were reported in public. No comparison between ranks sees any of them, and each text looks fine by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import engine.frontend.requests as requests_module
import engine.layers.logits_processors as processors_module
import engine.layers.sampler as sampler_module
import engine.scheduling.batch as batch_module
import engine.scheduling.processing as processing_module
from engine.frontend.requests import Admission
from engine.frontend.sampling import SamplingParams
from engine.parallel.group import TPGroup
from engine.scheduling.batch import SamplingBatch
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request, Sequence
from harness.faults.base import Patches, Plant, Where, around, fault
from harness.faults.edits import edit

Change = dict[str, Any]
"""New values by field."""
CHECKS = ("generation",)


REPORTED = {
    "min-tokens-bans-stop-ids-but-not-eos": 101, "stop-string-below-min-tokens": 102, "temperature-applied-twice": 103,
    "logprobs-after-the-temperature": 104, "logprobs-after-the-filters": 104, "ignore-eos-ignored": 107,
    "stop-token-cut-though-wanted": 108, "stop-token-left-in": 109,
}
"""Numbers in the catalogue of public bugs, for faults that tables make."""


def declare(field: str, what: str, name: str, plant: Plant, where: Where) -> None:
    """Register a fault that a table makes, in a field of ``SamplingParams``."""
    rows = (REPORTED[name],) if name in REPORTED else ()
    fault(rows=rows, checks=CHECKS, where=where, field=f"SamplingParams.{field}", name=name, what=what)(plant)


# Parameters that admission reads as others than were given.


def _read_as(change: Callable[[SamplingParams], Change]) -> Plant:
    @around(Admission, "_admit")
    def admit(original: Any, self: Admission, place: int, prompt: Any, params: SamplingParams, streams: bool) -> Any:
        return original(self, place, prompt, replace(params, **change(params)), streams)

    return admit


READ_AS: dict[str, tuple[str, str, Callable[[SamplingParams], Change]]] = {
    "last-completion-missing": (
        "n", "Completions are counted from 1 up to n, and the last one is never made.", lambda given: {"n": max(1, given.n - 1)}),
    "temperature-forgotten": (
        "temperature", "All rows that are not greedy are drawn at temperature 1.",
        lambda given: {} if given.is_greedy else {"temperature": 1.0}),
    "top-k-of-minus-one-keeps-one": (
        "top_k", "With top_k=-1, which keeps all tokens, only the best one is kept, as with 1.",
        lambda given: {"top_k": abs(given.top_k)}),
    "top-p-forgotten-beside-top-k": (
        "top_p", "Where both are given, top_k is applied and top_p is not.",
        lambda given: {"top_p": 1.0} if given.top_k > 0 else {}),
    "min-p-forgotten": ("min_p", "Nothing is filtered by min_p.", lambda given: {"min_p": 0.0}),
    "presence-counts-as-frequency": (
        "presence_penalty", "A presence penalty is taken once for each time that a token came, as a frequency penalty is.",
        lambda given: {"presence_penalty": 0.0, "frequency_penalty": given.frequency_penalty + given.presence_penalty}),
    "bias-cut-off-at-one": (
        "logit_bias", "Biases are cut off at -1 and 1, not at -100 and 100.",
        lambda given: {"logit_bias": {key: min(max(bias, -1.0), 1.0) for key, bias in (given.logit_bias or {}).items()}}),
    "first-allowed-token-missing": (
        "allowed_token_ids", "Of several allowed tokens the first is not allowed.",
        lambda given: {"allowed_token_ids": given.allowed_token_ids[1:] or given.allowed_token_ids}
        if given.allowed_token_ids else {}),
    "seed-zero-taken-for-none": (
        "seed", "A seed of 0 counts as none: such a request draws as the engine's seed and its number have it.",
        lambda given: {"seed": given.seed or None}),
    "stop-taken-apart": (
        "stop", "A stop string is taken for a list of its characters, each of which ends the text.",
        lambda given: {"stop": tuple("".join(given.stop_strings))}),
    "first-stop-string-alone": (
        "stop", "Of several stop strings only the first is looked for.", lambda given: {"stop": given.stop_strings[:1]}),
    "first-stop-id-alone": (
        "stop_token_ids", "Of several stop token ids only the first counts.",
        lambda given: {"stop_token_ids": given.stop_token_ids[:1]}),
    "ignore-eos-ignored": (
        "ignore_eos", "Completions end at the model's end of sequence though they were to go on.",
        lambda given: {"ignore_eos": False}),
    "no-logprobs-for-zero": (
        "logprobs", "With logprobs=0, which asks for the drawn token's alone, none are told.",
        lambda given: {"logprobs": given.logprobs or None}),
    "all-of-the-vocabulary-taken-for-one": (
        "prompt_logprobs", "With prompt_logprobs=-1, which asks for the whole vocabulary, the best token alone is told.",
        lambda given: {"prompt_logprobs": given.prompt_logprobs and abs(given.prompt_logprobs)}),
    "no-prompt-logprobs-for-zero": (
        "prompt_logprobs", "With prompt_logprobs=0, which asks for the prompt's own tokens alone, none are told.",
        lambda given: {"prompt_logprobs": given.prompt_logprobs or None}),
    "text-though-none-is-asked-for": (
        "detokenize", "Text is made of the tokens of requests with detokenize=False too.", lambda given: {"detokenize": True}),
    "prompts-never-truncated": (
        "truncate_prompt_tokens", "The whole prompt runs, whatever truncate_prompt_tokens says.",
        lambda given: {"truncate_prompt_tokens": None}),
    "special-tokens-kept": (
        "skip_special_tokens", "Special tokens stay in every text: skip_special_tokens is not looked at.",
        lambda given: {"skip_special_tokens": False}),
    "special-tokens-skipped": (
        "skip_special_tokens", "Special tokens are left out of every text: skip_special_tokens=False is not looked at.",
        lambda given: {"skip_special_tokens": True}),
}
for _name, (_field, _what, _change) in READ_AS.items():
    declare(_field, _what, _name, _read_as(_change), "driver")


@fault(checks=CHECKS, where="driver", field="SamplingParams.truncate_prompt_tokens")
def first_prompt_tokens_kept(patch: Patches, tp: TPGroup) -> None:
    """Of a prompt that is truncated the first tokens run, not the last."""
    edit(patch, (Admission, "_truncated", "token_ids[-most:]", "token_ids[:most]"))


# Requests that travel to the ranks with something else than their parameters say.


def _sent_as(change: Callable[[Request], Change]) -> Plant:
    @around(requests_module, "Request")
    def request(original: Any, **fields: Any) -> Request:
        right: Request = original(**fields)
        return replace(right, **change(right))

    return request


SENT_AS: dict[str, tuple[str, str, Callable[[Request], Change]]] = {
    "max-tokens-one-short": (
        "max_tokens", "Completions end one token before max_tokens.", lambda sent: {"max_tokens": max(1, sent.max_tokens - 1)}),
    "max-tokens-counts-the-prompt": (
        "max_tokens", "Prompt and completion together are held to max_tokens.",
        lambda sent: {"max_tokens": max(1, sent.max_tokens - len(sent.prompt_token_ids))}),
    "sixteen-tokens-for-no-limit": (
        "max_tokens", "Without a limit (max_tokens=None) a completion ends at the default one, after 16 tokens.",
        lambda sent: {"max_tokens": min(sent.max_tokens, 16)} if sent.params.max_tokens is None else {}),
    "seed-cut-to-32-bits": (
        "seed", "Only the lower 32 bits of a seed reach the ranks.", lambda sent: {"seed": sent.seed & 0xFFFFFFFF}),
    "stop-ids-forgotten": (
        "stop_token_ids", "A request's stop_token_ids never reach the ranks: only the model's own tokens end a completion.",
        lambda sent: {"stop_token_ids": sent.stop_token_ids - set(sent.params.stop_token_ids)}),
    "stop-ids-replace-the-models": (
        "stop_token_ids", "A request with stop_token_ids of its own no longer ends at the model's end of sequence.",
        lambda sent: {"stop_token_ids": frozenset(sent.params.stop_token_ids) or sent.stop_token_ids}),
    "ignore-eos-drops-stop-ids": (
        "ignore_eos", "Under ignore_eos all stop tokens are dropped, the request's own among them.",
        lambda sent: {"stop_token_ids": frozenset()} if sent.params.ignore_eos else {}),
}
for _name, (_field, _what, _send) in SENT_AS.items():
    declare(_field, _what, _name, _sent_as(_send), "driver")


@fault(checks=CHECKS, field="SamplingParams.frequency_penalty")
def prompt_counts_as_generated(patch: Patches, tp: TPGroup) -> None:
    """Frequency and presence penalties count the tokens of the prompt too."""
    edit(patch, (processing_module, "_seen", ">= chunk.sequence.num_prompt_tokens", ">= 0"))


@fault(checks=CHECKS, field="SamplingBatch.processing")
def penalties_one_token_late(patch: Patches, tp: TPGroup) -> None:
    """The token in flight is not penalised before the host knows it."""
    edit(patch, (processing_module, "_seen", " + [IN_FLIGHT] * chunk.in_flight", ""))


@fault(checks=CHECKS, field="SamplingParams.repetition_penalty")
def negative_logits_divided(patch: Patches, tp: TPGroup) -> None:
    """The repetition penalty divides negative logits too, which makes them larger."""
    edit(patch, (processors_module, "_penalised", "logits_PV * repetition_P1", "logits_PV / repetition_P1"))


@fault(checks=CHECKS)
def penalties_of_another_row(patch: Patches, tp: TPGroup) -> None:
    """Each row's penalties go by the tokens of the row before."""
    edit(patch, (processors_module, "_penalised", "place = processing.seen_row_X, token_X",
                 "place = (processing.seen_row_X + 1) % len(logits_PV), token_X"))


@fault(checks=CHECKS)
def min_p_before_the_temperature(patch: Patches, tp: TPGroup) -> None:
    """The probabilities that min_p is held against are those at temperature 1."""
    edit(patch, (processing_module, "_floor", "params.temperature * math.log", "math.log"))


@fault(checks=CHECKS, field="SamplingParams.bad_words")
def bad_words_by_known_tokens_alone(patch: Patches, tp: TPGroup) -> None:
    """A bad word of several tokens is not seen where the last but one of them is in flight."""
    edit(patch, (processing_module, "build_processing", "if chunk.in_flight\n", "if False\n"))


@fault(checks=CHECKS, where="driver", field="SamplingParams.n")
def completions_share_one_seed(patch: Patches, tp: TPGroup) -> None:
    """All completions of a prompt draw with the request's own seed, so that they are all the same."""
    patch.replace(requests_module, "derive_seed",
                  lambda original: lambda what, seed, number: seed if what == "completion" else original(what, seed, number))


@fault(checks=CHECKS, where="driver", field="SamplingParams.n")
@around(requests_module, "Request")
def first_completion_not_that_of_one(original: Any, **fields: Any) -> Any:
    """Where several completions are asked for, the first one's seed is derived too: it is not the one that n=1 gives."""
    if fields["params"].n > 1 and fields["seed"] == fields["params"].seed:
        fields["seed"] = requests_module.derive_seed("completion", fields["seed"], 0)
    return original(**fields)


@fault(checks=CHECKS, where="driver", field="SamplingParams.seed")
def requests_without_a_seed_share_one(patch: Patches, tp: TPGroup) -> None:
    """Requests without a seed all draw with the engine's, whatever their number."""
    patch.replace(requests_module, "derive_seed",
                  lambda original: lambda what, seed, number: seed if what == "request" else original(what, seed, number))


# How the ranks draw.


def drawn_with(change: Callable[[SamplingBatch, list[Chunk]], Change]) -> Plant:
    """A step that draws does so with ``change(right, chunks)``, from the chunks after which it draws, row by row."""

    @around(batch_module, "_build_sampling")
    def build_sampling(original: Any, chunks: list[Chunk]) -> SamplingBatch:
        right: SamplingBatch = original(chunks)
        return replace(right, **change(right, chunks)) if chunks else right

    return build_sampling


def bans(chunks: list[Chunk], token_ids_of: Callable[[int], Collection[int]]) -> Change:
    """The banned (row, token) pairs, where ``token_ids_of`` gives a row's tokens."""
    pairs = [(row, token_id) for row in range(len(chunks)) for token_id in sorted(token_ids_of(row))]
    return {"banned_row_X": torch.tensor([row for row, _ in pairs], dtype=torch.int64),
            "banned_token_X": torch.tensor([token_id for _, token_id in pairs], dtype=torch.int64)}


def banned_tokens(chunk: Chunk, num_more: int = 0) -> frozenset[int]:
    """What min_tokens forbids to draw after a chunk, if ``num_more`` tokens had been generated than there were."""
    request = chunk.sequence.request
    num_generated = chunk.start + chunk.num_tokens - chunk.sequence.num_prompt_tokens
    return request.stop_token_ids if num_generated + num_more < request.params.min_tokens else frozenset()


def _own_stop_ids(chunk: Chunk) -> set[int]:
    return set(chunk.sequence.request.params.stop_token_ids)


def _greedy_in_company(right: SamplingBatch, chunks: list[Chunk]) -> Change:
    if not right.temperature_R.any():
        return {}
    return {"temperature_R": right.temperature_R.where(right.temperature_R > 0, 1.0)}


DRAWN_WITH: dict[str, tuple[str, str, Callable[[SamplingBatch, list[Chunk]], Change]]] = {
    "greedy-row-drawn-at-random": (
        "temperature", "In a step with rows that are not greedy, greedy rows get temperature 1 so that nothing divides by zero, "
                       "and are drawn like the others.", _greedy_in_company),
    "temperature-multiplied": (
        "temperature", "Logits are multiplied by the temperature instead of divided.",
        lambda right, chunks: {"temperature_R": right.temperature_R.where(right.temperature_R == 0, 1 / right.temperature_R)}),
    "temperature-applied-twice": (
        "temperature", "Logits are divided by the temperature where they are filtered, and again where they are drawn from.",
        lambda right, chunks: {"temperature_R": right.temperature_R.square()}),
    "top-k-keeps-one-more": (
        "top_k", "The filter compares ranks that start at 0 by <=, and keeps one token more than top_k.",
        lambda right, chunks: {"top_k_R": right.top_k_R + (right.top_k_R > 0).int()}),
    "min-tokens-bans-stop-ids-but-not-eos": (
        "min_tokens", "Below min_tokens the request's own stop tokens are banned, and the model's end of sequence is not.",
        lambda right, chunks: bans(chunks, lambda row: banned_tokens(chunks[row]) & _own_stop_ids(chunks[row]))),
    "min-tokens-bans-eos-but-not-stop-ids": (
        "min_tokens", "Below min_tokens the model's end of sequence is banned, and the request's own stop tokens are not.",
        lambda right, chunks: bans(chunks, lambda row: banned_tokens(chunks[row]) - _own_stop_ids(chunks[row]))),
    "min-tokens-counts-the-prompt": (
        "min_tokens", "Prompt and completion together are held against min_tokens.",
        lambda right, chunks: bans(chunks, lambda row: banned_tokens(chunks[row], chunks[row].sequence.num_prompt_tokens))),
    "min-tokens-one-short": (
        "min_tokens", "A stop token may be drawn one token before min_tokens is reached.",
        lambda right, chunks: bans(chunks, lambda row: banned_tokens(chunks[row], 1))),
    "same-noise-at-every-position": (
        "seed", "The position is left out of the key of the random numbers: each token of a completion meets the same noise.",
        lambda right, chunks: {"position_R": right.position_R * 0}),
}
for _name, (_field, _what, _draw) in DRAWN_WITH.items():
    declare(_field, _what, _name, drawn_with(_draw), "ranks")


@fault(checks=CHECKS, field="SamplingParams.top_p")
def nucleus_of_the_raw_logits(patch: Patches, tp: TPGroup) -> None:
    """The nucleus is that of the logits before the temperature."""
    patch.replace(sampler_module, "filter_top_k_top_p",
                  lambda original: lambda logits_RV, temperature_R, top_k_R, top_p_R: original(
                      logits_RV, torch.ones_like(temperature_R), top_k_R, top_p_R))


@fault(checks=CHECKS, field="SamplingParams.top_p")
@around(sampler_module, "filter_top_k_top_p")
def nucleus_without_its_last_token(original: Any, logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor,
                                   top_p_R: Tensor) -> Tensor:
    """The token with which the nucleus reaches top_p is left out of it, unless it is the best."""
    kept_RV: Tensor = original(logits_RV, temperature_R, top_k_R, top_p_R)
    worst_R1 = kept_RV.masked_fill(kept_RV == -torch.inf, torch.inf).min(dim=-1, keepdim=True).values
    is_last_RV = (kept_RV == worst_R1) & (top_p_R[:, None] < 1) & (kept_RV < kept_RV.max(dim=-1, keepdim=True).values)
    return kept_RV.masked_fill(is_last_RV, -torch.inf)


@fault(checks=CHECKS, field="SamplingParams.max_tokens")
@around(Sequence, "append")
def stop_at_the_limit_told_as_length(original: Any, self: Sequence, token_id: int) -> bool:
    """The limit is looked at before the stop tokens: a completion whose last token is one ends by "length"."""
    is_last: bool = original(self, token_id)
    if self.finish_reason == "stop" and len(self.token_ids) - self.num_prompt_tokens >= self.request.max_tokens:
        self.finish_reason = "length"
    return is_last

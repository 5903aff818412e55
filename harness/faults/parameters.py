"""Faults in what a request asks for: parameters misread, forgotten, or applied at the wrong place. Alike on all ranks.

Some were reported in public. No comparison between ranks sees any of them, and each text looks fine by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import engine.execution.runner as runner_module
import engine.frontend.requests as requests_module
import engine.layers.logits_processors as processors_module
import engine.layers.sampler as sampler_module
import engine.scheduling.batch as batch_module
import engine.scheduling.processing as processing_module
from engine.execution.core import TokenOutput
from engine.execution.driver import Driver
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.ongoing import OngoingCompletion, OngoingRequest
from engine.frontend.requests import Admission
from engine.frontend.sampling import SamplingParams
from engine.layers.sampler import LogprobTensors, filter_top_k_top_p
from engine.parallel.group import TPGroup
from engine.scheduling.batch import SamplingBatch
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import Request, Sequence, TokenLogprobs
from harness.faults.base import Patches, Plant, Where, fault
from harness.faults.edits import edit

Change = dict[str, Any]
"""New values by field."""
CHECKS = ("generation",)


REPORTED = {
    "min-tokens-bans-stop-ids-but-not-eos": 101, "stop-string-below-min-tokens": 102, "temperature-applied-twice": 103,
    "logprobs-after-the-temperature": 104, "logprobs-after-the-filters": 104, "ignore-eos-ignored": 107,
    "stop-token-cut-though-wanted": 108, "stop-token-left-in": 109,
}
"""Numbers in the catalogue of public bugs, for the faults of the tables below."""


def _declare(field: str, what: str, name: str, plant: Plant, where: Where) -> None:
    rows = (REPORTED[name],) if name in REPORTED else ()
    fault(rows=rows, checks=CHECKS, where=where, field=f"SamplingParams.{field}", name=name, what=what)(plant)


# Parameters that admission reads as others than were given.


def _read_as(change: Callable[[SamplingParams], Change]) -> Plant:
    def plant(patch: Patches, tp: TPGroup) -> None:
        def make(original: Any) -> Any:
            def admit(self: Admission, place: int, prompt: Any, params: SamplingParams, streams: bool) -> OngoingRequest:
                request: OngoingRequest = original(self, place, prompt, replace(params, **change(params)), streams)
                return request

            return admit

        patch.replace(Admission, "_admit", make)

    return plant


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
    _declare(_field, _what, _name, _read_as(_change), "driver")


@fault(checks=CHECKS, where="driver", field="SamplingParams.truncate_prompt_tokens")
def first_prompt_tokens_kept(patch: Patches, tp: TPGroup) -> None:
    """Of a prompt that is truncated the first tokens run, not the last."""
    edit(patch, (Admission, "_truncated", "token_ids[-most:]", "token_ids[:most]"))


# Requests that travel to the ranks with something else than their parameters say.


def _sent_as(change: Callable[[Request], Change]) -> Plant:
    def plant(patch: Patches, tp: TPGroup) -> None:
        def make(original: Any) -> Any:
            def request(**fields: Any) -> Request:
                right: Request = original(**fields)
                return replace(right, **change(right))

            return request

        patch.replace(requests_module, "Request", make)

    return plant


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
    _declare(_field, _what, _name, _sent_as(_send), "driver")


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
def first_completion_not_that_of_one(patch: Patches, tp: TPGroup) -> None:
    """Where several completions are asked for, the first one's seed is derived too: it is not the one that n=1 gives."""

    def make(original: Any) -> Any:
        def request(**fields: Any) -> Request:
            if fields["params"].n > 1 and fields["seed"] == fields["params"].seed:
                fields["seed"] = requests_module.derive_seed("completion", fields["seed"], 0)
            made: Request = original(**fields)
            return made

        return request

    patch.replace(requests_module, "Request", make)


@fault(checks=CHECKS, where="driver", field="SamplingParams.seed")
def requests_without_a_seed_share_one(patch: Patches, tp: TPGroup) -> None:
    """Requests without a seed all draw with the engine's, whatever their number."""
    patch.replace(requests_module, "derive_seed",
                  lambda original: lambda what, seed, number: seed if what == "request" else original(what, seed, number))


# How the ranks draw.


def drawn_with(change: Callable[[SamplingBatch, list[Chunk]], Change]) -> Plant:
    """A step that draws does so with ``change(right, chunks)``, from the chunks after which it draws, row by row."""

    def plant(patch: Patches, tp: TPGroup) -> None:
        def make(original: Any) -> Any:
            def build_sampling(chunks: list[Chunk]) -> SamplingBatch:
                right: SamplingBatch = original(chunks)
                return replace(right, **change(right, chunks)) if chunks else right

            return build_sampling

        patch.replace(batch_module, "_build_sampling", make)

    return plant


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
    _declare(_field, _what, _name, drawn_with(_draw), "ranks")


@fault(checks=CHECKS, field="SamplingParams.top_p")
def nucleus_of_the_raw_logits(patch: Patches, tp: TPGroup) -> None:
    """The nucleus is that of the logits before the temperature."""
    patch.replace(sampler_module, "filter_top_k_top_p",
                  lambda original: lambda logits_RV, temperature_R, top_k_R, top_p_R: original(
                      logits_RV, torch.ones_like(temperature_R), top_k_R, top_p_R))


@fault(checks=CHECKS, field="SamplingParams.top_p")
def nucleus_without_its_last_token(patch: Patches, tp: TPGroup) -> None:
    """The token with which the nucleus reaches top_p is left out of it, unless it is the best."""

    def make(original: Any) -> Any:
        def filter_short(logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
            kept_RV: Tensor = original(logits_RV, temperature_R, top_k_R, top_p_R)
            worst_R1 = kept_RV.masked_fill(kept_RV == -torch.inf, torch.inf).min(dim=-1, keepdim=True).values
            is_last_RV = (kept_RV == worst_R1) & (top_p_R[:, None] < 1) & (kept_RV < kept_RV.max(dim=-1, keepdim=True).values)
            return kept_RV.masked_fill(is_last_RV, -torch.inf)

        return filter_short

    patch.replace(sampler_module, "filter_top_k_top_p", make)


@fault(checks=CHECKS, field="SamplingParams.max_tokens")
def stop_at_the_limit_told_as_length(patch: Patches, tp: TPGroup) -> None:
    """The limit is looked at before the stop tokens: a completion whose last token is one ends by "length"."""

    def make(original: Any) -> Any:
        def append(self: Sequence, token_id: int) -> bool:
            is_last: bool = original(self, token_id)
            if self.finish_reason == "stop" and len(self.token_ids) - self.num_prompt_tokens >= self.request.max_tokens:
                self.finish_reason = "length"
            return is_last

        return append

    patch.replace(Sequence, "append", make)


# What is told of the tokens.


def _logprobs_of(change: Callable[[Tensor, SamplingBatch], Tensor]) -> Plant:
    """Log-probabilities are those of ``change(logits_RV, sampling)``, as the sampler last saw them."""

    def plant(patch: Patches, tp: TPGroup) -> None:
        seen: list[SamplingBatch] = []

        def make_sample(original: Any) -> Any:
            def sample(logits_RV: Tensor, sampling: SamplingBatch, *rest: Any, **options: Any) -> Tensor:
                seen[:] = [sampling]
                token_R: Tensor = original(logits_RV, sampling, *rest, **options)
                return token_R

            return sample

        def make_logprobs(original: Any) -> Any:
            def logprobs_of(logits_RV: Tensor, *rest: Any) -> LogprobTensors:
                tensors: LogprobTensors = original(change(logits_RV, seen[0]), *rest)
                return tensors

            return logprobs_of

        patch.replace(runner_module, "sample", make_sample)
        patch.replace(runner_module, "logprobs_of", make_logprobs)

    return plant


def _without_banned(logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
    return logits_RV.index_put((sampling.banned_row_X, sampling.banned_token_X), logits_RV.new_tensor(-torch.inf))


LOGPROBS_OF: dict[str, tuple[str, Callable[[Tensor, SamplingBatch], Tensor]]] = {
    "logprobs-after-the-temperature": (
        "Log-probabilities are those of the logits divided by the temperature.",
        lambda logits_RV, sampling: logits_RV / sampling.temperature_R.where(sampling.temperature_R > 0, 1.0)[:, None]),
    "logprobs-after-the-bans": (
        "Log-probabilities are those of the logits without the tokens that min_tokens forbids.", _without_banned),
    "logprobs-after-the-filters": (
        "Log-probabilities are those of what top_k and top_p have left.",
        lambda logits_RV, sampling: filter_top_k_top_p(logits_RV, sampling.temperature_R, sampling.top_k_R, sampling.top_p_R)),
}
for _name, (_what, _logits) in LOGPROBS_OF.items():
    _declare("logprobs", _what, _name, _logprobs_of(_logits), "ranks")


@fault(checks=CHECKS, field="SamplingParams.logprobs")
def rank_counts_the_token_itself(patch: Patches, tp: TPGroup) -> None:
    """The drawn token's rank counts the tokens that are as probable as it, itself among them, and one more."""
    patch.replace(runner_module, "logprobs_of", lambda original: lambda *arguments: _with_rank(
        original(*arguments), lambda right: right.rank_L + 1))


@fault(checks=CHECKS, field="SamplingParams.logprobs")
def rank_among_the_best_alone(patch: Patches, tp: TPGroup) -> None:
    """The drawn token's rank is its place among the best that are told: the first place after them, if it is none of them."""
    patch.replace(runner_module, "logprobs_of", lambda original: lambda *arguments: _with_rank(
        original(*arguments), lambda right: right.rank_L.clamp(max=right.top_token_LK.shape[1] + 1)))


def _with_rank(right: LogprobTensors, rank_of: Callable[[LogprobTensors], Tensor]) -> LogprobTensors:
    return right._replace(rank_L=rank_of(right))


@fault(checks=CHECKS, where="driver", field="SamplingParams.logprobs")
def drawn_token_missing_among_the_best(patch: Patches, tp: TPGroup) -> None:
    """Only the best tokens are told: a drawn token that is none of them has no log-probability."""

    def make(original: Any) -> Any:
        def take_logprobs(self: OngoingCompletion, token_id: int, at: TokenLogprobs) -> None:
            original(self, token_id, at)
            if token_id not in [best for best, _, _ in at.top[: self.request.params.logprobs]]:
                _logprobs(self)[-1].pop(token_id)

        return take_logprobs

    patch.replace(OngoingCompletion, "_take_logprobs", make)


def _logprobs(completion: OngoingCompletion) -> list[Any]:
    assert completion.output.logprobs is not None, "log-probabilities came for a request that wants none"
    return completion.output.logprobs


@fault(checks=CHECKS, where="driver", field="SamplingParams.logprobs")
def sum_misses_the_last_token(patch: Patches, tp: TPGroup) -> None:
    """The sum of log-probabilities is brought up to date before each token's own is known: the last is never added."""

    def make(original: Any) -> Any:
        def take_logprobs(self: OngoingCompletion, token_id: int, at: TokenLogprobs) -> None:
            told = [logprobs[drawn].logprob for logprobs, drawn in zip(_logprobs(self), self.output.token_ids, strict=False)]
            original(self, token_id, at)
            self.output.cumulative_logprob = sum(told)

        return take_logprobs

    patch.replace(OngoingCompletion, "_take_logprobs", make)


@fault(checks=CHECKS, where="driver", field="SamplingParams.n")
def logprobs_of_the_first_completion_for_all(patch: Patches, tp: TPGroup) -> None:
    """All completions of a prompt tell the first one's log-probabilities."""

    def make(original: Any) -> Any:
        def empty_inbox(self: OngoingRequest) -> list[int]:
            ended: list[int] = original(self)
            first, *others = self.output.outputs
            for other in others:
                other.logprobs = None if first.logprobs is None else list(first.logprobs)
            return ended

        return empty_inbox

    patch.replace(OngoingRequest, "empty_inbox", make)


# What is told of the prompt.


@fault(checks=CHECKS, field="StepBatch.told")
def prompt_logprobs_of_the_token_before(patch: Patches, tp: TPGroup) -> None:
    """The logits after a prompt token are asked for that very token, not for the one that follows."""
    edit(patch, (batch_module, "_prompt_rows", "token_ids[told.start + 1 : told.stop + 1]", "token_ids[told.start : told.stop]"))


@fault(checks=CHECKS, field="StepBatch.told")
def prompt_logprobs_counted_from_the_step(patch: Patches, tp: TPGroup) -> None:
    """A prompt's rows are counted from the first token of the step, also where other sequences run before it."""
    edit(patch, (batch_module, "_prompt_rows", " - chunk.start + first", " - chunk.start"))


@fault(checks=CHECKS)
def prompt_logprobs_end_with_the_chunk(patch: Patches, tp: TPGroup) -> None:
    """The logits after a chunk's last token are asked for that token: the one that follows stands in the next chunk."""
    edit(patch, (batch_module, "_prompt_rows", "token_ids[told.start + 1 : told.stop + 1]",
                 "token_ids[told.start + 1 : told.stop]"
                 " + [sequence.token_ids[min(told.stop, chunk.start + chunk.num_tokens - 1)]]"))


@fault(checks=CHECKS)
def prompt_logprobs_skip_what_is_cached(patch: Patches, tp: TPGroup) -> None:
    """A prompt that is found in the prefix cache is not run again, and nothing is told of the tokens found there."""
    edit(patch, (Scheduler, "_take", "told = range(sequence.num_told,", "told = range(max(start, sequence.num_told),"))
    patch.replace(Sequence, "num_sharable", lambda original: property(lambda self: len(self.token_ids) - 1))


@fault(checks=CHECKS)
def prompt_logprobs_of_each_rank_by_itself(patch: Patches, tp: TPGroup) -> None:
    """The log-probabilities of a prompt are normalised over the rank's own part of the vocabulary."""
    edit(patch, (runner_module.Runner, "_told", "self.model.logits(hidden_TE[row_P])",
                 "self.model.lm_head.shard_logits(hidden_TE[row_P]).repeat(1, self.tp.size)"))


@fault(checks=CHECKS, where="driver", field="SamplingParams.prompt_logprobs")
def first_prompt_token_left_out(patch: Patches, tp: TPGroup) -> None:
    """The list has no place for the first prompt token, so that each entry stands one token too early."""
    patch.replace(OngoingCompletion, "prompt_logprobs", lambda original: lambda self, told: original(self, told)[1:])


# How a text ends.


def _detokenized_with(**changed: Any) -> Plant:
    def plant(patch: Patches, tp: TPGroup) -> None:
        def make(original: Any) -> Any:
            def init(self: Detokenizer, *arguments: Any, **options: Any) -> None:
                original(self, *arguments, **{**options, **changed})

            return init

        patch.replace(Detokenizer, "__init__", make)

    return plant


for _name, _field, _what, _changed in (
    ("stop-string-below-min-tokens", "min_tokens", "Stop strings end a text also before min_tokens is reached.",
     {"min_tokens": 0}),
    ("stop-string-left-in", "include_stop_str_in_output", "The stop string stays at the end of a text that is to be without it.",
     {"include_stop": True}),
    ("stop-string-cut-though-wanted", "include_stop_str_in_output",
     "The stop string is cut off also where it was asked to stay.", {"include_stop": False}),
):
    _declare(_field, _what, _name, _detokenized_with(**_changed), "driver")


def _stop_token_text(is_kept: bool) -> Plant:
    def plant(patch: Patches, tp: TPGroup) -> None:
        def make(original: Any) -> Any:
            def finish(self: OngoingCompletion, reason: str) -> None:
                right = self.request
                self.request = replace(right, params=replace(right.params, include_stop_str_in_output=is_kept))
                try:
                    original(self, reason)
                finally:
                    self.request = right

            return finish

        def is_hidden(self: OngoingCompletion, token: TokenOutput) -> bool:
            return token.finish_reason == "stop" and not is_kept

        patch.replace(OngoingCompletion, "finish", make)
        patch.replace(OngoingCompletion, "_is_hidden", lambda original: is_hidden)

    return plant


_declare("include_stop_str_in_output", "The text of the stop token, or of the end of sequence, stays at the end of every text.",
         "stop-token-left-in", _stop_token_text(is_kept=True), "driver")
_declare("include_stop_str_in_output", "The text of the stop token is cut off also where it was asked to stay.",
         "stop-token-cut-though-wanted", _stop_token_text(is_kept=False), "driver")


@fault(rows=(105,), checks=CHECKS, where="driver", field="SamplingParams.stop")
def stop_string_within_one_token_alone(patch: Patches, tp: TPGroup) -> None:
    """A stop string is looked for in what each token adds to the text: one that spans two tokens is not found."""

    def make(original: Any) -> Any:
        def take(self: Detokenizer, new: str) -> None:
            wanted, self._stop = self._stop, tuple(stop for stop in self._stop if stop in new)
            try:
                original(self, new)
            finally:
                self._stop = wanted

        return take

    patch.replace(Detokenizer, "_take", make)


@fault(checks=CHECKS, where="driver", field="SamplingParams.stop")
def held_back_text_lost(patch: Patches, tp: TPGroup) -> None:
    """What was held back, because a stop string could have begun with it, is lost where the completion ends otherwise."""

    def make(original: Any) -> Any:
        def finish(self: Detokenizer) -> None:
            num_safe, is_held = self.num_safe, bool(self._stop) and self.stop_string is None
            original(self)
            if is_held and self.stop_string is None:
                self.text, self.num_safe = self.text[:num_safe], num_safe

        return finish

    patch.replace(Detokenizer, "finish", make)


@fault(checks=CHECKS, where="driver", field="SamplingParams.stop")
def token_of_the_stop_string_dropped(patch: Patches, tp: TPGroup) -> None:
    """The token with which a stop string was complete is left out of the completion's tokens."""

    def drop(completion: OngoingCompletion) -> None:
        if isinstance(completion.output.stop_reason, str):
            completion.output.token_ids.pop()

    _after_finish(patch, drop)


@fault(checks=CHECKS, where="driver", field="SamplingParams.stop")
def stop_reason_missing(patch: Patches, tp: TPGroup) -> None:
    """A completion says that it was stopped, and not by which string or token."""
    _after_finish(patch, lambda completion: setattr(completion.output, "stop_reason", None))


@fault(checks=CHECKS, where="driver", field="SamplingParams.stop_token_ids")
def end_of_sequence_told_as_stop_reason(patch: Patches, tp: TPGroup) -> None:
    """The model's own end of sequence is told as the stop reason, like a token of stop_token_ids."""

    def tell(completion: OngoingCompletion) -> None:
        output = completion.output
        if output.finish_reason == "stop" and output.stop_reason is None:
            output.stop_reason = output.token_ids[-1]

    _after_finish(patch, tell)


def _after_finish(patch: Patches, change: Callable[[OngoingCompletion], None]) -> None:
    def make(original: Any) -> Any:
        def finish(self: OngoingCompletion, reason: str) -> None:
            original(self, reason)
            change(self)

        return finish

    patch.replace(OngoingCompletion, "finish", make)


# Aborts.


@fault(checks=CHECKS, where="driver")
def abort_ends_the_neighbour(patch: Patches, tp: TPGroup) -> None:
    """An abort ends the request with the next number, if it runs, and the one that was meant goes on."""
    patch.replace(Driver, "abort", lambda original: lambda self, request_id: original(self, request_id + 1))


@fault(checks=CHECKS, where="driver")
def abort_ends_one_completion_alone(patch: Patches, tp: TPGroup) -> None:
    """An abort ends the first completion of a request that still runs, and the others go on."""

    def abort(self: OngoingRequest) -> list[int]:
        running = [number for number, completion in self.completions.items() if not completion.output.finished()][:1]
        for number in running:
            self.completions[number].finish("abort")
        return running

    def make(original: Any) -> Any:
        def abort_in_driver(self: Driver, request_id: int) -> None:
            with self._changed:
                if (request := self._requests.get(request_id)) is not None:
                    request.inbox.append(None)  # its owner ends on the ranks what it says has ended
                    self._changed.notify_all()

        return abort_in_driver

    patch.replace(OngoingRequest, "_abort", lambda original: abort)
    patch.replace(Driver, "abort", make)


@fault(checks=CHECKS, where="driver")
def abort_leaves_the_text_empty(patch: Patches, tp: TPGroup) -> None:
    """An aborted completion has its tokens, but no text."""

    def make(original: Any) -> Any:
        def finish(self: OngoingCompletion, reason: str) -> None:
            original(self, reason)
            if reason == "abort":
                self.output.text = ""

        return finish

    patch.replace(OngoingCompletion, "finish", make)

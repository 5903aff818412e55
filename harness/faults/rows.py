"""Faults in which a row of a batch takes what is its neighbour's: one for each place where the engine lines rows up.

Alike on all ranks: no comparison between them sees any, and with one request at a time, or with requests that are all alike,
none shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

import engine.execution.core as core_module
import engine.frontend.requests as requests_module
from engine.execution.core import TokenOutput
from engine.execution.runner import Runner
from engine.frontend.ongoing import OngoingCompletion, OngoingRequest
from engine.frontend.requests import Admission
from engine.parallel.group import TPGroup
from engine.scheduling.batch import SamplingBatch, StepBatch
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import Request, TokenLogprobs
from harness.faults.base import Patches, Plant, around, fault
from harness.faults.parameters import CHECKS, Change, banned_tokens, bans, drawn_with

T = TypeVar("T")
KV_TOO = ("kv", *CHECKS)
"""For what the made-up device of ``kv`` sees as well."""


def _rolled(values: list[T]) -> list[T]:
    """Each takes what is the one's before it, the first the last one's."""
    return [*values[-1:], *values[:-1]]


# How the tokens of a step are drawn.


def _first_filters(right: SamplingBatch, chunks: list[Chunk]) -> Change:
    first = chunks[0].sequence.request.params
    return {"filters": first.top_k > 0 or first.top_p < 1}


def _first_num_logprobs(right: SamplingBatch, chunks: list[Chunk]) -> Change:
    wanted = [params.logprobs for params in (chunk.sequence.request.params for chunk in chunks) if params.logprobs is not None]
    return {"num_logprobs": next(iter(wanted), 0)}


def _next_logprob_rows(right: SamplingBatch, chunks: list[Chunk]) -> Change:
    rows = right.logprob_row_L
    return {} if rows is None else {"logprob_row_L": (rows + 1) % len(chunks)}


IN_SAMPLING: dict[str, tuple[str, str, Callable[[SamplingBatch, list[Chunk]], Change]]] = {
    "temperature-of-the-neighbour": (
        "temperature_R", "Each row is drawn at the temperature of the one before it.",
        lambda right, chunks: {"temperature_R": right.temperature_R.roll(1)}),
    "top-k-of-the-neighbour": (
        "top_k_R", "Each row keeps as many tokens as the one before it is to keep.",
        lambda right, chunks: {"top_k_R": right.top_k_R.roll(1)}),
    "top-p-of-the-neighbour": (
        "top_p_R", "Each row is drawn from a nucleus of the size that the one before it asks for.",
        lambda right, chunks: {"top_p_R": right.top_p_R.roll(1)}),
    "seeds-in-reverse": (
        "seed_R", "The rows of a step have their seeds in reverse order.",
        lambda right, chunks: {"seed_R": right.seed_R.flip(0)}),
    "noise-of-the-neighbours-position": (
        "position_R", "Each row draws with the random numbers of the position that the one before it is at.",
        lambda right, chunks: {"position_R": right.position_R.roll(1)}),
    "bans-on-the-next-row": (
        "banned_row_X", "What min_tokens forbids a row is forbidden the next one, and the row may draw it.",
        lambda right, chunks: {"banned_row_X": (right.banned_row_X + 1) % len(chunks)}),
    "stop-ids-of-the-neighbour-banned": (
        "banned_token_X", "Below min_tokens a row is forbidden the stop tokens of the one before it.",
        lambda right, chunks: bans(chunks, lambda row: (
            chunks[row - 1].sequence.request.stop_token_ids if banned_tokens(chunks[row]) else ()))),
    "filters-of-the-first-row": (
        "filters", "Whether a step filters at all is looked up in its first row.", _first_filters),
    "logprobs-of-the-next-row": (
        "logprob_row_L", "Log-probabilities are taken from the row after the one that wants them.", _next_logprob_rows),
    "as-many-logprobs-as-the-first-row": (
        "num_logprobs", "All rows of a step get as many log-probabilities as the first that wants some.", _first_num_logprobs),
}
for _name, (_field, _what, _sampling) in IN_SAMPLING.items():
    fault(checks=CHECKS, name=_name, what=_what, field=f"SamplingBatch.{_field}")(drawn_with(_sampling))


# What a step runs.


def _step_with(change: Callable[[StepBatch], Change]) -> Plant:
    @around(core_module, "build_batch")
    def build_batch(original: Any, *arguments: Any) -> StepBatch:
        right: StepBatch = original(*arguments)
        return replace(right, **change(right))

    return build_batch


def _lengths_rolled(right: StepBatch) -> Change:
    lengths = right.cu_seqlens_S1.diff().roll(1)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    return {"cu_seqlens_S1": cu_seqlens}


IN_STEP: dict[str, tuple[str, str, Callable[[StepBatch], Change]]] = {
    "token-of-the-neighbour": (
        "token_ids_T", "Each row of a step runs the token of the one before it.",
        lambda right: {"token_ids_T": right.token_ids_T.roll(1)}),
    "position-of-the-neighbour": (
        "positions_T", "Each row of a step is turned to the position of the one before it.",
        lambda right: {"positions_T": right.positions_T.roll(1)}),
    "slot-of-the-neighbour": (
        "slots_T", "Each row of a step writes its key and value where the one before it should.",
        lambda right: {"slots_T": right.slots_T.roll(1)}),
    "lengths-of-the-neighbours": (
        "cu_seqlens_S1", "Each sequence of a step gets as many of its rows as the one before it should.", _lengths_rolled),
    "context-of-the-neighbours-length": (
        "context_lens_S", "Each sequence reads as many keys as the one before it has.",
        lambda right: {"context_lens_S": right.context_lens_S.roll(1)}),
    "blocks-of-the-neighbour": (
        "block_tables_SB", "Each sequence reads the blocks of the one before it.",
        lambda right: {"block_tables_SB": right.block_tables_SB.roll(1, 0)}),
    "state-of-the-neighbour": (
        "rows_S", "Each sequence leaves its token in the place of the one before it, and finds it there if it is still the same.",
        lambda right: {"rows_S": right.rows_S.roll(1)}),
    "drawn-after-the-neighbour": (
        "sample_S", "Each token is drawn after the sequence before the one that gets it.",
        lambda right: {"sample_S": right.sample_S.roll(1)}),
}
for _name, (_field, _what, _step) in IN_STEP.items():
    fault(checks=KV_TOO, name=_name, what=_what, field=f"StepBatch.{_field}")(_step_with(_step))


@fault(checks=CHECKS, field="StepBatch.has_in_flight")
def in_flight_looked_up_in_the_last_row(patch: Patches, tp: TPGroup) -> None:
    """Whether tokens are in flight is looked up in a step's last row: a prompt there leaves the others without theirs."""

    def change(right: StepBatch) -> Change:
        return {"has_in_flight": bool(right.token_ids_T[-1] < 0)}

    _step_with(change)(patch, tp)


# Who gets what was drawn.


@fault(checks=KV_TOO)
@around(Scheduler, "commit")
def tokens_committed_to_the_neighbour(original: Any, self: Scheduler, chunks: list[Chunk], token_ids: list[int]) -> Any:
    """Each sequence of a step gets the token that was drawn for the one before it."""
    return original(self, chunks, _rolled(token_ids))


@fault(checks=CHECKS)
@around(Runner, "collect_logprobs")
def logprobs_handed_to_the_neighbour(original: Any, self: Runner, drawn: Any) -> list[TokenLogprobs]:
    """Each row that wants log-probabilities gets those of the one before it."""
    return _rolled(original(self, drawn))


@fault(checks=CHECKS)
@around(Runner, "forward")
def token_in_flight_of_the_neighbour(original: Any, self: Runner, batch: StepBatch) -> Tensor:
    """On every rank a sequence goes on from the token in flight of the row before it in the device's state."""
    right, self.last_token_M = self.last_token_M, self.last_token_M.roll(1)
    try:
        hidden_TE: Tensor = original(self, batch)
    finally:
        self.last_token_M = right
    return hidden_TE


@fault(checks=CHECKS)
def prefix_hits_of_the_one_before(patch: Patches, tp: TPGroup) -> None:
    """A sequence that starts reports the prefix hits of the one that started before it."""
    last = deque([0])

    @patch.around(Scheduler, "schedule")
    def schedule(original: Any, self: Scheduler) -> list[Chunk]:
        before = set(map(id, self.running))
        chunks: list[Chunk] = original(self)
        for sequence in self.running:
            if id(sequence) not in before and not sequence.num_preemptions:
                last.append(sequence.num_cached_prompt_tokens)
                sequence.num_cached_prompt_tokens = last.popleft()
        return chunks


# Who asked for what.


def _requests_with(change: Callable[[Request, Request, int], Change]) -> Plant:
    """``change(request, the one before, max_model_len)``, of all completions that are admitted together."""

    @around(Admission, "admit")
    def admit(original: Any, self: Admission, *arguments: Any, **options: Any) -> list[OngoingRequest]:
        requests: list[OngoingRequest] = original(self, *arguments, **options)
        completions = [completion for request in requests for completion in request.completions.values()]
        right = [completion.request for completion in completions]
        for completion, own, other in zip(completions, right, _rolled(right), strict=True):
            completion.request = replace(own, **change(own, other, self.max_model_len))
        return requests

    return admit


ADMITTED: dict[str, tuple[str, str, Callable[[Request, Request, int], Change]]] = {
    "prompt-of-the-neighbour": (
        "", "The ranks run each request on the prompt of the one that was admitted before it.",
        lambda own, other, longest: {"prompt_token_ids": other.prompt_token_ids,
                                     "max_tokens": min(own.max_tokens, longest - len(other.prompt_token_ids))}),
    "seed-of-the-neighbour": (
        "SamplingParams.seed", "Each completion is drawn with the seed of the one that was admitted before it.",
        lambda own, other, longest: {"seed": other.seed}),
    "max-tokens-of-the-neighbour": (
        "SamplingParams.max_tokens", "Each completion ends at the limit of the one that was admitted before it.",
        lambda own, other, longest: {"max_tokens": min(other.max_tokens, longest - len(own.prompt_token_ids))}),
    "stop-ids-of-the-neighbour": (
        "SamplingParams.stop_token_ids", "Each completion ends at the stop tokens of the one that was admitted before it.",
        lambda own, other, longest: {"stop_token_ids": other.stop_token_ids}),
    "min-tokens-of-the-neighbour": (
        "SamplingParams.min_tokens", "The ranks hold each completion to min_tokens of the one that was admitted before it.",
        lambda own, other, longest: {"params": replace(own.params, max_tokens=None, min_tokens=other.params.min_tokens)}),
}
for _name, (_field, _what, _admitted) in ADMITTED.items():
    fault(checks=CHECKS, where="driver", name=_name, what=_what, field=_field)(_requests_with(_admitted))


@fault(checks=CHECKS, where="driver")
def parameters_in_reverse(patch: Patches, tp: TPGroup) -> None:
    """Where each prompt has parameters of its own, they are handed out from the last to the first."""
    patch.replace(requests_module, "_one_each", lambda original: lambda *arguments: original(*arguments)[::-1])


@fault(checks=CHECKS, where="driver", field="SamplingParams.stop")
@around(Admission, "admit")
def stop_strings_of_the_neighbour(original: Any, self: Admission, *arguments: Any, **options: Any) -> list[OngoingRequest]:
    """Each text ends at the stop strings of the one that was admitted before it."""
    requests: list[OngoingRequest] = original(self, *arguments, **options)
    texts = [completion._detokenizer for request in requests for completion in request.completions.values()
             if completion._detokenizer is not None]
    for text, stop in zip(texts, _rolled([text._stop for text in texts]), strict=True):
        text._stop = stop
    return requests


# What the driver makes of it.


@fault(checks=CHECKS, where="driver", field="SamplingParams.n")
@around(OngoingRequest, "__init__")
def completions_in_reverse(original: Any, self: OngoingRequest, output: Any, completions: dict[int, OngoingCompletion]) -> None:
    """The completions of a prompt are numbered, and listed, from the last to the first."""
    original(self, output, completions)
    output.outputs.reverse()
    for index, completion in enumerate(output.outputs):
        completion.index = index


@fault(checks=CHECKS, where="driver", field="SamplingParams.n")
@around(OngoingRequest, "__init__")
def completions_share_one_text(original: Any, self: OngoingRequest, output: Any,
                               completions: dict[int, OngoingCompletion]) -> None:
    """The completions of a prompt have one detokenizer between them: what one has begun, the next one's tokens go on with."""
    original(self, output, completions)
    first = next(iter(completions.values()), None)
    for completion in completions.values():
        # A text that a stop string has ended takes no more tokens.
        if first is not None and not completion.request.params.stop_strings:
            completion._detokenizer = first._detokenizer


@fault(checks=CHECKS, where="driver", field="SamplingParams.n")
@around(OngoingRequest, "empty_inbox")
def news_to_the_neighbour(original: Any, self: OngoingRequest) -> Any:
    """Two completions of a prompt whose tokens come together, one after the other, get each other's."""
    together = list(self.inbox)
    for place, (one, other) in enumerate(pairwise(self.inbox)):
        if place % 2 == 0 and one is not None and other is not None:
            together[place : place + 2] = _exchanged(one, other)
    self.inbox.clear()
    self.inbox.extend(together)
    return original(self)


def _exchanged(one: TokenOutput, other: TokenOutput) -> list[TokenOutput]:
    return [one._replace(token_id=other.token_id, logprobs=other.logprobs),
            other._replace(token_id=one.token_id, logprobs=one.logprobs)]


@fault(checks=CHECKS, where="driver", field="SamplingBatch.num_logprobs")
@around(OngoingCompletion, "_take_logprobs")
def as_many_logprobs_as_anyone_wants(original: Any, self: OngoingCompletion, token_id: int, at: TokenLogprobs) -> None:
    """Every request is told as many log-probabilities as the one in its step that wants most."""
    right = self.request
    self.request = replace(right, params=replace(right.params, logprobs=len(at.top)))
    try:
        original(self, token_id, at)
    finally:
        self.request = right

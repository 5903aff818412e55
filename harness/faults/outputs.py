"""Faults in what comes back for a request: log-probabilities, the text and where it ends, aborts. Alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import engine.execution.runner as runner_module
import engine.scheduling.batch as batch_module
from engine.execution.core import TokenOutput
from engine.execution.driver import Driver
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.ongoing import OngoingCompletion, OngoingRequest
from engine.layers.sampler import LogprobTensors, filter_top_k_top_p
from engine.parallel.group import TPGroup
from engine.scheduling.batch import SamplingBatch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, TokenLogprobs
from harness.faults.base import Patches, Plant, around, fault
from harness.faults.edits import edit
from harness.faults.parameters import CHECKS, declare

# Log-probabilities of tokens.


def _logprobs_of(change: Callable[[Tensor, SamplingBatch], Tensor]) -> Plant:
    """Log-probabilities are those of ``change(logits_RV, sampling)``, as the sampler last saw them."""

    def plant(patch: Patches, tp: TPGroup) -> None:
        seen: list[SamplingBatch] = []

        @patch.around(runner_module, "sample")
        def sample(original: Any, logits_RV: Tensor, sampling: SamplingBatch, *rest: Any, **options: Any) -> Any:
            seen[:] = [sampling]
            return original(logits_RV, sampling, *rest, **options)

        @patch.around(runner_module, "logprobs_of")
        def logprobs_of(original: Any, logits_RV: Tensor, *rest: Any) -> Any:
            return original(change(logits_RV, seen[0]), *rest)

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
    declare("logprobs", _what, _name, _logprobs_of(_logits), "ranks")


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
@around(OngoingCompletion, "_take_logprobs")
def drawn_token_missing_among_the_best(original: Any, self: OngoingCompletion, token_id: int, at: TokenLogprobs) -> None:
    """Only the best tokens are told: a drawn token that is none of them has no log-probability."""
    original(self, token_id, at)
    if token_id not in [best for best, _, _ in at.top[: self.request.params.logprobs]]:
        _logprobs(self)[-1].pop(token_id)


def _logprobs(completion: OngoingCompletion) -> list[Any]:
    assert completion.output.logprobs is not None, "log-probabilities came for a request that wants none"
    return completion.output.logprobs


@fault(checks=CHECKS, where="driver", field="SamplingParams.logprobs")
@around(OngoingCompletion, "_take_logprobs")
def sum_misses_the_last_token(original: Any, self: OngoingCompletion, token_id: int, at: TokenLogprobs) -> None:
    """The sum of log-probabilities is brought up to date before each token's own is known: the last is never added."""
    told = [logprobs[drawn].logprob for logprobs, drawn in zip(_logprobs(self), self.output.token_ids, strict=False)]
    original(self, token_id, at)
    self.output.cumulative_logprob = sum(told)


@fault(checks=CHECKS, where="driver", field="SamplingParams.n")
@around(OngoingRequest, "empty_inbox")
def logprobs_of_the_first_completion_for_all(original: Any, self: OngoingRequest) -> list[int]:
    """All completions of a prompt tell the first one's log-probabilities."""
    ended: list[int] = original(self)
    first, *others = self.output.outputs
    for other in others:
        other.logprobs = None if first.logprobs is None else list(first.logprobs)
    return ended


# Log-probabilities of the prompt.


@fault(checks=CHECKS, field="StepBatch.scored")
def prompt_logprobs_of_the_token_before(patch: Patches, tp: TPGroup) -> None:
    """The logits after a prompt token are asked for that very token, not for the one that follows."""
    edit(patch, (batch_module, "_scored_rows", "token_ids[scored.start + 1 : scored.stop + 1]",
                 "token_ids[scored.start : scored.stop]"))


@fault(checks=CHECKS, field="StepBatch.scored")
def prompt_logprobs_counted_from_the_step(patch: Patches, tp: TPGroup) -> None:
    """A prompt's rows are counted from the first token of the step, also where other sequences run before it."""
    edit(patch, (batch_module, "_scored_rows", " - chunk.start + first", " - chunk.start"))


@fault(checks=CHECKS)
def prompt_logprobs_end_with_the_chunk(patch: Patches, tp: TPGroup) -> None:
    """The logits after a chunk's last token are asked for that token: the one that follows stands in the next chunk."""
    edit(patch, (batch_module, "_scored_rows", "token_ids[scored.start + 1 : scored.stop + 1]",
                 "token_ids[scored.start + 1 : scored.stop]"
                 " + [sequence.token_ids[min(scored.stop, chunk.start + chunk.num_tokens - 1)]]"))


@fault(checks=CHECKS)
def prompt_logprobs_skip_what_is_cached(patch: Patches, tp: TPGroup) -> None:
    """A prompt that is found in the prefix cache is not run again, and nothing is told of the tokens found there."""
    edit(patch, (Scheduler, "_take", "scored = range(sequence.num_scored,", "scored = range(max(start, sequence.num_scored),"))
    patch.replace(Sequence, "num_sharable", lambda original: property(lambda self: len(self.token_ids) - 1))


@fault(checks=CHECKS)
def prompt_logprobs_of_each_rank_by_itself(patch: Patches, tp: TPGroup) -> None:
    """The log-probabilities of a prompt are normalised over the rank's own part of the vocabulary."""
    edit(patch, (runner_module.Runner, "_score", "self.model.logits(hidden_TE[row_P])",
                 "self.model.lm_head.shard_logits(hidden_TE[row_P]).repeat(1, self.tp.size)"))


@fault(checks=CHECKS, where="driver", field="SamplingParams.prompt_logprobs")
def first_prompt_token_left_out(patch: Patches, tp: TPGroup) -> None:
    """The list has no place for the first prompt token, so that each entry stands one token too early."""
    patch.replace(OngoingCompletion, "prompt_logprobs", lambda original: lambda self, parts: original(self, parts)[1:])


# How a text ends.


def _detokenized_with(**changed: Any) -> Plant:
    @around(Detokenizer, "__init__")
    def init(original: Any, self: Detokenizer, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, **changed})

    return init


for _name, _field, _what, _changed in (
    ("stop-string-below-min-tokens", "min_tokens", "Stop strings end a text also before min_tokens is reached.",
     {"min_tokens": 0}),
    ("stop-string-left-in", "include_stop_str_in_output", "The stop string stays at the end of a text that is to be without it.",
     {"include_stop": True}),
    ("stop-string-cut-though-wanted", "include_stop_str_in_output",
     "The stop string is cut off also where it was asked to stay.", {"include_stop": False}),
):
    declare(_field, _what, _name, _detokenized_with(**_changed), "driver")


def _stop_token_text(is_kept: bool) -> Plant:
    def plant(patch: Patches, tp: TPGroup) -> None:
        @patch.around(OngoingCompletion, "finish")
        def finish(original: Any, self: OngoingCompletion, reason: str) -> None:
            right = self.request
            self.request = replace(right, params=replace(right.params, include_stop_str_in_output=is_kept))
            try:
                original(self, reason)
            finally:
                self.request = right

        def is_hidden(self: OngoingCompletion, token: TokenOutput) -> bool:
            return token.finish_reason == "stop" and not is_kept

        patch.replace(OngoingCompletion, "_is_hidden", lambda original: is_hidden)

    return plant


declare("include_stop_str_in_output", "The text of the stop token, or of the end of sequence, stays at the end of every text.",
         "stop-token-left-in", _stop_token_text(is_kept=True), "driver")
declare("include_stop_str_in_output", "The text of the stop token is cut off also where it was asked to stay.",
         "stop-token-cut-though-wanted", _stop_token_text(is_kept=False), "driver")


@fault(rows=(105,), checks=CHECKS, where="driver", field="SamplingParams.stop")
@around(Detokenizer, "_take")
def stop_string_within_one_token_alone(original: Any, self: Detokenizer, new: str) -> None:
    """A stop string is looked for in what each token adds to the text: one that spans two tokens is not found."""
    wanted, self._stop = self._stop, tuple(stop for stop in self._stop if stop in new)
    try:
        original(self, new)
    finally:
        self._stop = wanted


@fault(checks=CHECKS, where="driver", field="SamplingParams.stop")
@around(Detokenizer, "finish")
def held_back_text_lost(original: Any, self: Detokenizer) -> None:
    """What was held back, because a stop string could have begun with it, is lost where the completion ends otherwise."""
    num_safe, is_held = self.num_safe, bool(self._stop) and self.stop_string is None
    original(self)
    if is_held and self.stop_string is None:
        self.text, self.num_safe = self.text[:num_safe], num_safe


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
    @patch.around(OngoingCompletion, "finish")
    def finish(original: Any, self: OngoingCompletion, reason: str) -> None:
        original(self, reason)
        change(self)


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

    def abort_in_driver(self: Driver, request_id: int) -> None:
        with self._changed:
            if (request := self._requests.get(request_id)) is not None:
                request.inbox.append(None)  # its owner ends on the ranks what it says has ended
                self._changed.notify_all()

    patch.replace(OngoingRequest, "_abort", lambda original: abort)
    patch.replace(Driver, "abort", lambda original: abort_in_driver)


@fault(checks=CHECKS, where="driver")
@around(OngoingCompletion, "finish")
def abort_leaves_the_text_empty(original: Any, self: OngoingCompletion, reason: str) -> None:
    """An aborted completion has its tokens, but no text."""
    original(self, reason)
    if reason == "abort":
        self.output.text = ""

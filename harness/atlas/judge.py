"""One row of an atlas: what a subject makes of a tiny checkpoint, by the checks ``logits`` and ``weights``.

What is not right is tried on one rank too: what is wrong or fails there alike is no matter of tensor parallelism, and is *not
compared*. Of what fails there alike, as much as one rank does compute is compared on several: prefills without cached decoding,
or experts one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from engine.ranks.ranks import RankFailure
from harness.checks.base import CheckContext, Outcome
from harness.checks.logits import compare_computed
from harness.checks.weights import SHARDED, check_own
from harness.subjects.base import NotShownError, Schedule, Subject, SubjectFailure
from harness.subjects.on_ranks import subject_failure
from harness.verification.reference_results import ReferenceResults
from reference.building import raise_interrupt
from reference.checkpoints import CheckpointError
from reports.records import AtlasVerdict

FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n    (?P<code>.+)$', re.MULTILINE)
LONGEST = 500
"""Characters of a reason."""
LIBRARIES = ("transformers", "huggingface_hub", "vllm")
"""Whose ``raise`` is a refusal on purpose; the second one checks the first one's configs."""

GROUPED_PRODUCTS = "integrations/moe.py"
"""Of transformers: all experts in one product of torch's, which takes no row that is not a multiple of 16 bytes."""
LOADED_AS: Mapping[str, Any] = {"quiet": True}
ONE_EXPERT_AT_A_TIME: Mapping[str, Any] = {**LOADED_AS, "experts_implementation": "eager"}
ONE_BY_ONE = "experts one at a time, for all in one product fail on one rank too."

OneRank = Callable[[], AbstractContextManager[Subject]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """As in ``AtlasRow``."""

    verdict: AtlasVerdict
    message: str = ""
    error_over_budget: float | None = None
    rank: int | None = None
    module: str | None = None
    sharded: float | None = None
    sharded_flops: float | None = None
    said: list[str] = field(default_factory=list)


class Ended(Judged):
    """A crash in which a rank died or hung by itself. One rank is this process: it must not do what ended others."""


def judge(results: ReferenceResults, subject: Subject, one_rank: OneRank, options: Mapping[str, Any] = LOADED_AS) -> Judged:
    """Load the checkpoint of ``results`` into the subject's ranks and hold its logits against the reference's.

    Args:
        results: of the row's checkpoint.
        subject: on the row's ranks.
        one_rank: gives one of this kind on one rank, for the length of a block.
        options: with which the checkpoint is loaded.

    Where cached decoding is off on one rank too and a prefill is not, prefills alone are compared; ``results`` keeps to them.
    Where torch takes experts of this width in no product of all of them, they are computed one at a time.
    """
    refused = _loaded(results, subject, options)
    if refused is not None and (isinstance(refused, Ended) or subject.tp_size == 1):
        return refused
    if refused is not None:
        with one_rank() as one:
            alone = _loaded(results, one, options)
        return refused if alone is None else _not_compared(refused, alone)
    try:
        results.simulated_logits, results.baseline_logits  # noqa: B018 - computed once, for all rows of this checkpoint
    except Exception as error:  # of any kind: the library raises what it likes
        return Judged(verdict="not compared", message=f"the reference can't compute it: {reason(error)}")
    judged = _compared(results, subject)
    if subject.tp_size == 1:  # there is nothing else to hold it against
        return judged if judged.verdict not in ("right", "wrong") else _with_weights(judged, results, subject, one_rank, options)
    if judged.verdict != "right" and not isinstance(judged, Ended):
        with one_rank() as one:
            alone = _loaded(results, one, options) or _compared(results, one)
        if alone.verdict == "wrong" and not _is_prefill(results.schedule):
            results.schedule = prefills(results.schedule)
            return judge(results, subject, one_rank, options)
        if GROUPED_PRODUCTS in alone.message and options is not ONE_EXPERT_AT_A_TIME:
            return judge(results, subject, one_rank, ONE_EXPERT_AT_A_TIME)
        if alone.verdict != "right":
            return _not_compared(judged, alone)
    if options is ONE_EXPERT_AT_A_TIME:
        judged = replace(judged, message=f"{ONE_BY_ONE} {judged.message}".strip())
    if _is_prefill(results.schedule):
        judged = replace(judged, message=f"prefills alone, for cached decoding is off on one rank too. {judged.message}".strip())
    return judged if judged.verdict not in ("right", "wrong") else _with_weights(judged, results, subject, one_rank, options)


def _with_weights(judged: Judged, results: ReferenceResults, subject: Subject, one_rank: OneRank,
                  options: Mapping[str, Any]) -> Judged:
    """The same, and wrong where a rank's weights are not the file's, though one rank alone has them right.

    Wrong weights are what is wrong first. And logits may be right for all that: of a tensor that is not where it says to be, what
    is saved is another model.
    """
    own = _weights(results, subject)
    if judged.sharded is None:
        judged = replace(judged, sharded=own.extra.get(SHARDED))
    if own.skipped is not None:
        return replace(judged, message=f"{judged.message} Weights are not compared: {own.skipped}".strip())
    if own.finding is None:
        return judged
    if subject.tp_size == 1:
        return replace(judged, verdict="wrong", rank=0, module=own.module,
                       message=f"{own.finding}{'; ' if judged.message else ''}{judged.message}")
    with one_rank() as one:
        alone = _weights(results, one) if _loaded(results, one, options) is None else own
    if alone.finding is not None:
        return replace(judged, message=f"{judged.message} Weights differ from the file on one rank too: {alone.finding}".strip())
    return replace(judged, verdict="wrong", rank=own.rank, module=own.module,
                   message=f"{own.finding}{'; ' if judged.message else ''}{judged.message}")


def _weights(results: ReferenceResults, subject: Subject) -> Outcome:
    try:
        return check_own(CheckContext(results=results, subject=subject, options={}, seed=results.seed))
    except NotShownError as error:
        return Outcome(cases=0, compared=0, skipped=str(error))
    except Exception as error:  # a layout that is none, or a name that the file does not have
        return Outcome(cases=0, compared=0, finding=reason(error))


def reason(error: Exception) -> str:
    """All that it says in one line: what matters often stands below the first one.

    Raises:
        KeyboardInterrupt: if one led to it.
    """
    raise_interrupt(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]


def prefills(schedule: Schedule) -> Schedule:
    """The same sequences, each whole in one step."""
    return replace(schedule, steps=tuple(((number, len(ids)),) for number, ids in enumerate(schedule.sequences)))


def _is_prefill(schedule: Schedule) -> bool:
    return schedule == prefills(schedule)


def _not_compared(judged: Judged, alone: Judged) -> Judged:
    happens = "is off" if alone.verdict == "wrong" else "fails"
    return replace(judged, verdict="not compared", error_over_budget=None, rank=None, module=None,
                   message=f"it {happens} on one rank too: {alone.message}")


def _loaded(results: ReferenceResults, subject: Subject, options: Mapping[str, Any], *, attempts: int = 2) -> Judged | None:
    """None; or what came of it instead."""
    try:
        subject.load(results.folder, dtype=results.dtype, options=options)
    except CheckpointError as error:  # what all ranks say alike
        if isinstance(error.__cause__, RankFailure):
            return _failed(subject_failure(error.__cause__), subject)
        return Judged(verdict="not compared", message=str(error))
    except SubjectFailure as failure:
        if attempts > 1 and any(error.kind == "stuck" and error.consequence for error in failure.failures.values()):
            # It may have been slower to refuse, on a busy machine.
            return _loaded(results, subject, options, attempts=attempts - 1)
        return _failed(failure, subject)
    return None


def _compared(results: ReferenceResults, subject: Subject) -> Judged:
    try:
        context = CheckContext(results=results, subject=subject, options={}, seed=results.seed)
        outcome = compare_computed(context, subject.logits(results.schedule))
        sharded, said = subject.sharded(), subject.said()
    except SubjectFailure as failure:
        return _failed(failure, subject)
    seen = Judged(verdict="right", error_over_budget=outcome.error_over_budget, said=said,
                  sharded=sharded.parameters if sharded else None, sharded_flops=sharded.flops if sharded else None)
    return seen if outcome.finding is None else replace(seen, verdict="wrong", message=outcome.finding, rank=outcome.rank,
                                                        module=outcome.module)


def _failed(failure: SubjectFailure, subject: Subject) -> Judged:
    """What a failure on the ranks is: a refusal if all of them raise alike, or else a crash."""
    causes = {rank: error for rank, error in failure.failures.items() if not error.consequence} or failure.failures
    if not causes:
        return Ended(verdict="crashed", message=str(failure).splitlines()[0])
    rank, first = next(iter(causes.items()))
    said = f"{first.summary}{_place(first.traceback)}"
    if any(error.kind != "raised" for error in failure.failures.values()):
        crash = Judged if all(error.kind == "raised" for error in causes.values()) else Ended
        return crash(verdict="crashed", rank=rank, message=f"rank {rank} {first.kind} in phase {first.phase!r}: {said}")
    if len(causes) < subject.tp_size:
        return Judged(verdict="crashed", rank=rank, message=f"of {subject.tp_size} ranks only {sorted(causes)} raise: {said}")
    return Judged(verdict="refused clearly" if _is_on_purpose(first) else "refused unclearly", message=said)


def _is_on_purpose(error: Any) -> bool:
    """Whether the library itself raised it, by a statement ``raise``; or by what pydantic calls for it, to check a config."""
    if error.summary.startswith("ValidationError: "):
        return True
    frames = list(FRAME.finditer(error.traceback))
    return bool(frames) and frames[-1]["code"].startswith("raise ") and any(
        f"/{library}/" in frames[-1]["file"] for library in LIBRARIES)


def _place(traceback: str) -> str:
    """The last line of a library's own code that it came from."""
    frames = [frame for frame in FRAME.finditer(traceback) if any(f"/{library}/" in frame["file"] for library in LIBRARIES)]
    if not frames:
        return ""
    file = frames[-1]["file"].partition("site-packages/")[2] or frames[-1]["file"]
    return f" (in {file}, {frames[-1]['function']}: {frames[-1]['code']})"

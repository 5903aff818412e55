"""What a check is, and how one is run: cases are drawn or replayed, run on every rank, and judged, a row a kind of case."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from harness.errors import one_line
from harness.subjects.base import CAPABILITIES, Subject, SubjectFailure
from harness.subjects.rank import Rank
from harness.verification.reference_results import ReferenceResults
from reference.building import raise_interrupt
from reference.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

ROUNDING_BOUND = {"bound": "rounding"}
"""For the ``extra`` of an outcome whose ``error_over_budget`` is one of a bound that right sums reach: 1 is no near miss then."""
TRACEBACK = "traceback"
"""In the ``extra`` of an outcome and of its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """One model on one subject, which has loaded it if the check needs that."""

    results: ReferenceResults
    subject: Subject
    options: Mapping[str, Any]
    """Sizes of the cache and of a step that the subject was loaded with."""
    seed: int
    kind: str | None = None
    """Only the part with this kind of case; None: all."""
    case: Mapping[str, Any] | None = None
    """Only this case of it, as an earlier finding's ``Outcome.case`` has it; None: draw as many as the check wants."""

    @property
    def dtype(self) -> str:
        return self.results.dtype

    @property
    def tp_size(self) -> int:
        return self.subject.tp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one check found in one kind of case, or in all of them (``together``)."""

    cases: int
    compared: int
    kind: str = ""
    finding: str | None = None
    """What is wrong; None if nothing is."""
    skipped: str | None = None
    """Why nothing was compared; None if something was."""
    error: str | None = None
    """What the check raised instead of answering, one line; the traceback stands in ``extra``."""
    error_over_budget: float | None = None
    rank: int | None = None
    module: str | None = None
    excused: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    case: Mapping[str, Any] = field(default_factory=dict)
    """Of a finding: what was drawn, as JSON values; enough for the check to run it alone again."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Of a finding: what was given, found and expected."""


class NotApplicableError(Exception):
    """Raised by a part that this model gives nothing to judge; says why."""


class Part(Protocol):
    """Some kinds of a check's cases."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """One row each; ``("",)`` for a check with one kind alone."""

    @property
    def needs(self) -> str | None:
        """A capability of the subject; None if every subject has what it takes."""

    def outcomes(self, context: CheckContext) -> Iterable[Outcome]:
        """One of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question that a subject is asked.

    parts        run in order; what rests on a part with a finding is not run
    needs_model  whether the subject must have loaded the model
    owns_ranks   whether it starts and ends ranks of its own
    """

    name: str
    question: str
    parts: tuple[Part, ...]
    needs_model: bool = True
    owns_ranks: bool = False

    def run(self, context: CheckContext) -> Iterator[Outcome]:
        """The outcome of each kind, as it is done. What a part raises is an outcome; those before it stay."""
        stopped = ""
        parts = [part for part in self.parts if context.kind is None or context.kind in part.kinds]
        if not parts:
            kinds = ", ".join(kind for part in self.parts for kind in part.kinds)
            yield Outcome(cases=0, compared=0, error=f"kind={context.kind!r} is none of check={self.name}: it has {kinds}")
        for part in parts:
            why = stopped or _not_applicable(part, context.subject)
            if why:
                yield from (Outcome(kind=kind, cases=0, compared=0, skipped=why) for kind in part.kinds)
                continue
            for outcome in _outcomes(part, context, self.name):
                yield outcome
                if outcome.finding is not None or outcome.error is not None:
                    stopped = f"not run after {'a finding' if outcome.finding else 'an error'} in {outcome.kind or self.name}"


def _not_applicable(part: Part, subject: Subject) -> str:
    if part.needs is None or part.needs in subject.capabilities:
        return ""
    return f"not applicable: subject={subject.name} does not declare {part.needs!r} ({CAPABILITIES[part.needs]})"


def _outcomes(part: Part, context: CheckContext, name: str) -> Iterator[Outcome]:
    kind = part.kinds[0] if len(part.kinds) == 1 else ""  # of all of them, where one job runs them
    try:
        for outcome in part.outcomes(context):
            yield _judged(outcome)
    except SubjectFailure as failure:
        yield Outcome(kind=kind, cases=1, compared=0, finding=str(failure), rank=min(failure.failures, default=None),
                      module=failure.module)
    except NotApplicableError as why:
        yield from (Outcome(kind=kind, cases=0, compared=0, skipped=f"not applicable: {why}") for kind in part.kinds)
    except CheckpointError as error:
        yield Outcome(kind=kind, cases=0, compared=0, error=str(error))
    except Exception as error:
        logger.exception("check %s raised at tp_size=%d", name, context.tp_size)
        yield replace(raised(error), kind=kind)


def _judged(outcome: Outcome) -> Outcome:
    if outcome.compared or any(why is not None for why in (outcome.finding, outcome.error, outcome.skipped)):
        return outcome
    why = f"kind={outcome.kind!r}: nothing was judged in cases={outcome.cases}, and what is not judged does not pass"
    return replace(outcome, error=why)


def raised(error: Exception) -> Outcome:
    """What becomes of an exception inside a check: nothing was found, and nothing has passed.

    Raises:
        KeyboardInterrupt: if one led to it.
    """
    raise_interrupt(error)
    return Outcome(cases=0, compared=0, error=one_line(error), extra={TRACEBACK: "".join(traceback.format_exception(error))})


def together(kinds: Sequence[Outcome]) -> Outcome:
    """Several kinds of case as one outcome: the first finding, or the first error, stands for all."""
    failing = [part for part in kinds if part.finding is not None]
    first = [*failing, *(part for part in kinds if part.error is not None),
             *(part for part in kinds if part.skipped is None), *kinds][0]
    errors = [part.error_over_budget for part in failing or kinds if part.error_over_budget is not None]
    excused = [(part.excused, part.compared) for part in kinds if part.excused is not None]
    return replace(
        first, kind=first.kind if first.finding is not None else "", cases=sum(part.cases for part in kinds),
        compared=sum(part.compared for part in kinds),
        error_over_budget=max(errors, default=None),
        excused=sum(share * count for share, count in excused) / max(1, sum(count for _, count in excused)) if excused else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A part that asks the subject as a whole and judges in the driver."""

    judge: Callable[[CheckContext], Outcome | None]
    """None: this model has no such case."""
    kind: str = ""
    needs: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,)

    def outcomes(self, context: CheckContext) -> Iterator[Outcome]:
        if (outcome := self.judge(context)) is not None:
            yield replace(outcome, kind=self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one rank saw of one case.

    error_over_budget   None where values must be exact
    problem             what is wrong; None if nothing is
    module              where
    digests             of what must be equal on all ranks, in order
    tensors             of a problem: what was given, found and expected
    """

    compared: int = 0
    error_over_budget: float | None = None
    problem: str | None = None
    module: str | None = None
    digests: Sequence[bytes] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Case(Protocol):
    """What is drawn: a frozen dataclass of JSON values, tuples and such dataclasses. ``str`` of it describes it."""

    @property
    def kind(self) -> str:
        """One of its part's kinds."""

    @property
    def size(self) -> int:
        """How large it is: of several failing cases the smallest is told."""

    @property
    def module(self) -> str:
        """What it is about, where an answer does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """A part that draws cases and runs each of them on every rank.

    case    their class
    draw    as many as the check wants
    run     inside a rank: what it saw of a case, nothing if the case is not for this rank. Importable
    extra   for the row of every kind
    """

    case: type[Any]
    draw: Callable[[CheckContext], Sequence[Any]]
    run: Callable[[Rank, Any], Sequence[Answer]]
    kinds: tuple[str, ...] = ("",)
    needs: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def outcomes(self, context: CheckContext) -> Iterator[Outcome]:
        cases = self.draw(context) if context.case is None else [from_json(self.case, context.case)]
        by_rank: list[list[Sequence[Answer]]] = context.subject.run(run_cases, self.run, tuple(cases))
        if len(by_rank) != context.tp_size:
            raise ValueError(f"subject={context.subject.name}: {len(by_rank)} ranks answered, tp_size={context.tp_size}")
        seen = list(zip(cases, zip(*by_rank, strict=True), strict=True))
        for kind in self.kinds if context.case is None else [cases[0].kind]:
            yield self._judge(kind, [(case, answers) for case, answers in seen if case.kind == kind])

    def _judge(self, kind: str, seen: Sequence[tuple[Any, Sequence[Sequence[Answer]]]]) -> Outcome:
        """One kind of case: its cases, and what every rank saw of each."""
        everything = [answer for _, by_rank in seen for answers in by_rank for answer in answers]
        judged = sum(any(answer.compared for answers in by_rank for answer in answers) for _, by_rank in seen)
        errors = [answer.error_over_budget for answer in everything if answer.error_over_budget is not None]
        extra = dict(self.extra)
        if modules := sorted({answer.module for answer in everything if answer.module}):
            extra["modules"] = modules
        outcome = Outcome(kind=kind, cases=judged, compared=sum(answer.compared for answer in everything), extra=extra,
                          error_over_budget=max(errors, default=None))
        failing = [(case, blamed) for case, by_rank in seen if (blamed := _blamed(by_rank)) is not None]
        if not failing:
            return outcome
        case, (rank, answer) = min(failing, key=lambda pair: pair[0].size)
        return replace(outcome, rank=rank, module=answer.module or case.module, case=asdict(case), tensors=answer.tensors,
                       error_over_budget=answer.error_over_budget, extra={**extra, "smallest_case": str(case)},
                       finding=f"{len(failing)} of {len(seen)} cases fail, the smallest {case}: rank {rank}: {answer.problem}")


def _blamed(by_rank: Sequence[Sequence[Answer]]) -> tuple[int, Answer] | None:
    """The first rank with something wrong. Ranks that differ come last: the one that is wrong by itself is to blame."""
    for rank, answers in enumerate(by_rank):
        for answer in answers:
            if answer.problem is not None:
                return rank, answer
    for rank, answers in enumerate(by_rank):
        for answer, first in zip(answers, by_rank[0], strict=False):
            if list(answer.digests) != list(first.digests):
                pairs = zip(answer.digests, first.digests, strict=False)
                step = next((step for step, (own, other) in enumerate(pairs) if own != other),
                            min(len(answer.digests), len(first.digests)))
                where = f", first in step {step}" if max(len(answer.digests), len(first.digests)) > 1 else ""
                return rank, replace(answer, problem=f"other bits than on rank 0{where}")
    return None


def run_cases(rank: Rank, run: Callable[[Rank, Any], Sequence[Answer]], cases: Sequence[Any]) -> list[Sequence[Answer]]:
    """Job: every case on this rank."""
    return [run(rank, case) for case in cases]


def from_json(case: type[Any], values: Mapping[str, Any]) -> Any:
    """A case from JSON values: lists become tuples. What is more than that is its ``__post_init__``'s."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    try:
        return case(**{name: tuples(value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"the case has {', '.join(values)}, which is no {case.__name__}: another version saved it, run the "
                         "check anew") from error

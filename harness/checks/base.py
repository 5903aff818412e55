"""What a check is given and what it gives back."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from engine.ranks.ranks import Ranks
from harness.errors import one_line
from harness.verification.truth import Truth

PRELOAD = ("harness.checks",)
"""For ``Ranks``: what every rank needs, and what takes seconds to import."""
ROUNDING_BOUND = {"bound": "rounding"}
"""For the ``extra`` of an outcome whose ``error_over_budget`` is one of a bound that right sums reach: 1 is no near miss then."""
TRACEBACK = "traceback"
"""In the ``extra`` of an outcome and of its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """One model on one set of live ranks. The subject is loaded on them."""

    truth: Truth
    ranks: Ranks
    subject: str
    options: dict[str, Any]
    """Engine options that the subject was loaded with."""
    seed: int
    case: dict[str, Any] | None = None
    """Only this case, as an earlier finding's ``Outcome.case`` has it; None: draw as many as the check wants."""

    @property
    def dtype(self) -> str:
        return self.truth.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one check found on one layout."""

    cases: int
    compared: int
    kind: str = ""
    """Of a part of ``kinds``: which kind of case it is about."""
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
    extra: dict[str, Any] = field(default_factory=dict)
    case: dict[str, Any] = field(default_factory=dict)
    """Of a finding: what was drawn, as JSON values; enough for the check to run it alone again."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of a finding: what was given, found and expected."""
    kinds: tuple[Outcome, ...] = ()
    """What ``together`` was made of: each is a row of the report."""


Check = Callable[[CheckContext], Outcome]


def together(parts: Sequence[Outcome], *, told: Outcome | None = None) -> Outcome:
    """Several kinds of case as one outcome. A kind in which nothing was judged has not passed: it is an error.

    Args:
        told: the part whose finding stands for all; None: the first that has one.
    """
    kinds = tuple(_judged(part) for part in parts)
    failing = [part for part in kinds if part.finding is not None]
    broken = [part for part in kinds if part.error is not None]
    first = told or [*failing, *broken, *kinds][0]
    errors = [part.error_over_budget for part in failing or kinds if part.error_over_budget is not None]
    excused = [(part.excused, part.compared) for part in kinds if part.excused is not None]
    return replace(
        first, kind="", kinds=kinds, cases=sum(part.cases for part in kinds), compared=sum(part.compared for part in kinds),
        skipped=first.skipped if all(part.skipped is not None for part in kinds) else None,
        error_over_budget=max(errors, default=None),
        excused=sum(share * count for share, count in excused) / max(1, sum(count for _, count in excused)) if excused else None)


def _judged(part: Outcome) -> Outcome:
    if part.compared or part.finding is not None or part.error is not None or part.skipped is not None:
        return part
    why = f"kind={part.kind!r}: nothing was judged in cases={part.cases}, and what is not judged does not pass"
    return replace(part, error=why)


def raised(error: Exception) -> Outcome:
    """What becomes of an exception inside a check: nothing was found, and nothing has passed."""
    return Outcome(cases=0, compared=0, error=one_line(error), extra={TRACEBACK: "".join(traceback.format_exception(error))})

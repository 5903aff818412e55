"""What a check is given and what it gives back."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.parallel.ranks import Ranks
from harness.errors import one_line
from harness.truth import Truth

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


Check = Callable[[CheckContext], Outcome]


def raised(error: Exception) -> Outcome:
    """What becomes of an exception inside a check: nothing was found, and nothing has passed."""
    return Outcome(cases=0, compared=0, error=one_line(error), extra={TRACEBACK: "".join(traceback.format_exception(error))})

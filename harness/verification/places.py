"""What a search for the first wrong module finds: a place, and how much of the model was looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.verification.budgets import SEARCH_MARGIN
from harness.verification.classify import Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The first module whose output is over budget, on which rank, from which token on, by how much, and what it is instead.

    Attributes:
        error_over_budget: Of the worst token.
        effect: What arithmetic tells; None if nothing.
    """

    module: str
    rank: int
    token: int
    error_over_budget: float
    effect: Effect | None = None

    def __str__(self) -> str:
        well = "well " if self.error_over_budget > SEARCH_MARGIN else ""
        return (f"first {well}over budget: {self.module} on rank {self.rank}, token {self.token}, "
                f"{self.error_over_budget:.3g} of its budget" + (f": {self.effect}" if self.effect else ""))


@dataclass(frozen=True, slots=True)
class Excess:
    """How far over budget a tensor is on the rank where it is worst, and from which token on."""

    error_over_budget: float
    rank: int
    token: int

    @property
    def is_clear(self) -> bool:
        """Whether a search stops at it."""
        return self.error_over_budget > SEARCH_MARGIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How a search went.

    Attributes:
        place: What is to blame; None if nothing that was compared is over budget.
        compared: Modules whose outputs were held against their budgets.
        not_comparable: Modules whose outputs could not be, with the reason: they may be wrong.
    """

    place: Place | None
    compared: int = 0
    not_comparable: Mapping[str, str] = field(default_factory=dict)

    @property
    def left_out(self) -> str:
        """In words, what was not compared; empty if nothing."""
        if not self.not_comparable:
            return ""
        reason, number = Counter(self.not_comparable.values()).most_common(1)[0]
        name = next(name for name, why in self.not_comparable.items() if why == reason)
        total = len(self.not_comparable) + self.compared
        return f"{len(self.not_comparable)} of {total} modules could not be compared, {number} like {name}: {reason}"

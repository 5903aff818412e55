"""What one clean case shows: how far is correct code off, and how far is its baseline?

Errors are in roundoffs of their scale, as ``harness.budgets.measure`` gives them. All kinds of case:

* ``layers``: one row- or column-parallel layer on real numbers, one rank's part of the output;
* ``logits``: a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from harness.budgets import FEWEST_FOR_TYPICAL, Statistic, measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A candidate's error and the baseline's for the same thing."""

    candidate: float
    baseline: float

    @property
    def ratio(self) -> float:
        """How many times as far off as its baseline the candidate is; 0 if neither is."""
        return self.candidate / self.baseline if self.baseline else 0.0 if not self.candidate else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One case. By statistic those points that no other one of it outdoes: by a larger error and a smaller baseline's.

    Whatever k and c are, it is one of them that takes the largest part of its budget.
    """

    kind: str
    dtype: str
    tp_size: int
    points: Mapping[Statistic, tuple[Point, ...]]
    """The largest ratio first."""


def measured(kind: str, dtype: str, tp_size: int, candidate: Tensor, baseline: Tensor, exact: Tensor,
             scale: Tensor | None = None, float32: Tensor | None = None) -> Sample:
    """The errors of ``[T, F]`` tensors; the arguments are those of ``harness.budgets.computation``."""
    sizes = measure(candidate, baseline, exact, dtype, scale, float32)
    points: dict[Statistic, tuple[Point, ...]] = {}
    for statistic, (errors, expected) in sizes.items():
        if statistic == "typical" and exact.numel() < FEWEST_FOR_TYPICAL:
            continue
        pairs = zip(errors.flatten().tolist(), expected.flatten().tolist(), strict=True)
        points[statistic] = front(Point(candidate=error, baseline=own) for error, own in pairs)
    return Sample(kind=kind, dtype=dtype, tp_size=tp_size, points=points)


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other one outdoes, the largest ratio first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.baseline, -point.candidate)):
        if not kept or point.candidate > kept[-1].candidate:
            kept.append(point)
    return tuple(sorted(kept, key=lambda point: -point.ratio))

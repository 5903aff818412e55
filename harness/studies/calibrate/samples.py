"""What the logits of one clean model show: how far is correct code off, and how far is its baseline?

Errors are in roundoffs of their scale, as ``harness.verification.budgets.measure`` gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from harness.verification.budgets import FEWEST_FOR_TYPICAL, Statistic, measure


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

    orders: str
    """Of its sums: ``ORDERS`` in ``harness.studies.calibrate.collect``."""
    dtype: str
    tp_size: int
    points: Mapping[Statistic, tuple[Point, ...]]
    """The largest ratio first."""


def measured(orders: str, dtype: str, tp_size: int, candidate: Tensor, baseline: Tensor, exact: Tensor,
             simulated: Sequence[Tensor] = ()) -> Sample:
    """The errors of ``[T, F]`` tensors; the arguments are those of ``harness.verification.budgets.computation``."""
    sizes = measure(candidate, baseline, exact, dtype, simulated)
    points: dict[Statistic, tuple[Point, ...]] = {}
    for statistic, (errors, expected) in sizes.items():
        if statistic == "typical" and exact.numel() < FEWEST_FOR_TYPICAL:
            continue
        pairs = zip(errors.flatten().tolist(), expected.flatten().tolist(), strict=True)
        points[statistic] = front(Point(candidate=error, baseline=own) for error, own in pairs)
    return Sample(orders=orders, dtype=dtype, tp_size=tp_size, points=points)


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other one outdoes, the largest ratio first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.baseline, -point.candidate)):
        if not kept or point.candidate > kept[-1].candidate:
            kept.append(point)
    return tuple(sorted(kept, key=lambda point: -point.ratio))

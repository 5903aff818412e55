"""What the logits of clean models show, and from such samples of correct code to k and c.

Errors are in roundoffs of their scale, as ``harness.verification.budgets.measure`` gives them. An error is within its budget
``max(k * the baseline's error, c)``. For any k there is a smallest c with which the budgets of all samples leave ``MARGIN`` to
spare. The pair to take is the one with the narrowest budgets over all samples, by their geometric mean: what a budget is wider
than it need be, a fault may hide in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from harness.verification.budgets import FEWEST_FOR_TYPICAL, Constants, Statistic, measure

MARGIN = 2.0
"""The worst sample's budget is so many times its error."""
STEPS = 4
"""Constants are whole numbers of this part of 1."""
LARGEST_K = 8.0


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
    """Of its sums: ``ORDERS`` in ``harness.studies.calibrate.draws``."""
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


Needs = tuple[float, float]


def points_of(samples: Iterable[Sample], statistic: Statistic) -> list[Point]:
    """All points of the samples that have this statistic."""
    return [point for sample in samples for point in sample.points.get(statistic, ())]


def fit(samples: Sequence[Sample], statistic: Statistic) -> Constants:
    """The pair with the narrowest budgets. ValueError without a sample."""
    points = points_of(samples, statistic)
    if not points:
        raise ValueError(f"statistic={statistic!r} has no samples to be fitted on")
    group = _as_arrays(points)
    choices = [1 + step / STEPS for step in range(int((LARGEST_K - 1) * STEPS) + 1)]
    pairs = [Constants(k=k, c=_upwards(_floor(group, k))) for k in choices]
    return min(pairs, key=lambda pair: (_width(group, pair), pair.k))


def needs(points: Sequence[Point], constants: Constants) -> Needs:
    """(k, c): what these points ask of either constant, to leave the margin, the other one being as it is."""
    k = max((MARGIN * point.ratio for point in points if MARGIN * point.candidate > constants.c), default=0.0)
    return k, _floor(_as_arrays(points), constants.k)


def worst(points: Iterable[Point], constants: Constants) -> float:
    """The largest fraction of its budget that a point takes."""
    return max((over_budget(point, constants) for point in points), default=0.0)


def over_budget(point: Point, constants: Constants) -> float:
    """The candidate's error as a fraction of its budget."""
    if not point.candidate:
        return 0.0
    budget = max(constants.k * point.baseline, constants.c)
    return point.candidate / budget if budget else math.inf


_Arrays = tuple[NDArray[np.float64], NDArray[np.float64]]


def _as_arrays(points: Sequence[Point]) -> _Arrays:
    return np.array([point.candidate for point in points]), np.array([point.baseline for point in points])


def _floor(group: _Arrays, k: float) -> float:
    """The smallest c with which k leaves the margin: the largest error for which the baseline alone does not."""
    candidate, baseline = group
    short = MARGIN * candidate > k * baseline
    return float(MARGIN * candidate[short].max()) if short.any() else 0.0


def _width(group: _Arrays, pair: Constants) -> float:
    """Logarithm of the geometric mean of the budgets."""
    budgets = np.maximum(pair.k * group[1], pair.c)
    return float(np.log(np.maximum(budgets, np.finfo(np.float64).tiny)).mean())


def _upwards(value: float) -> float:
    return math.ceil(value * STEPS) / STEPS

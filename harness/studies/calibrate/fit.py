"""From samples of correct code to k and c.

An error is within its budget ``max(k * the baseline's error, c)``. For any k there is a smallest c with which the budgets of
all samples leave ``MARGIN`` to spare. The pair to take is the one with the narrowest budgets over all samples, by their
geometric mean: what a budget is wider than it need be, a fault may hide in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from harness.studies.calibrate.samples import Point, Sample
from harness.verification.budgets import Constants, Statistic

MARGIN = 2.0
"""The worst sample's budget is so many times its error."""
STEPS = 4
"""Constants are whole numbers of this part of 1."""
LARGEST_K = 8.0


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

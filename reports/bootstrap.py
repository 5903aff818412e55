"""How sure one can be that one set of timings is faster than another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FEWEST_SAMPLES = 4  # a side with fewer says nothing about its own spread

# A bound of an interval is settled by the resamples beyond it: this many.
_RESAMPLES_BEYOND = 25
_MOST_RESAMPLES = 500_000


def interval_of_gain(better: Sequence[float], worse: Sequence[float], *, tail: float, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of ``median(better) / median(worse)``: ``tail`` of probability beyond either end.

    Percentile bootstrap (Efron 1979), each side resampled on its own. Samples must be positive. The same
    samples and seed give the same interval.
    """
    count = min(max(20_000, math.ceil(_RESAMPLES_BEYOND / tail)), _MOST_RESAMPLES)
    above = _resampled_medians(better, count, seed, 0)
    below = _resampled_medians(worse, count, seed, 1)
    low, high = np.quantile(above / below, [tail, 1 - tail])
    return float(low), float(high)


def interval_of_paired_gain(better: Sequence[float], worse: Sequence[float], *, tail: float) -> tuple[float, float, float] | None:
    """Interval of the median of ``better[i] / worse[i]``, and that median: (low, median, high). None if there are too few pairs.

    Between two of the sorted ratios, as many from either end as a fair coin falls on one side with at most ``tail`` of
    probability (the sign test turned round; Thompson 1936). Nothing is assumed about the noise, but that it treats both
    sides of a pair alike: what slows a machine down for a while slows both, and the ratio does not see it.
    """
    ratios = np.sort(np.asarray(better, dtype=np.float64) / np.asarray(worse, dtype=np.float64))
    count = len(ratios)
    chance, rank = 0.0, 0
    while rank < count and (chance := chance + math.comb(count, rank) / 2**count) <= tail:
        rank += 1
    if rank == 0:
        return None
    return float(ratios[rank - 1]), float(np.median(ratios)), float(ratios[count - rank])


def can_be_sure(num_a: int, num_b: int, *, tail: float) -> bool:
    """Whether samples of these sizes can show a difference with at most ``tail`` of a chance of being wrong.

    If both sides came from one distribution, all of one would lie above all of the other once in
    ``C(num_a + num_b, num_a)`` times. A bootstrap never looks beyond its samples, so with a handful it would
    call that certain; this is the guard.
    """
    return min(num_a, num_b) >= FEWEST_SAMPLES and math.comb(num_a + num_b, num_a) * tail >= 1


def _resampled_medians(samples: Sequence[float], count: int, seed: int, side: int) -> npt.NDArray[np.float64]:
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    lower, upper = _median_ranks(len(ordered), count, seed, side)
    return (ordered[lower] + ordered[upper]) / 2


@lru_cache(maxsize=8)
def _median_ranks(num_samples: int, count: int, seed: int, side: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Where the medians of ``count`` resamples sit among the sorted samples: two ranks, equal for odd sizes.

    The r-th smallest of n uniform draws has a Beta(r, n + 1 - r) distribution, so the ranks can be drawn
    directly, without the n draws; given the (r+1)-th, the r-th is the largest of r uniform draws below it.
    """
    rng = np.random.default_rng([seed, side, num_samples])
    middle = num_samples // 2 + 1
    upper = rng.beta(middle, num_samples + 1 - middle, count)
    lower = upper if num_samples % 2 else upper * rng.random(count) ** (1 / (middle - 1))
    return (lower * num_samples).astype(np.int32), (upper * num_samples).astype(np.int32)

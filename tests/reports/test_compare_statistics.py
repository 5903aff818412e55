"""Does `compare` cry wolf, and does it see the wolf?

The timings are simulated: 5 % noise, and one in twenty takes twice as long.
"""

import math

import numpy as np
import pytest

from reports.bootstrap import can_be_sure, interval_of_gain, interval_of_paired_gain
from reports.compare import compare
from reports.records import BenchRow, Report
from tests.reports.builders import a_bench, a_report

NUM_COMPARISONS = 100
NUM_ROWS = 12
SLOWED = 3  # the row that is slowed down on purpose


def timings(seed: int, rounds: int, *, slow_down: float = 1.0) -> Report:
    rng = np.random.default_rng(seed)
    noisy = 10 * np.exp(rng.normal(0, 0.05, (NUM_ROWS, rounds)))
    noisy[rng.random(noisy.shape) < 0.05] *= 2
    noisy[SLOWED] *= slow_down
    return a_report(*(a_bench(str(i), samples={"step_ms": row.tolist()}) for i, row in enumerate(noisy)))


def test_the_same_code_timed_twice_is_called_slower_in_two_comparisons_of_a_hundred_at_most() -> None:
    verdicts = [compare(timings(seed, 15), timings(seed + 1000, 15)).counts for seed in range(NUM_COMPARISONS)]
    assert sum(counts["slower"] > 0 for counts in verdicts) <= 2
    assert sum(counts["faster"] > 0 for counts in verdicts) <= 2


def test_each_row_judged_as_if_it_were_alone_would_cry_wolf() -> None:
    # The control of the test above: without allowing for twelve rows and for what is too small to matter,
    # the same timings raise false alarms.
    def rows(seed: int) -> list[BenchRow]:
        return timings(seed, 15).benches

    alarms = 0
    for seed in range(NUM_COMPARISONS // 4):
        alone = [
            compare(a_report(old), a_report(new), confidence=0.9, smallest_effect=1e-6).counts
            for old, new in zip(rows(seed), rows(seed + 1000), strict=True)
        ]
        alarms += any(counts["slower"] for counts in alone)
    assert alarms > 5


def test_30_rounds_a_side_show_a_slow_down_of_a_tenth_in_95_of_a_hundred() -> None:
    # Over 2,000 comparisons: 84 % at 20 rounds, 91 % at 25, 97.8 % at 30; so this is no luck of the seeds.
    seen = 0
    for seed in range(NUM_COMPARISONS):
        changes = compare(timings(seed, 30), timings(seed + 1000, 30, slow_down=1.1)).speeds
        seen += changes[SLOWED].verdict == "slower"
        assert all(change.verdict != "slower" for change in changes if change.case != str(SLOWED))
    assert seen >= 95


def test_a_bootstrap_done_the_slow_way_gives_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    for num_better, num_worse in ((9, 12), (15, 15), (20, 7)):
        better, worse = rng.lognormal(0, 0.1, num_better), rng.lognormal(0, 0.1, num_worse)
        medians = [np.median(side[rng.integers(0, len(side), (40_000, len(side)))], axis=1) for side in (better, worse)]
        expected = np.quantile(medians[0] / medians[1], [0.025, 0.975])
        assert interval_of_gain(better.tolist(), worse.tolist(), tail=0.025) == pytest.approx(expected, rel=0.005)


def test_an_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        low, high = interval_of_gain(rng.lognormal(0.2, 0.1, 15).tolist(), rng.lognormal(0, 0.1, 15).tolist(), tail=0.05)
        covered += low <= math.exp(0.2) <= high
    assert 0.86 <= covered / 400 <= 0.97


def test_how_many_rounds_could_ever_be_sure() -> None:
    assert not can_be_sure(3, 1000, tail=0.05)
    assert can_be_sure(4, 4, tail=1 / 70)
    assert not can_be_sure(4, 4, tail=1 / 71)


def in_turns(seed: int, rounds: int, *, slow_down: float = 1.0) -> tuple[Report, Report]:
    """Both sides on a machine that now and then is slow for a while: half of the pairs take up to three times as long."""
    rng = np.random.default_rng(seed)
    machine = np.exp(rng.uniform(0, 1.1, (NUM_ROWS, rounds)) * (rng.random((NUM_ROWS, rounds)) < 0.5))
    sides = []
    for factor in (1.0, slow_down):
        noisy = 10 * machine * np.exp(rng.normal(0, 0.03, machine.shape))
        noisy[rng.random(noisy.shape) < 0.05] *= 2
        noisy[SLOWED] *= factor
        sides.append(a_report(*(a_bench(str(i), samples={"step_ms": row.tolist()}) for i, row in enumerate(noisy))))
    return sides[0], sides[1]


def test_rounds_that_took_turns_show_a_slow_down_on_a_machine_that_is_slow_for_a_while() -> None:
    seen = {True: 0, False: 0}
    for seed in range(NUM_COMPARISONS):
        sides = in_turns(seed, 30, slow_down=1.1)
        for pairs in seen:
            changes = compare(*sides, in_turns=pairs).speeds
            seen[pairs] += changes[SLOWED].verdict == "slower"
            assert all(change.verdict != "slower" for change in changes if change.case != str(SLOWED))
    assert seen[True] >= 95
    assert seen[False] < 20  # the control: each side's own spread hides it


def test_rounds_that_took_turns_raise_no_false_alarms() -> None:
    verdicts = [compare(*in_turns(seed, 30), in_turns=True).counts for seed in range(NUM_COMPARISONS)]
    assert sum(counts["slower"] > 0 for counts in verdicts) <= 2
    assert sum(counts["faster"] > 0 for counts in verdicts) <= 2


def test_an_interval_of_pairs_covers_the_true_ratio_at_least_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        better, worse = rng.lognormal(0.2, 0.3, 15), rng.lognormal(0, 0.3, 15)
        interval = interval_of_paired_gain(better.tolist(), worse.tolist(), tail=0.05)
        assert interval is not None
        covered += interval[0] <= math.exp(0.2) <= interval[2]
    assert 0.9 <= covered / 400 <= 0.99


def test_pairs_need_to_be_many_before_they_tell_anything() -> None:
    # Five of five on one side: once in 32 times by chance.
    assert interval_of_paired_gain([2.0] * 5, [1.0] * 5, tail=1 / 33) is None
    assert interval_of_paired_gain([2.0] * 5, [1.0] * 5, tail=1 / 32) == (2.0, 2.0, 2.0)
    assert interval_of_paired_gain([], [], tail=0.05) is None
    # Then the spread of each side decides, as without pairs.
    few = [a_report(a_bench(samples={"step_ms": [level] * 6})) for level in (1.0, 2.0)]
    assert compare(*few, in_turns=True).speeds[0].verdict == "slower"

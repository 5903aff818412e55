"""The fit finds the constants that are in the data; the judge counts red runs; power tells large errors from tiny ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.ranks.ranks import RankContext, Ranks
from harness.strategies import random_config
from harness.studies.calibrate import judge as judge_module
from harness.studies.calibrate.draws import OPTIONS, Pools, drawn_models, sample_models, sizes_alone
from harness.studies.calibrate.draws import ORDERS as SAMPLED_ORDERS
from harness.studies.calibrate.draws import TP_SIZES as FITTED_TP_SIZES
from harness.studies.calibrate.fit import MARGIN, Point, Sample, fit, front, measured, needs, over_budget, worst
from harness.studies.calibrate.jobs import ORDERS, Spoiled, SpoilingGroup, arrange, load_model, ring_sum
from harness.studies.calibrate.judge import AS_IT_IS, DRAWN, TP_SIZES, context_of, judge_models, judged, loaded
from harness.studies.calibrate.power import (
    Threshold,
    ladder,
    power_of_drawn,
    power_of_logits,
    power_rows,
    seen_in,
    smallest_seen,
    sums_of,
)
from harness.studies.calibrate.report import cloud, error_rows, judged_rows, quantiles
from harness.verification.budgets import UNIT_ROUNDOFF, Constants, Statistic
from harness.verification.reference_results import ReferenceResults
from reports.calibration import alarms_table


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    with Pools() as pools:
        yield pools


@pytest.fixture(scope="module")
def results() -> Iterator[ReferenceResults]:
    yield from drawn_models(random.Random(2), "judge", 1, ("float32",))


def sample(*points: tuple[float, float], statistic: Statistic = "row") -> Sample:
    """Of (candidate, baseline) each."""
    return Sample(orders="drawn", dtype="bfloat16", tp_size=2,
                  points={statistic: front(Point(candidate=candidate, baseline=baseline) for candidate, baseline in points)})


# Fit


def test_a_fit_finds_the_constants_that_samples_were_made_with() -> None:
    """Twice as far off as the baseline; where the baseline is lucky, off by one roundoff."""
    draw = random.Random(0)
    baselines = [2.0 ** draw.uniform(-4, 6) for _ in range(500)]
    samples = [sample((max(2 * baseline, 1.0), baseline)) for baseline in (0.5, *baselines)]
    assert fit(samples, "row") == Constants(k=2 * MARGIN, c=1.0 * MARGIN)


def test_a_fit_leaves_the_margin_above_every_sample() -> None:
    draw = random.Random(1)
    samples = [sample((2 ** draw.gauss(0, 2), 2 ** draw.gauss(0, 2))) for _ in range(300)]
    points = [point for each in samples for point in each.points["row"]]
    fitted = fit(samples, "row")
    assert worst(points, fitted) <= 1 / MARGIN
    narrower = Constants(k=fitted.k, c=fitted.c - 0.5)
    assert worst(points, narrower) > 1 / MARGIN


def test_a_fit_of_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="statistic='typical' has no samples"):
        fit([sample((1.0, 1.0))], "typical")


def test_what_a_group_needs_is_told_for_each_constant() -> None:
    points = [Point(candidate=8.0, baseline=4.0), Point(candidate=2.0, baseline=0.25)]
    assert needs(points, Constants(k=2 * MARGIN, c=2 * MARGIN)) == (MARGIN * 2, MARGIN * 2)
    assert needs(points, Constants(k=8 * MARGIN, c=1.5 * MARGIN)) == (MARGIN * 8, 0.0)


def test_only_points_that_no_other_outdoes_are_kept() -> None:
    points = [Point(candidate=c, baseline=b) for c, b in ((1.0, 1.0), (2.0, 1.0), (3.0, 2.0), (2.5, 2.5), (9.0, 5.0))]
    kept = front(points)
    assert {(point.candidate, point.baseline) for point in kept} == {(2.0, 1.0), (3.0, 2.0), (9.0, 5.0)}
    for constants in (Constants(k=k, c=c) for k in (1.0, 2.0, 5.0) for c in (0.5, 2.0, 4.0)):
        assert worst(kept, constants) == worst(points, constants)


def test_a_lucky_baseline_is_a_ratio_without_end() -> None:
    assert Point(candidate=1.0, baseline=0.0).ratio == math.inf
    assert Point(candidate=0.0, baseline=0.0).ratio == 0.0
    assert over_budget(Point(candidate=1.0, baseline=0.0), Constants(k=3.0, c=2.0)) == 0.5
    row = error_rows([sample((1.0, 0.0)), sample((1.0, 0.5))])[0]
    assert row.lucky == 1
    assert row.ratio["1"] == 2.0


def test_a_sample_measures_in_roundoffs_of_the_scale() -> None:
    exact, u = torch.full((16, 8), 2.0, dtype=torch.float64), UNIT_ROUNDOFF["float32"]
    found = measured("drawn", "float32", 2, exact * (1 + 3 * u), exact * (1 + u), exact)
    for statistic, reach in (("typical", 1.0), ("row", 1.0), ("element", math.sqrt(2 * math.log(8)))):
        (point,) = found.points[statistic]
        torch.testing.assert_close(torch.tensor((point.candidate, point.baseline)), torch.tensor((3.0, 1.0)) / reach, rtol=1e-6,
                                   atol=0)


def test_distributions_are_quantiles_and_counts() -> None:
    assert quantiles([]) == {}
    assert quantiles([4.0, 1.0, 2.0, 3.0, 5.0])["0.5"] == 3.0
    assert quantiles([4.0, 1.0])["1"] == 4.0
    points = [Point(candidate=2.0, baseline=1.0)] * 3 + [Point(candidate=0.0, baseline=0.5)]
    assert cloud(points) == [[-4, -32, 1], [0, 4, 3]]


# Seeds


def test_what_is_judged_has_other_seeds_than_what_is_fitted() -> None:
    fitted, judged_on = ([model.seed for model in drawn_models(random.Random(0), purpose, 3, ("float32",))]
                         for purpose in ("fit", "judge"))
    assert all(seed % 2 == 0 for seed in fitted)
    assert all(seed % 2 == 1 for seed in judged_on)


def test_the_same_model_is_off_by_other_numbers_in_drawn_orders(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.studies.calibrate.draws.TP_SIZES", (2,))
    usual, drawn = (next(sample_models(pools, random.Random(7), "float32", orders, 1)) for orders in SAMPLED_ORDERS)
    assert (usual.orders, drawn.orders) == SAMPLED_ORDERS
    assert usual.dtype == drawn.dtype == "float32"
    assert usual.points["row"] != drawn.points["row"]


# Judge


@pytest.mark.parametrize("setting", ["as it is", DRAWN])
def test_the_judge_finds_nothing_in_clean_code(setting: str, pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "TP_SIZES", (2,))
    monkeypatch.setattr(judge_module, "JUDGED", ("collectives", "weights", "layers", "logits"))
    monkeypatch.setattr(judge_module, "LAYERS_RUNS", 2)
    verdicts = list(judge_models(pools, random.Random(3), setting, "float32", 1))
    assert [verdict.check for verdict in verdicts] == ["collectives", "weights", "layers", "layers", "logits"]
    assert all(verdict.compared > 0 for verdict in verdicts)
    assert [verdict.alarm for verdict in verdicts] == [None] * 5
    rows = {row.check: row for row in judged_rows(verdicts)}
    assert {row.verdict for row in rows.values()} == {"pass"}
    assert rows["layers"].extra == {"runs": 2, "false_alarms": 0}
    assert rows["layers"].cases > 2 * 50, "a run has all the cases that the check draws"
    assert rows["layers"].model == setting


@pytest.mark.multirank
def test_ranks_that_are_processes_are_judged_in_the_numbers_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "JUDGED", ("collectives", "logits"))
    with Pools("cpu", "gloo", most=2) as pools:
        verdicts = list(judge_models(pools, random.Random(3), AS_IT_IS, "bfloat16", 1))
    assert [(verdict.check, verdict.tp_size, verdict.fabric, verdict.alarm) for verdict in verdicts] == [
        ("collectives", 2, "gloo", None), ("logits", 2, "gloo", None)]


@pytest.mark.parametrize("check", ["collectives", "layers"])
def test_the_judge_counts_an_alarm_where_a_part_is_wrong(check: str, pools: Pools) -> None:
    ranks = pools(3)
    verdicts = []
    with sizes_alone(random_config(random.Random(0), 3), "bfloat16", 1) as results:
        for error in (0.0, 1.0):
            ranks.run(arrange, ORDERS[0], Spoiled(tp_rank=1, error=error))
            verdicts += [judged(check, context_of(ranks, results, 5), "as it is")]
    assert [verdict.alarm is not None for verdict in verdicts] == [False, True]
    (row,) = judged_rows(verdicts)
    assert (row.verdict, row.extra) == ("finding", {"runs": 2, "false_alarms": 1})
    assert "1 false alarms in 2 runs" in row.message
    assert alarms_table([row])["red runs"].tolist() == [1]


def test_the_judge_sees_models_as_verify_does(pools: Pools, results: ReferenceResults) -> None:
    ranks = loaded(pools, random.Random(0), results, 3)
    assert [judged(check, context_of(ranks, results, 0)).alarm for check in ("weights", "logits")] == [None, None]
    ranks.run(arrange, ORDERS[0], Spoiled(tp_rank=0, error=0.5))
    ranks.run(run_load, results.folder, results.dtype)
    weights, logits = (judged(check, context_of(ranks, results, 0)) for check in ("weights", "logits"))
    assert weights.alarm is None, "the weights are right, their sums are not"
    assert logits.alarm is not None
    assert "of the budget" in logits.alarm


def run_load(rank: RankContext, folder: Path, dtype: str) -> None:
    """Job: load the model with the sums as they are arranged."""
    load_model(rank, folder, dtype, OPTIONS)


def test_some_numbers_of_ranks_are_judged_that_nothing_was_fitted_on() -> None:
    assert set(TP_SIZES) - set(FITTED_TP_SIZES)


# Power


@pytest.mark.parametrize("first", [0, 1, 5, 6, 7, 9, 20, 26])
def test_the_smallest_error_that_is_seen_is_found(first: int) -> None:
    errors = ladder("float32")
    tried: list[float] = []

    def sees(error: float) -> bool:
        tried.append(error)
        return error >= errors[first]

    assert smallest_seen(sees, errors) == errors[first]
    assert len(tried) <= 9
    assert len(set(tried)) == len(tried)


def test_an_error_that_is_never_seen_is_infinite() -> None:
    assert smallest_seen(lambda error: False, ladder("bfloat16")) == math.inf
    assert seen_in([0.1, 0.2, math.inf], 0.99) is None
    assert seen_in([0.1, 0.2, math.inf], 0.6) == 0.2


@pytest.mark.parametrize("check", ["collectives", "layers"])
def test_a_large_error_in_one_part_is_seen_and_a_tiny_one_is_not(check: str, pools: Pools) -> None:
    thresholds = list(power_of_drawn(pools, random.Random(3), check, "float32", 4, 4))
    reals = [threshold.error for threshold in thresholds if threshold.values == "reals"]
    assert len(reals) == 4
    assert max(reals) <= 2.0**-6
    assert min(reals) > UNIT_ROUNDOFF["float32"]
    assert pools(4).run(is_spoiled) == [False] * 4, "whoever takes the ranks next has them without the error"


def test_the_count_of_collectives_goes_on_when_sums_are_arranged(pools: Pools) -> None:
    """A count from 0 looked like a rank that never entered what others had: a job that was going well was ended."""
    ranks = pools(2)
    before = max(ranks.run(sums))
    ranks.run(arrange, "ring", Spoiled(tp_rank=1, error=0.5))
    try:
        assert min(ranks.run(sums)) > before
    finally:
        ranks.run(arrange, "flat")


def sums(rank: RankContext) -> int:
    """Job: one sum, and the number of collectives that the rank has entered until then."""
    rank.tp.all_reduce(torch.ones(4))
    return rank.tp.log.entered


def is_spoiled(rank: RankContext) -> bool:
    """Job: whether an error is still planted."""
    return isinstance(rank.tp, SpoilingGroup)


def test_logits_show_a_large_error_in_one_module_and_not_a_tiny_one(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.studies.calibrate.power.TP_SIZES", (2,))
    thresholds = list(power_of_logits(pools, random.Random(0), "float32", 4))
    assert len(thresholds) == 4
    assert all(UNIT_ROUNDOFF["float32"] < threshold.error <= 2.0**-8 for threshold in thresholds)


def test_sums_are_planted_in_where_ranks_add_anything_up(pools: Pools) -> None:
    with sizes_alone(random_config(random.Random(0), 3), "bfloat16", 1) as results:
        assert {case.layer for case in sums_of("layers", random.Random(0), results, 3)} == {"row", "attention_output"}
        assert {case.op for case in sums_of("collectives", random.Random(0), results, 3)} == {"all_reduce"}


def test_power_is_told_for_a_case_and_for_a_run_of_several() -> None:
    errors = [2.0**-8] * 50 + [2.0**-4] * 48 + [1.0, math.inf]
    (row,) = power_rows(Threshold(check="layers", values="reals", dtype="bfloat16", tp_size=2, error=error, per_run=8)
                        for error in errors)
    assert (row.half, row.most) == (2.0**-8, 1.0)
    # Of eight cases one at least is among the 50 best: 1 - 0.5**8 is more than 99 %.
    assert row.run == 2.0**-8
    assert row.seen[0] == [2.0**-8, 0.5]
    assert row.seen[-1][1] == 0.99


# Rings


def test_a_ring_adds_each_piece_from_the_rank_before_it_downwards() -> None:
    """By numbers whose sum in bfloat16 depends on the order: 256 + 1 is 256, and 1 + 1 + 256 is 258."""
    big, one = 256.0, 1.0
    parts = torch.tensor([[big, big, big, big, big, big], [one] * 6, [one] * 6], dtype=torch.bfloat16)
    # Piece 0 takes ranks 2, 1, 0; piece 1 ranks 0, 2, 1; piece 2 ranks 1, 0, 2.
    assert ring_sum(parts).tolist() == [258, 258, 256, 256, 256, 256]


@pytest.mark.multirank
def test_a_ring_has_the_bits_of_gloo() -> None:
    with Ranks(3, fabric="gloo") as ranks:
        for length in (1, 2, 5, 6, 7, 64, 1001):
            sums = ranks.run(gloo_sum, length)
            assert torch.equal(sums[0], ring_sum(torch.stack([part(rank, length) for rank in range(3)])))


def gloo_sum(rank: RankContext, length: int) -> torch.Tensor:
    """Job."""
    return rank.tp.all_reduce(part(rank.tp.rank, length))


def part(rank: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank)).bfloat16()

"""Ranks as processes on GPUs of their own, joined by NCCL: every check, decode graphs with their collectives, and a death."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from engine.ranks.ranks import RankFailure, Ranks
from harness.checks import CHECK_NAMES
from harness.live_ranks import RankPools
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import VerifyPlan, verify
from reports.records import whole_checks
from tests.gpu.support import (
    DEVICE,
    OPTIONS,
    MakeModel,
    Plant,
    check,
    count_replays,
    exchange_keys_and_values,
    generate,
    has_graphs,
    load,
    num_replays,
    shift_slots,
    skip_all_reduce,
)
from tests.multigpu.jobs import (
    die_before_the_all_reduce,
    die_in_a_replay,
    hang_after_replays,
    norms_of_sums,
    sum_of_ranks,
    sums_in_rooms,
    wrong_back_to_back,
    wrong_integers,
    wrong_sums,
)
from tests.reference.tiny import small_config

pytestmark = pytest.mark.multigpu

FABRIC = "nccl"
GREEDY = {"temperature": 0.0, "max_tokens": 24}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 12}


def needs(num_gpus: int) -> Any:
    """A tp_size to test, where there are GPUs for it."""
    found = torch.cuda.device_count()
    return pytest.param(num_gpus, marks=pytest.mark.skipif(found < num_gpus, reason=f"tp_size={num_gpus} and {found} GPUs"))


@pytest.fixture
def two_ranks(ranks: RankPools) -> Ranks:
    """Live for the whole session: a job that kills them takes ranks of its own."""
    return ranks(2, fabric=FABRIC, device=DEVICE)


def drawn_prompts(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(131) for _ in range(draw.randint(1, 40))] for _ in range(count)]


@pytest.mark.parametrize("tp_size", [needs(2), needs(3), needs(4), needs(8)])
@pytest.mark.parametrize(("family", "num_q_heads", "num_kv_heads", "dtype"), [("llama", 9, 3, "bfloat16"),
                                                                              ("qwen3", 8, 4, "float16")])
def test_every_check_is_green(small_model: MakeModel, family: str, num_q_heads: int, num_kv_heads: int, dtype: str,
                              tp_size: int) -> None:
    folder = small_model(small_config(family, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads), dtype)
    report = verify(VerifyPlan(model="small", folder=folder, tp_sizes=(tp_size,), fabric=FABRIC, device=DEVICE))
    assert [row.message for row in report.checks if row.verdict in ("finding", "error")] == []
    assert [(row.check, row.fabric, row.dtype) for row in whole_checks(report.checks)] == [
        (name, FABRIC, dtype) for name in CHECK_NAMES]


@pytest.mark.parametrize(("plant", "argument", "module"), [
    (None, None, None),
    (shift_slots, 1, "model.layers.0.self_attn (attention, before o_proj)"),
    (skip_all_reduce, 1, "model.layers.1.mlp.down_proj"),
    (exchange_keys_and_values, 1, "model.layers.1.self_attn (attention, before o_proj)"),
])
def test_a_planted_fault_is_found_where_it_is_and_nothing_without_one(
    small_model: MakeModel, two_ranks: Ranks, plant: Plant | None, argument: int, module: str | None
) -> None:
    results = ReferenceResults(small_model(small_config(), "bfloat16"), dtype="bfloat16", device=DEVICE)
    outcome = check("logits", two_ranks, results, plant, argument, enforce_eager=True)
    assert outcome.module == module, outcome.finding
    assert (outcome.finding is None) == (plant is None)


def test_graphs_with_their_collectives_draw_the_ids_that_kernel_by_kernel_are_drawn(
    small_model: MakeModel, two_ranks: Ranks
) -> None:
    """In float32, where rounding turns no margin of this model round. Other prompts each time, other numbers of them."""
    folder = small_model(small_config(), "float32")
    rounds = [(drawn_prompts(number, count), params) for number, (count, params) in enumerate(
        [(1, GREEDY), (5, GREEDY), (8, SAMPLED), (3, SAMPLED), (2, GREEDY)])]
    two_ranks.run(load, folder, "float32", OPTIONS | {"enforce_eager": True}, timeout_s=120.0)
    assert two_ranks.run(has_graphs) == [False, False]
    eager = [two_ranks.run(generate, prompts, params, timeout_s=60.0) for prompts, params in rounds]
    two_ranks.run(load, folder, "float32", OPTIONS, timeout_s=120.0)
    two_ranks.run(count_replays)
    graphs = [two_ranks.run(generate, prompts, params, timeout_s=60.0) for prompts, params in rounds]
    assert graphs == eager
    assert all(by_rank[0] == by_rank[1] for by_rank in graphs)
    assert min(two_ranks.run(num_replays)) > 0


def test_two_engines_side_by_side_do_not_disturb_each_other(small_model: MakeModel, two_ranks: Ranks) -> None:
    """Two groups on the same GPUs, both at work at once."""
    configs = [small_config(), small_config("qwen2", num_q_heads=10, num_kv_heads=5)]
    models = [small_model(config, "float32") for config in configs]
    prompts = drawn_prompts(7, 6)
    with Ranks(2, fabric=FABRIC, device=DEVICE) as others:
        engines = [two_ranks, others]
        for ranks, folder in zip(engines, models, strict=True):
            ranks.run(load, folder, "float32", OPTIONS, timeout_s=120.0)
        alone = [ranks.run(generate, prompts, GREEDY, timeout_s=60.0) for ranks in engines]
        handles = [ranks.submit(generate, prompts, GREEDY) for ranks in engines]
        together = [ranks.collect(handle, timeout_s=90.0) for ranks, handle in zip(engines, handles, strict=True)]
    assert together == alone
    assert alone[0] != alone[1]
    assert two_ranks.run(generate, prompts, GREEDY, timeout_s=60.0) == alone[0]


def test_sums_on_shared_memory_are_exact(two_ranks: Ranks) -> None:
    assert two_ranks.run(wrong_sums, timeout_s=120.0) == [[], []]


def test_sums_and_maxima_of_integers_on_shared_memory_are_exact(two_ranks: Ranks) -> None:
    assert two_ranks.run(wrong_integers, timeout_s=120.0) == [[], []]


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", False), ("int32", False), ("int32", True)])
def test_a_hundred_thousand_reductions_back_to_back_are_right(two_ranks: Ranks, dtype: str, largest: bool) -> None:
    for calls, wrong in two_ranks.run(wrong_back_to_back, dtype, largest, 100_000, timeout_s=120.0):
        assert calls >= 100_000
        assert wrong == 0


@pytest.mark.parametrize(("num_rows", "dim"), [(1, 4096), (3, 576), (256, 1024), (300, 4096), (16_387, 1024), (20_000, 4096)])
def test_a_sum_with_its_norm_is_the_norm_of_the_sum(two_ranks: Ranks, num_rows: int, dim: int) -> None:
    for same_residual, error in two_ranks.run(norms_of_sums, num_rows, dim, timeout_s=60.0):
        assert same_residual
        assert error <= 2, "two orders of summation, each rounded once"


@pytest.mark.parametrize(("num_rows", "dim", "sent_bytes", "way"), [
    (1, 4096, 2**27, "written"), (37, 1024, 2**27, "written"), (256, 4096, 2**27, "written"), (8_191, 1024, 2**23, "sent"),
    (16_384, 4096, 2**23, "sent"), (16_384, 1024, 2**30, "written")])
def test_a_product_that_is_where_all_ranks_read_it_has_the_sum_of_one_that_is_copied(
    two_ranks: Ranks, num_rows: int, dim: int, sent_bytes: int, way: str
) -> None:
    for are_equal, ways in two_ranks.run(sums_in_rooms, num_rows, dim, sent_bytes, timeout_s=60.0):
        assert all(are_equal)
        assert len(are_equal) == (80 if way == "written" else 40)
        assert ways == {"copied", way}


def test_a_rank_that_dies_in_a_replay_ends_the_call() -> None:
    """The others wait for it on their GPUs, where nothing but the end of their processes ends a wait."""
    with Ranks(2, fabric=FABRIC, device=DEVICE) as ranks:
        ranks.run(sum_of_ranks, timeout_s=60.0)
        started = time.monotonic()
        with pytest.raises(RankFailure) as caught:
            ranks.run(die_in_a_replay, 1, timeout_s=60.0)
        assert time.monotonic() - started < 10
        first = next(iter(caught.value.failures.values()))
        assert (first.rank, first.kind, first.phase) == (1, "died", "replaying")


def test_a_rank_that_hangs_ahead_of_a_replay_ends_the_call(small_model: MakeModel) -> None:
    """The other waits for it on its GPU, and a host that waits for that GPU does so for a bounded time."""
    with Ranks(2, fabric=FABRIC, device=DEVICE) as ranks:
        ranks.run(load, small_model(small_config(), "float32"), "float32", OPTIONS, timeout_s=120.0)
        ranks.run(generate, drawn_prompts(1, 3), GREEDY, timeout_s=60.0)
        ranks.run(hang_after_replays, 1, 5)
        started = time.monotonic()
        with pytest.raises(RankFailure) as caught:
            ranks.run(generate, drawn_prompts(2, 3), GREEDY, timeout_s=60.0)
        assert time.monotonic() - started < 10
        cause, other = caught.value.failures.values()
        assert (cause.rank, cause.kind, cause.consequence) == (1, "stuck", False)
        assert "waits for a captured decode step" in other.summary


def test_a_killed_rank_is_named_and_new_ones_work() -> None:
    with Ranks(2, fabric=FABRIC, device=DEVICE, auto_restart=True) as ranks:
        assert ranks.run(sum_of_ranks, timeout_s=60.0) == [3.0, 3.0]
        started = time.monotonic()
        with pytest.raises(RankFailure) as caught:
            ranks.run(die_before_the_all_reduce, 1, timeout_s=60.0)
        assert time.monotonic() - started < 30
        first, *others = caught.value.failures.values()
        assert (first.rank, first.kind, first.phase, first.summary) == (1, "died", "summing", "killed by SIGKILL")
        assert all(error.consequence for error in others)
        assert not ranks.healthy
        assert ranks.run(sum_of_ranks, timeout_s=60.0) == [3.0, 3.0]

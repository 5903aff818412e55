"""Whole benchmark runs on a tiny model: every kind of workload, real engines in real processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.bench import workloads
from harness.bench.bench import BenchResult, BenchRun, Watcher, Workers, run_bench
from harness.bench.plan import BenchPlan
from harness.bench.worker import CHECKOUT
from harness.bench.workloads import (
    COLD,
    WARM,
    CollectivesWork,
    GenerateWork,
    LayersWork,
    Limits,
    LoadWork,
    equal_requests,
)
from reports.records import BenchRow
from tests.harness.conftest import MakeModel
from tests.reference.tiny import tiny_config

LIMITS = Limits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64)
TINY_LAYERS = LayersWork(batch_sizes=(1, 4), rounds=2, slice_s=0.001, rotate_bytes=0, placements=2, fresh_every=1, most_vocab=50)


def serve(case: str, *size: int, **options: Any) -> GenerateWork:
    return GenerateWork(**{"workload": "serve", "case": case, "limits": LIMITS, "draw": partial(equal_requests, *size),
                           "rounds": 2} | options)


TINY = (
    serve("all", 2, 8, 6, axes={"batch_size": 2}, figures=("throughput", "prompt", "itl", "ttft", "tpot")),
    serve("decode", 1, 4, 24, figures=("decode", "itl")),
    serve("too long", 1, 127, 6, figures=("throughput",)),
    CollectivesWork(message_bytes=(4, 1024), rounds=2, calls=2),
    TINY_LAYERS,
    LoadWork(case=COLD, rounds=2),
    LoadWork(case=WARM, rounds=2),
)
START = serve("start to first token", 1, 4, 1, workload="start", rounds=1, figures=("start",), reference=False)


@pytest.fixture(scope="module")
def tiny_workloads() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setitem(workloads.WORKLOADS, "tiny", TINY)
    patch.setitem(workloads.WORKLOADS, "tiny-layers", (TINY_LAYERS,))
    patch.setitem(workloads.WORKLOADS, "tiny-start", (START,))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def result(tiny_workloads: None, tiny_model: MakeModel) -> BenchResult:
    plan = BenchPlan(model="tiny", folder=tiny_model(tiny_config()), workloads=("tiny",), tp_sizes=(1, 2), device="cpu",
                     peers=("transformers", "vllm", "transformers-cb"))
    return run_bench(plan, argv=["shardproof", "bench", "tiny"])


def rows_of(result: BenchResult, workload: str) -> dict[tuple[str, str, int], BenchRow]:
    return {(row.case, row.engine, row.tp_size): row for row in result.reports["candidate"].benches if row.workload == workload}


@pytest.mark.multirank
def test_every_figure_of_every_engine_is_there(result: BenchResult) -> None:
    assert not result.failed
    assert not result.interrupted
    rows = rows_of(result, "serve")
    everybody = [("shardproof", 1), ("shardproof", 2), ("transformers", 1)]
    assert set(rows) == {(case, *who) for case in ("all", "decode") for who in everybody}
    for who in everybody:
        both = rows["all", *who]
        assert set(both.samples) == {"output_tokens_per_s", "prompt_tokens_per_s", "ttft_ms", "ttft_ms_p99", "itl_ms",
                                     "itl_ms_p99", "tpot_ms", "tpot_ms_p99"}
        assert set(both.samples) == set(both.first)
        assert {len(values) for values in both.samples.values()} == {2}
        assert set(rows["decode", *who].samples) == {"ms_per_token", "itl_ms", "itl_ms_p99"}


@pytest.mark.multirank
def test_rows_of_engines_have_bounds_and_memory(result: BenchResult) -> None:
    for row in rows_of(result, "serve").values():
        assert row.metrics["memory_gib"] > 0.05  # an interpreter with torch
        assert 0 < row.metrics["bound_itl_ms"] < min(row.samples["itl_ms"])
    assert set(rows_of(result, "serve")["all", "shardproof", 2].metrics) == {
        "memory_gib", "bound_output_tokens_per_s", "bound_prompt_tokens_per_s", "bound_itl_ms"}


@pytest.mark.multirank
def test_the_hardware_is_measured_in_the_same_run(result: BenchResult) -> None:
    rows = rows_of(result, "hardware")
    assert set(rows) == {("as the engine runs", "torch", 1), ("one thread", "torch", 1)}
    for row in rows.values():
        assert set(row.samples) == {"copy_gb_per_s", "matmul_tflop_per_s"}
        assert row.model == ""


@pytest.mark.multirank
def test_collectives_are_measured_where_there_are_ranks_to_reduce_with(result: BenchResult) -> None:
    rows = rows_of(result, "collectives")
    assert set(rows) == {(case, who, 2) for case in ("4 B, eager", "1 KiB, eager") for who in ("shardproof", "torch gloo")}
    assert {row.axes["message_bytes"] for row in rows.values()} == {4.0, 1024.0}
    assert {row.fabric for row in rows.values()} == {"gloo"}


@pytest.mark.multirank
def test_every_layer_is_measured_sharded_and_whole(result: BenchResult) -> None:
    rows = rows_of(result, "layers")
    assert {case.split(",")[0] for case, _, _ in rows} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens of 50 ids", "lm_head of 50 ids"}
    assert len(rows) == 6 * 2 * 2
    assert {(row.tp_size, row.fabric) for row in rows.values()} == {(1, "solo"), (2, "gloo")}
    assert rows["qkv_proj, batch 4", "shardproof", 1].metrics["bound_call_us"] > 0


@pytest.mark.multirank
def test_loading_tells_what_a_rank_reads_and_holds(result: BenchResult) -> None:
    rows = rows_of(result, "load")
    one, two = (rows["files in memory", "shardproof", tp_size] for tp_size in (1, 2))
    assert set(one.samples) == {"load_s", "read_gb_per_s", "rank_read_gib", "rank_parameters_gib"}
    assert two.samples["rank_read_gib"][0] < one.samples["rank_read_gib"][0]
    assert math.isclose(one.samples["rank_read_gib"][0], one.samples["rank_parameters_gib"][0], rel_tol=0.01)  # float32


@pytest.mark.multirank
@pytest.mark.endurance
def test_starting_is_measured_from_a_fresh_process_to_the_first_token(tiny_workloads: None, tiny_model: MakeModel) -> None:
    plan = BenchPlan(model="tiny", folder=tiny_model(tiny_config()), workloads=("tiny-start",), tp_sizes=(1, 2), device="cpu",
                     peers=("transformers", "vllm"))
    run = BenchRun(plan, Watcher(), Workers())
    (work,) = run.works
    participants = {(each.task.engine, each.task.tp_size): each for each in run.participants(work)}
    assert set(participants) == {("shardproof", 1), ("shardproof", 2), ("transformers", 1)}
    assert [(item.engine, item.tp_size, item.reason) for item in run.missing] == [
        ("vllm", tp_size, "the package vllm is not installed") for tp_size in (1, 2)]
    participant = participants["shardproof", 2]
    participant.start()
    ((key, figures),) = participant.measure().items()
    assert key == ("start to first token", "shardproof")
    assert 1 < figures["start_s"] < 300
    assert participant.ready.fabric == "gloo"


@pytest.mark.multirank
def test_what_could_not_be_measured_is_named_with_its_reason(result: BenchResult) -> None:
    missing = {(item.workload, item.engine, item.tp_size, item.case): item.reason
               for item in result.reports["candidate"].not_measured}
    assert missing["serve", "vllm", 1, None] == missing["serve", "vllm", 2, None] == "the package vllm is not installed"
    assert missing["serve", "transformers-cb", 1, None] == "transformers-cb does not run on device=cpu"
    assert missing["serve", "shardproof", None, "too long"] == "needs 133 positions, and the model has 128"
    assert {item.workload for item in result.reports["candidate"].not_measured} == {"serve"}


@pytest.mark.multirank
@pytest.mark.endurance
def test_two_checkouts_take_turns_and_give_two_reports(tiny_workloads: None, tiny_model: MakeModel) -> None:
    said: list[str] = []
    plan = BenchPlan(model="tiny", folder=tiny_model(tiny_config()), workloads=("tiny-layers",), device="cpu", against=CHECKOUT,
                     slower={"down_proj": 1.0})
    result = run_bench(plan, Watcher(on_status=said.append), with_hardware=False)
    assert set(result.reports) == {"candidate", "baseline"}
    candidate, baseline = ({row.key for row in result.reports[name].benches} for name in ("candidate", "baseline"))
    assert candidate == baseline
    turns = [text for text in said if "round" in text]
    assert ["baseline" in text for text in turns] == [True, False, False, True]


@pytest.mark.multirank
def test_ctrl_c_leaves_a_report_and_no_process(tiny_workloads: None, tiny_model: MakeModel) -> None:
    def interrupt(text: str) -> None:
        if "round 2" in text:
            raise KeyboardInterrupt

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    plan = BenchPlan(model="tiny", folder=tiny_model(tiny_config()), workloads=("tiny-layers", "tiny"), device="cpu")
    result = run_bench(plan, Watcher(on_status=interrupt), with_hardware=False)
    assert result.interrupted
    report = result.reports["candidate"]
    assert {len(row.samples["call_us"]) for row in report.benches} == {1}
    reasons = {(item.workload, item.case): item.reason for item in report.not_measured}
    assert reasons["layers", None] == "interrupted after 1 of 2 rounds"
    assert reasons["load", "files in memory"] == reasons["serve", "all"] == "interrupted before it began"
    left = {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}
    assert left <= before


@pytest.mark.parametrize(("changes", "message"), [
    ({"workloads": ("w9",)}, r"workloads=\['w9'\] are unknown"),
    ({"tp_sizes": (0,)}, r"tp_sizes=\(0,\) must be"),
    ({"tp_sizes": (2, 2)}, "different numbers"),
    ({"fabric": "solo"}, "fabric='solo' is unknown"),
    ({"device": "tpu"}, "device='tpu' is unknown"),
    ({"dtype": "int8"}, "dtype='int8' is unknown"),
    ({"rounds": 0}, "rounds=0 must be at least 1"),
    ({"cases": ("batch 1,",)}, r"cases=\['batch 1,'\] are in no case of .* cases that can be had alone: 256 requests"),
    ({"peers": ("sglang",)}, r"peers=\['sglang'\] are unknown"),
    ({"against": Path("/nowhere")}, "against=/nowhere is no checkout"),
])
def test_a_plan_that_makes_no_sense_is_refused_before_anything_starts(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchPlan(**({"model": "m", "folder": Path(), "workloads": ("w1",)} | changes))  # type: ignore[arg-type]


def test_cases_are_picked_by_a_part_of_their_names() -> None:
    plan = BenchPlan(model="m", folder=Path(), workloads=("decode", "prefill", "collectives"), cases=("batch 1,", "16 ×"))
    assert [work.case for work in plan.works] == ["batch 1, context 1024", "16 × 1024"]


def test_more_ranks_than_query_heads_are_refused(tiny_model: MakeModel) -> None:
    plan = BenchPlan(model="tiny", folder=tiny_model(tiny_config()), workloads=("w1",), tp_sizes=(1, 7), device="cpu")
    with pytest.raises(ValueError, match=r"tp_sizes=\[7\] are above num_q_heads=6"):
        BenchRun(plan, Watcher(), Workers())

"""Participants take turns, first runs stand apart, a failing one is dropped and named, and Ctrl-C loses nothing that is done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from harness.bench.bench import BenchRun, Participant, Watcher, Workers
from harness.bench.figures import Figures, Measured
from harness.bench.measurement import Ready, Task
from harness.bench.plan import BenchPlan
from harness.bench.worker import Worker, WorkerError
from harness.bench.workloads import GenerateWork, Limits, Work, equal_requests
from reports.compare import HARDWARE
from reports.records import RecordError, Report
from tests.harness.conftest import MakeModel
from tests.reference.tiny import tiny_config
from tests.reports.builders import a_run

LIMITS = Limits(max_model_len=8, max_num_seqs=1, max_num_batched_tokens=8)


def no_worker() -> Worker:
    raise AssertionError("these participants have no worker")


@dataclass(slots=True, kw_only=True, eq=False)
class Scripted(Participant):
    """Says what was asked of it, and fails or is interrupted on its n-th turn."""

    log: list[str]
    fails_at: int | None = None
    interrupted_at: int | None = None
    opens: bool = True
    fails_with: str = ""
    turns: int = 0
    bound: float | None = None
    figures: list[float] = field(default_factory=list)

    def start(self) -> None:
        if not self.opens:
            raise WorkerError("long story", summary=f"{self.task.engine} does not start")
        self.ready = Ready(fabric="solo", bounds={} if self.bound is None else {"a case": {"step_ms": self.bound}})

    def measure(self) -> Measured:
        turn, self.turns = self.turns, self.turns + 1
        if turn == self.fails_at:
            raise WorkerError("long story", summary=f"{self.task.engine} broke", kind=self.fails_with)
        if turn == self.interrupted_at:
            raise KeyboardInterrupt
        self.log.append(self.task.engine)
        return {("a case", self.task.engine): {"step_ms": self.figures[turn] if self.figures else 100.0 + turn}}

    def memory(self) -> Figures:
        return {"memory_gib": 1.5}

    def finish(self) -> None:
        self.log.append(f"finish {self.task.engine}")


@pytest.fixture
def bench(tiny_model: MakeModel) -> BenchRun:
    plan = BenchPlan(model="tiny", folder=tiny_model(tiny_config()), workloads=("layers",), device="cpu")
    return BenchRun(plan, Watcher(), Workers())


def a_work(workload: str = "decode") -> Work:
    return GenerateWork(workload=workload, case="a case", draw=lambda: equal_requests(1, 1, 1), figures=(), rounds=3,
                        limits=LIMITS, axes={"batch_size": 4})


def scripted(log: list[str], *names: str, rounds: int = 3, **changes: Any) -> list[Scripted]:
    options: dict[str, Any] = {"work": a_work(), "folder": Path(), "tp_size": 1, "fabric": "solo", "device": "cpu",
                               "dtype": "float32"}
    return [Scripted(task=Task(engine=name, **options), side="candidate", worker=no_worker, rounds=rounds,
                     log=log, **changes) for name in names]


def run(bench: BenchRun, participants: list[Scripted], workload: str = "decode") -> BenchRun:
    """``bench`` after a work of these participants."""
    work = a_work(workload)
    for participant in participants:
        participant.task = replace(participant.task, work=work)
    bench.participants = lambda work: list(participants)  # type: ignore[method-assign]
    bench.missing.clear()  # what the model can't run
    bench.measure_all([work])
    return bench


def test_everybody_has_a_first_run_and_then_turns_begin_with_another_one_each_round(bench: BenchRun) -> None:
    log: list[str] = []
    run(bench, scripted(log, "a", "b"))
    assert log == ["a", "b", "b", "a", "a", "b", "b", "a", "finish b", "finish a"]
    for row in bench.rows["candidate"]:
        assert row.first == {"step_ms": 100.0}
        assert row.samples == {"step_ms": [101.0, 102.0, 103.0]}


def test_a_row_has_memory_bounds_and_axes(bench: BenchRun) -> None:
    (row,) = run(bench, scripted([], "a", bound=50.0)).rows["candidate"]
    assert row.metrics == {"memory_gib": 1.5, "bound_step_ms": 50.0}
    assert row.axes == {"batch_size": 4.0}
    assert (row.workload, row.case, row.model, row.dtype) == ("decode", "a case", "tiny", "float32")


def test_one_that_is_slow_runs_fewer_rounds(bench: BenchRun) -> None:
    run(bench, [*scripted([], "fast"), *scripted([], "slow", rounds=1)])
    assert {row.engine: len(row.samples["step_ms"]) for row in bench.rows["candidate"]} == {"fast": 3, "slow": 1}
    assert [bench.plan.rounds_of(replace(a_work(), rounds=9), name) for name in ("shardproof", "transformers")] == [9, 3]


def test_one_that_does_not_start_is_named_and_the_others_run(bench: BenchRun) -> None:
    run(bench, [*scripted([], "peer", opens=False), *scripted([], "shardproof")])
    assert [row.engine for row in bench.rows["candidate"]] == ["shardproof"]
    assert [(item.engine, item.case, item.reason) for item in bench.missing] == [("peer", "a case", "peer does not start")]
    assert not bench.failed


def test_one_that_breaks_keeps_the_rounds_that_it_has(bench: BenchRun) -> None:
    (row,) = run(bench, scripted([], "peer", fails_at=2)).rows["candidate"]
    assert row.samples == {"step_ms": [101.0]}
    assert "memory_gib" not in row.metrics
    assert [item.reason for item in bench.missing] == ["peer broke"]


def test_one_that_returned_too_little_has_an_error_and_no_figure(bench: BenchRun) -> None:
    run(bench, [*scripted([], "shardproof"), *scripted([], "peer", fails_at=2, fails_with="ShortAnswerError")])
    assert [row.engine for row in bench.rows["candidate"]] == ["shardproof"]
    (item,) = bench.missing
    assert (item.engine, item.verdict, item.reason, item.traceback) == ("peer", "error", "peer broke", "long story")
    assert Report(run=a_run(), benches=bench.rows["candidate"], not_measured=bench.missing).exit_code == 3


@pytest.mark.parametrize("figure", [0.0, -1.0, math.inf, math.nan])
def test_a_figure_that_cannot_be_one_costs_its_row_and_not_the_run(bench: BenchRun, figure: float) -> None:
    participants = [*scripted([], "good"), *scripted([], "bad", figures=[1.0, 1.0, figure], rounds=2)]
    try:
        run(bench, participants)
    except RecordError as error:
        pytest.fail(f"the run is lost: {error}")
    assert [row.engine for row in bench.rows["candidate"]] == ["good"]
    (item,) = bench.missing
    assert (item.engine, item.verdict) == ("bad", "error")
    assert "samples.step_ms[1]" in item.reason


@pytest.mark.parametrize(("engine", "failed"), [("shardproof", True), ("peer", False)])
def test_a_failure_of_the_projects_own_engine_is_one_of_the_run(bench: BenchRun, engine: str, failed: bool) -> None:
    assert run(bench, scripted([], engine, fails_at=0)).failed is failed


def test_ctrl_c_keeps_what_is_done_and_names_what_is_not(bench: BenchRun) -> None:
    run(bench, [*scripted([], "a"), *scripted([], "b", interrupted_at=2)])
    # Turns: a b | b a | a b: the interrupt comes in the second round, when a has two and b one.
    assert {row.engine: len(row.samples["step_ms"]) for row in bench.rows["candidate"]} == {"a": 2, "b": 1}
    assert {item.engine: item.reason for item in bench.missing} == {
        "a": "interrupted after 2 of 3 rounds", "b": "interrupted after 1 of 3 rounds"}


def test_a_work_that_never_began_is_named(bench: BenchRun) -> None:
    bench.participants = lambda work: scripted([], "a", interrupted_at=0)  # type: ignore[method-assign]
    bench.missing.clear()
    assert not bench.measure_all([a_work("first"), a_work("second")])
    assert [(item.workload, item.case, item.reason) for item in bench.missing] == [
        ("first", "a case", "interrupted after 0 of 3 rounds"), ("second", "a case", "interrupted before it began")]


def test_the_best_of_the_hardwares_rounds_is_its_ceiling(bench: BenchRun) -> None:
    run(bench, scripted([], "torch"), workload=HARDWARE)
    assert bench.hardware == {"a case": {"step_ms": 101.0}}


def test_engines_of_other_limits_end_before_the_next_ones_start(bench: BenchRun, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(bench.workers, "close", lambda *, but_micro: log.append("engines end"))
    bench.participants = lambda work: scripted(log, work.workload, rounds=1)  # type: ignore[method-assign]
    first, second = a_work("first"), a_work("second")
    assert isinstance(second, GenerateWork)
    bench.measure_all([first, first, replace(second, limits=replace(LIMITS, max_num_seqs=2))])
    of_first, of_second = (["first", "first", "finish first"], ["second", "second", "finish second"])
    assert log == ["engines end", *of_first, *of_first, "engines end", *of_second]

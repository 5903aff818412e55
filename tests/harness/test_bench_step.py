"""Participants take turns, first runs stand apart, a failing one is dropped and named, and Ctrl-C loses nothing that is done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness.bench.figures import Figures
from harness.bench.participants import Hardware, Measured, Participant, Side
from harness.bench.plan import BenchPlan, Setting
from harness.bench.step import Outcome, Step, Watcher
from harness.bench.worker import Worker, WorkerError
from harness.bench.workloads import GenerateCase, equal_requests
from reports.compare import HARDWARE
from reports.records import RecordError, Report
from tests.harness.conftest import MakeModel
from tests.reference.tiny import tiny_config
from tests.reports.builders import a_run

CASE = GenerateCase(case="a case", draw=equal_requests(1, 1, 1), figures=(), rounds=3, axes={"batch_size": 4})


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

    def open(self) -> None:
        if not self.opens:
            raise WorkerError("long story", summary=f"{self.engine} does not start")

    def measure(self, block: Any) -> Measured:
        turn, self.turns = self.turns, self.turns + 1
        if turn == self.fails_at:
            raise WorkerError("long story", summary=f"{self.engine} broke", kind=self.fails_with)
        if turn == self.interrupted_at:
            raise KeyboardInterrupt
        self.log.append(self.engine)
        return {("a case", self.engine): {"step_ms": self.figures[turn] if self.figures else 100.0 + turn}}

    def memory(self) -> Figures:
        return {"memory_gib": 1.5}

    def bounds(self, block: Any, case: str, hardware: Hardware) -> Figures:
        return {} if self.bound is None else {"step_ms": self.bound}

    def close(self) -> None:
        self.log.append(f"close {self.engine}")


@pytest.fixture
def setting(tiny_model: MakeModel) -> Setting:
    return Setting.of(BenchPlan(model="tiny", folder=tiny_model(tiny_config()), workloads=("layers",), device="cpu"))


def scripted(setting: Setting, log: list[str], *names: str, **changes: Any) -> list[Scripted]:
    side = Side(name="candidate", checkout=Path())
    return [Scripted(setting=setting, side=side, engine=name, tp_size=1, worker=no_worker, fabric="solo", log=log, **changes)
            for name in names]


def run(setting: Setting, participants: list[Scripted], rounds: int = 3, workload: str = "decode") -> Outcome:
    outcome = Outcome(rows={"candidate": []}, watcher=Watcher())
    step = Step(setting, workload, CASE, lambda: participants, rounds)
    try:
        step.run(outcome)
    except KeyboardInterrupt:
        outcome.failed = True
    return outcome


def test_everybody_has_a_first_run_and_then_turns_begin_with_another_one_each_round(setting: Setting) -> None:
    log: list[str] = []
    outcome = run(setting, scripted(setting, log, "a", "b"), rounds=3)
    assert log == ["a", "b", "b", "a", "a", "b", "b", "a", "close b", "close a"]
    for row in outcome.rows["candidate"]:
        assert row.first == {"step_ms": 100.0}
        assert row.samples == {"step_ms": [101.0, 102.0, 103.0]}


def test_a_row_has_memory_bounds_and_axes(setting: Setting) -> None:
    (row,) = run(setting, scripted(setting, [], "a", bound=50.0)).rows["candidate"]
    assert row.metrics == {"memory_gib": 1.5, "bound_step_ms": 50.0}
    assert row.axes == {"batch_size": 4.0}
    assert (row.workload, row.case, row.model, row.dtype) == ("decode", "a case", "tiny", "float32")


def test_one_that_is_slow_runs_fewer_rounds(setting: Setting) -> None:
    log: list[str] = []
    participants = [*scripted(setting, log, "fast"), *scripted(setting, log, "slow", rounds=1)]
    rows = {row.engine: row for row in run(setting, participants, rounds=3).rows["candidate"]}
    assert [len(rows[name].samples["step_ms"]) for name in ("fast", "slow")] == [3, 1]


def test_one_that_does_not_start_is_named_and_the_others_run(setting: Setting) -> None:
    outcome = run(setting, [*scripted(setting, [], "peer", opens=False), *scripted(setting, [], "shardproof")])
    assert [row.engine for row in outcome.rows["candidate"]] == ["shardproof"]
    assert [(item.engine, item.case, item.reason) for item in outcome.missing] == [("peer", "a case", "peer does not start")]
    assert not outcome.failed


def test_one_that_breaks_keeps_the_rounds_that_it_has(setting: Setting) -> None:
    outcome = run(setting, scripted(setting, [], "peer", fails_at=2))
    (row,) = outcome.rows["candidate"]
    assert row.samples == {"step_ms": [101.0]}
    assert "memory_gib" not in row.metrics
    assert [item.reason for item in outcome.missing] == ["peer broke"]


def test_one_that_returned_too_little_has_an_error_and_no_figure(setting: Setting) -> None:
    outcome = run(setting, [*scripted(setting, [], "shardproof"),
                            *scripted(setting, [], "peer", fails_at=2, fails_with="ShortAnswerError")])
    assert [row.engine for row in outcome.rows["candidate"]] == ["shardproof"]
    (item,) = outcome.missing
    assert (item.engine, item.verdict, item.reason, item.traceback) == ("peer", "error", "peer broke", "long story")
    assert Report(run=a_run(), benches=outcome.rows["candidate"], not_measured=outcome.missing).exit_code == 3


@pytest.mark.parametrize("figure", [0.0, -1.0, math.inf, math.nan])
def test_a_figure_that_cannot_be_one_costs_its_row_and_not_the_run(setting: Setting, figure: float) -> None:
    participants = [*scripted(setting, [], "good"), *scripted(setting, [], "bad", figures=[1.0, 1.0, figure])]
    try:
        outcome = run(setting, participants, rounds=2)
    except RecordError as error:
        pytest.fail(f"the run is lost: {error}")
    assert [row.engine for row in outcome.rows["candidate"]] == ["good"]
    (item,) = outcome.missing
    assert (item.engine, item.verdict) == ("bad", "error")
    assert "samples.step_ms[1]" in item.reason


def test_a_failure_of_the_projects_own_engine_is_one_of_the_run(setting: Setting) -> None:
    assert run(setting, scripted(setting, [], "shardproof", fails_at=0)).failed
    assert not run(setting, scripted(setting, [], "peer", fails_at=0)).failed


def test_ctrl_c_keeps_what_is_done_and_names_what_is_not(setting: Setting) -> None:
    participants = [*scripted(setting, [], "a"), *scripted(setting, [], "b", interrupted_at=2)]
    outcome = run(setting, participants, rounds=3)
    # Turns: a b | b a | a b: the interrupt comes in the second round, when a has two and b one.
    assert {row.engine: len(row.samples["step_ms"]) for row in outcome.rows["candidate"]} == {"a": 2, "b": 1}
    assert {item.engine: item.reason for item in outcome.missing} == {
        "a": "interrupted after 2 of 3 rounds", "b": "interrupted after 1 of 3 rounds"}


def test_a_step_that_never_began_is_named(setting: Setting) -> None:
    outcome = Outcome(rows={"candidate": []}, watcher=Watcher())
    Step(setting, "decode", CASE, list, 3).say_interrupted(outcome)
    assert [(item.workload, item.case, item.reason) for item in outcome.missing] == [
        ("decode", "a case", "interrupted before it began")]


def test_the_best_of_the_hardwares_rounds_is_its_ceiling(setting: Setting) -> None:
    outcome = run(setting, scripted(setting, [], "torch"), workload=HARDWARE)
    assert outcome.hardware.best == {"a case": {"step_ms": 101.0}}

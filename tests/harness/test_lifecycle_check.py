"""The lifecycle check sees reports that leave something out, leftovers, and ranks that are not the same after a restart."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.ranks.failures import RankError, RankFailure
from harness.checks import lifecycle
from harness.checks.lifecycle import HANG_S, SLACK_S, LifecycleCase, Traces, all_cases, check_lifecycle, left_behind, wrong_with
from harness.faults.layouts import LAYOUTS
from harness.subjects.base import SubjectFailure
from harness.subjects.engine_rank import EngineRank
from tests.harness.checking import assert_green, context_of, run_check
from tests.harness.conftest import MakeModel

KILLED = LifecycleCase(fabric="gloo", how="kill", phase="prefill")
HUNG = LifecycleCase(fabric="gloo", how="hang", phase="decode")
RAISED = LifecycleCase(fabric="threads", how="raise", phase="load")


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    return tiny_model(LAYOUTS["qwen2"].config)


def report(*errors: RankError, divergence: tuple[str, ...] = ()) -> SubjectFailure:
    return SubjectFailure("the report", failures={error.rank: error for error in errors}, divergence=divergence)


RIGHT = RankError(rank=1, kind="died", phase="prefill", summary="process died: killed by SIGKILL")
SAW_IT = RankError(rank=0, kind="raised", phase="prefill", summary="connection closed", consequence=True)
STUCK = RankError(rank=1, kind="stuck", phase="decode", summary="stuck outside any collective: in sleep")
NEVER_CAME = ("rank 1 never entered #7 all_reduce [1, 16]",)


def test_a_report_of_all_that_happened_is_right() -> None:
    assert wrong_with(report(SAW_IT, RIGHT), KILLED, 1.0) is None
    assert wrong_with(report(STUCK, divergence=NEVER_CAME), HUNG, HANG_S + 1) is None


@pytest.mark.parametrize(("failure", "says"), [
    (report(replace(SAW_IT, consequence=False)), "does not name rank 1"),
    (report(replace(RIGHT, consequence=True)), "for a consequence"),
    (report(replace(SAW_IT, consequence=False), RIGHT), "blames ranks [0] too"),
    (report(replace(RIGHT, kind="raised")), "reported as raised"),
    (report(replace(RIGHT, summary="exited with code 1")), "'exited with code 1'"),
    (report(replace(RIGHT, phase="decode")), "in phase 'decode'"),
])
def test_a_report_that_gets_something_wrong_is_seen(failure: SubjectFailure, says: str) -> None:
    problem = wrong_with(failure, KILLED, 1.0)
    assert problem is not None
    assert says in problem


def test_a_late_report_and_a_hang_without_its_collective_are_seen() -> None:
    assert "later than" in (wrong_with(report(RIGHT), KILLED, SLACK_S + 1) or "")
    assert "which collective rank 1 never entered" in (wrong_with(report(STUCK), HUNG, HANG_S) or "")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for leftovers to go away no longer than this."""
    monkeypatch.setattr(lifecycle, "GONE_S", 0.1)


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.usefixtures("quick")
def test_what_is_left_behind_is_named(tmp_path: Path, open_port: int) -> None:
    me = psutil.Process()
    gone = Traces(pid=me.pid, started=me.create_time() - 1, sockets=(), shared_memory=(str(tmp_path / "none"),))
    assert left_behind([gone]) is None
    assert left_behind([replace(gone, started=me.create_time())]) == f"left behind: process {os.getpid()}"
    segment = tmp_path / "segment"
    segment.touch()
    assert left_behind([replace(gone, shared_memory=(str(segment),))]) == f"left behind: shared memory {segment}"
    mine = next(found for found in lifecycle._listening(os.getpid()) if found[1] == open_port)
    assert left_behind([replace(gone, sockets=(mine,))]) == f"left behind: port {open_port}"
    assert left_behind([replace(gone, sockets=((mine[0] + 2**40, open_port),))]) is None, "another program's, at that port"


def test_every_failure_is_tried_in_every_phase_where_ranks_are_processes() -> None:
    assert len(set(all_cases("gloo"))) == 4 * 3
    assert {case.how for case in all_cases("threads")} == {"raise"}


def test_other_numbers_of_ranks_are_skipped_with_a_reason(folder: Path) -> None:
    with context_of(folder, "float32", tp_size=1, is_loaded=False) as context:
        outcome = check_lifecycle(context)
    assert (outcome.finding, outcome.compared) == (None, 0)
    assert outcome.skipped is not None
    assert "tp_size=2" in outcome.skipped


def test_threads_that_raise_are_green(folder: Path) -> None:
    assert_green(run_check("lifecycle", folder, case=asdict(RAISED)))


def test_a_failure_that_nobody_noticed_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "fail", lambda how: None)
    outcome = run_check("lifecycle", folder, case=asdict(RAISED))
    assert outcome.finding is not None
    assert "nobody noticed" in outcome.finding
    assert outcome.case == asdict(RAISED)


def test_ranks_that_generate_something_else_afterwards_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, loads = EngineRank.load, 0

    def load_worse_each_time(self: EngineRank, folder: Path, **how: Any) -> None:
        nonlocal loads
        load(self, folder, **how)
        loads += 1
        if loads > 2:
            self.runner.model.lm_head.weight.data.neg_()

    monkeypatch.setattr(EngineRank, "load", load_worse_each_time)
    outcome = run_check("lifecycle", folder, case=asdict(RAISED))
    assert outcome.finding is not None
    assert "other token ids" in outcome.finding


@pytest.mark.multirank
def test_a_process_that_hides_its_phase_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's side alone is patched: what it makes of a death."""
    import engine.ranks.jobs as rank_jobs

    make = rank_jobs.make_failure

    def forgetful(job: str, errors: Any, *arguments: Any, **options: Any) -> RankFailure:
        return make(job, {rank: replace(error, phase="?") for rank, error in errors.items()}, *arguments, **options)

    monkeypatch.setattr(rank_jobs, "make_failure", forgetful)
    outcome = run_check("lifecycle", folder, case=asdict(KILLED))
    assert outcome.finding is not None
    assert "reported in phase '?'" in outcome.finding

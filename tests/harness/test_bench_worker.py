"""Workers answer, tell what went wrong, and leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.bench.worker import Worker, WorkerError
from tests.harness import bench_calls as calls


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("the worker") as started:
        yield started


def is_gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_calls_share_a_state_that_lives_as_long_as_the_worker(worker: Worker) -> None:
    assert [worker.call(calls.add, number) for number in (1, 2, 3)] == [1, 3, 6]


def test_what_a_call_raises_comes_home_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"line that failed|ValueError: too bad") as caught:
        worker.call(calls.fail, "too bad\nadvice that goes on")
    assert caught.value.summary == "the worker: ValueError: too bad"
    assert "bench_calls.py" in str(caught.value)
    assert worker.call(calls.add, 1) == 1


def test_a_worker_that_dies_is_told_with_its_last_words(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="died with exit code 7\nlast words"):
        worker.call(calls.die)
    assert worker.is_closed


def test_a_worker_that_hangs_is_ended(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"no answer within timeout_s=0\.5"):
        worker.call(calls.hang, timeout_s=0.5)
    assert worker.is_closed


def test_closing_ends_what_the_worker_started() -> None:
    with Worker("parent") as worker:
        pid = worker.call(calls.leave_a_child)
        assert psutil.pid_exists(pid)
    assert is_gone(pid)
    worker.close()


def test_workers_hash_alike_so_that_none_is_faster_by_chance() -> None:
    with Worker("one") as one, Worker("other") as other:
        assert one.call(calls.hash_of, "a name") == other.call(calls.hash_of, "a name")


def test_ctrl_c_in_the_terminal_does_not_reach_a_worker(worker: Worker) -> None:
    assert worker.call(calls.ignores_interrupts)


def test_a_worker_runs_the_code_of_the_checkout_that_it_is_given(tmp_path: Path) -> None:
    bench = tmp_path / "harness" / "bench"
    bench.mkdir(parents=True)
    original = Path(calls.__file__).parents[2] / "harness" / "bench" / "worker.py"
    for package in (tmp_path / "harness", bench, tmp_path / "tests", tmp_path / "tests" / "harness"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    (bench / "worker.py").write_text(original.read_text())
    other_add = "def add(state, number):\n    return 'of the other checkout'\n"
    (tmp_path / "tests" / "harness" / "bench_calls.py").write_text(other_add)
    with Worker("other", checkout=tmp_path) as worker:
        assert worker.call(calls.add, 1) == "of the other checkout"

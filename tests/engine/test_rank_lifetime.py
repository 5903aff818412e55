"""Ranks start or say why not, and end with whoever started them, however that ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]  # some machines have its stubs
import pytest
import torch

from engine.parallel.fabric import choose_fabric
from engine.parallel.ranks import Ranks
from tests.engine.rank_jobs import (
    ROOT,
    failing_within,
    hang_on,
    multirank,
    pid,
    skip_a_collective,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


@pytest.mark.parametrize(
    ("tp_size", "fabric", "device", "message"),
    [
        (0, "auto", "cpu", "tp_size=0"),
        (2, "solo", "cpu", "fabric='solo' is one rank, got tp_size=2"),
        (2, "nccl", "cpu", "fabric='nccl' needs device='cuda'.*device='cpu'"),
        (2, "mpi", "cpu", "fabric='mpi' is not one of auto, solo, threads, gloo, nccl"),
        (1, "auto", "meta", "device='meta' is not supported"),
    ],
)
def test_what_cannot_work_is_refused(tp_size: int, fabric: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranks(tp_size, fabric=fabric, device=device)


@pytest.mark.parametrize(
    ("num_gpus", "tp_size", "fabric", "device", "chosen"),
    [
        (0, 1, "auto", "cpu", ("solo", "cpu")),
        (0, 3, "auto", "cpu", ("gloo", "cpu")),
        (4, 4, "auto", "cuda", ("nccl", "cuda")),
        (1, 4, "auto", "cuda", ("threads", "cuda:0")),
        (4, 2, "auto", "cuda:3", ("threads", "cuda:3")),
        (2, 1, "auto", "cuda:1", ("solo", "cuda:1")),
        (1, 2, "threads", "cpu", ("threads", "cpu")),
        (1, 2, "nccl", "cuda", "needs a GPU for each of tp_size=2 ranks, torch sees 1"),
        (2, 2, "nccl", "cuda:1", "without an index, got device='cuda:1'"),
        (2, 2, "gloo", "cuda", "needs device='cpu', got device='cuda'"),
        (0, 2, "auto", "cuda", "torch sees no GPU"),
    ],
)
def test_auto_takes_what_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
    num_gpus: int,
    tp_size: int,
    fabric: str,
    device: str,
    chosen: tuple[str, str] | str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    if isinstance(chosen, str):
        with pytest.raises(ValueError, match=chosen):
            choose_fabric(tp_size, fabric, torch.device(device))
    else:
        name, place = choose_fabric(tp_size, fabric, torch.device(device))
        assert (name, str(place)) == chosen


@multirank
def test_ranks_that_cannot_join_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with failing_within(10) as caught:
        Ranks(2, fabric="gloo")
    assert caught.value.job == "start"
    assert "no-such-interface" in str(caught.value)


@multirank
def test_starting_has_a_deadline() -> None:
    with failing_within(8) as caught:
        Ranks(2, fabric="gloo", start_timeout_s=0.001)
    assert caught.value.job == "start"
    assert "no answer within timeout_s=0.001" in str(caught.value)


@multirank
def test_ranks_that_are_forgotten_are_ended() -> None:
    ranks = Ranks(2, fabric="gloo")
    pids = ranks.run(pid)
    del ranks
    gc.collect()
    assert wait_until_gone(pids, 3) == []


@multirank
def test_closing_ends_even_ranks_that_are_stuck() -> None:
    ranks = Ranks(2, fabric="gloo")
    ranks.submit(hang_on, 1, 30.0)
    started = time.monotonic()
    ranks.close()
    assert time.monotonic() - started < 2


def test_threads_that_were_stuck_in_a_collective_end_with_their_ranks() -> None:
    ranks = Ranks(3, fabric="threads")
    ranks.submit(skip_a_collective, 0)
    time.sleep(0.1)
    ranks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """The pids that are still alive after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_alive, pids)):
        time.sleep(0.02)
    return [rank_pid for rank_pid in pids if is_alive(rank_pid)]


def is_alive(process_id: int) -> bool:
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


DRIVER = """
import sys, time, os
from engine.parallel.ranks import Ranks
from tests.engine.rank_jobs import hang_on, pid, hold_the_interpreter, die_on
if __name__ == "__main__":
    ranks = Ranks(2, fabric="gloo")
    print(*ranks.run(pid), flush=True)
    if sys.argv[1] == "forks":
        child = os.fork()
        if child == 0:
            time.sleep(8)  # holds copies of all the driver's sockets
            os._exit(0)
        print(child, flush=True)
    if sys.argv[1] == "closes":
        ranks.close()
        time.sleep(60)  # to be killed when there are no ranks any more
    if sys.argv[1] != "leaves":
        ranks.run(hang_on, 1, 60.0)
"""


def start_driver(tmp_path: Path, script: str, *args: str) -> subprocess.Popen[str]:
    path = tmp_path / "driver.py"
    path.write_text(script)
    (tmp_path / "scratch").mkdir()
    return subprocess.Popen(
        [sys.executable, str(path), *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "scratch")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_empty_soon(folder: Path) -> bool:
    deadline = time.monotonic() + 5
    while (left := os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not left


@multirank
@pytest.mark.parametrize("how", ["killed", "forks", "closes"])
def test_ranks_do_not_outlive_a_driver_that_is_killed(tmp_path: Path, how: str) -> None:
    with start_driver(tmp_path, DRIVER, how) as driver:
        assert driver.stdout is not None
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2
        child = int(driver.stdout.readline()) if how == "forks" else None
        time.sleep(0.3)
        assert all(map(is_alive, pids)) is (how != "closes")
        assert len(os.listdir(tmp_path / "scratch")) == 1, "where multiprocessing's fork server listens"
        driver.kill()
        assert wait_until_gone(pids, 3) == []
        if child is not None:
            os.kill(child, signal.SIGKILL)
        assert is_empty_soon(tmp_path / "scratch"), "the fork server has tidied up"


@multirank
def test_a_driver_that_forgets_to_close_leaves_nothing_and_prints_nothing(tmp_path: Path) -> None:
    with start_driver(tmp_path, DRIVER, "leaves") as driver:
        out, err = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert wait_until_gone([int(word) for word in out.split()], 3) == []
    assert len(out.split()) == 2
    assert err == ""
    assert is_empty_soon(tmp_path / "scratch")


UNGUARDED = """
from engine.parallel.ranks import Ranks
with Ranks(2, fabric="gloo") as ranks:
    print("started")
"""


@multirank
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    with start_driver(tmp_path, UNGUARDED) as driver:
        out, err = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert out == ""
    assert 'if __name__ == "__main__"' in err
    assert "job 'start' failed" in err

"""Ranks start or say why not, and end with whoever started them, however that ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]  # some machines have its stubs
import pytest
import torch

from engine.ranks.forking import start_fork_server
from engine.ranks.process_ranks import ProcessHandle, ProcessPool
from engine.ranks.ranks import RankContext, Ranks, choose_fabric
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
from engine.ranks.ranks import Ranks
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


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files with a name short enough for sockets, which pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="ranks-", dir="/tmp") as folder:
        yield Path(folder)


def start_driver(tmp_path: Path, script: str, *args: str, scratch: Path) -> subprocess.Popen[str]:
    path = tmp_path / "driver.py"
    path.write_text(script)
    return subprocess.Popen(
        [sys.executable, str(path), *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
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
@pytest.mark.parametrize("how", [
    "killed", *(pytest.param(how, marks=pytest.mark.endurance) for how in ("forks", "closes"))])
def test_ranks_do_not_outlive_a_driver_that_is_killed(tmp_path: Path, scratch: Path, how: str) -> None:
    with start_driver(tmp_path, DRIVER, how, scratch=scratch) as driver:
        assert driver.stdout is not None
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2
        child = int(driver.stdout.readline()) if how == "forks" else None
        time.sleep(0.3)
        assert all(map(is_alive, pids)) is (how != "closes")
        assert len(os.listdir(scratch)) == 1, "where multiprocessing's fork server listens"
        driver.kill()
        assert wait_until_gone(pids, 3) == []
        if child is not None:
            os.kill(child, signal.SIGKILL)
        assert is_empty_soon(scratch), "the fork server has tidied up"


@multirank
def test_a_driver_that_forgets_to_close_leaves_nothing_and_prints_nothing(tmp_path: Path, scratch: Path) -> None:
    with start_driver(tmp_path, DRIVER, "leaves", scratch=scratch) as driver:
        out, err = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert wait_until_gone([int(word) for word in out.split()], 3) == []
    assert len(out.split()) == 2
    assert err == ""
    assert is_empty_soon(scratch)


UNGUARDED = """
from engine.ranks.ranks import Ranks
with Ranks(2, fabric="gloo") as ranks:
    print("started")
"""


@multirank
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path, scratch: Path) -> None:
    with start_driver(tmp_path, UNGUARDED, scratch=scratch) as driver:
        out, err = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert out == ""
    assert 'if __name__ == "__main__"' in err
    assert "job 'start' failed" in err


LISTENER = """
import glob, os, tempfile
from engine.ranks.ranks import Ranks
if __name__ == "__main__":
    with Ranks(2, fabric="gloo") as ranks:
        print("started", len(glob.glob(os.path.join(tempfile.gettempdir(), "pymp-*"))))
"""


@multirank
@pytest.mark.endurance
@pytest.mark.parametrize(("length", "in_there"), [(40, 1), (72, 1), (100, 0), (200, 0)])
def test_a_long_name_of_the_folder_for_temporary_files_is_no_obstacle(
    tmp_path: Path, scratch: Path, length: int, in_there: int
) -> None:
    folder = scratch / ("long" * 50)[: length - len(str(scratch)) - 1]
    folder.mkdir()
    assert len(str(folder)) == length
    with start_driver(tmp_path, LISTENER, scratch=folder) as driver:
        out, err = driver.communicate(timeout=60)
    assert (out, err) == (f"started {in_there}\n", "")


def test_a_folder_that_is_too_long_for_a_socket_and_cannot_be_helped_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: "/x" * 60)
    with pytest.raises(RuntimeError, match=r"too long for a socket of at most 10\d bytes: set TMPDIR to a shorter folder"):
        start_fork_server(2)


ON_STANDARD_INPUT = """
from engine.ranks.ranks import Ranks
def main():
    with Ranks(2, fabric="gloo") as ranks:
        print("started", len(ranks.run(print)))
        print(__file__)
if __name__ == "__main__":
    main()
"""


@multirank
@pytest.mark.parametrize("dash", [pytest.param(True, marks=pytest.mark.endurance), False])
def test_a_script_may_come_from_standard_input(dash: bool) -> None:
    done = subprocess.run([sys.executable, *["-"] * dash], input=ON_STANDARD_INPUT, cwd=ROOT, capture_output=True, text=True,
                          timeout=100, check=False)
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (0, ["started 2", "<stdin>"]), done.stderr


def collector(context: RankContext) -> tuple[bool, bool]:
    return gc.isenabled(), gc.get_freeze_count() > 100_000


@multirank
def test_ranks_collect_garbage_but_not_what_their_server_loaded() -> None:
    """The server itself collects none, to load sooner."""
    with Ranks(2, fabric="gloo") as ranks:
        assert ranks.run(collector) == [(True, True)] * 2


def in_a_daemon(context: RankContext) -> str:
    with pytest.raises(RuntimeError) as caught:
        Ranks(2, fabric="gloo")
    Ranks(2, fabric="threads").close()
    return str(caught.value)


@multirank
def test_a_daemonic_process_is_told_that_it_may_not_start_ranks() -> None:
    with Ranks(1, fabric="gloo") as ranks:
        (said,) = ranks.run(in_a_daemon)
    assert said.startswith("2 ranks are processes, and a daemonic process such as a worker of multiprocessing.Pool may not")
    assert "daemon=False" in said
    assert "fabric='threads'" in said


def test_a_process_that_never_started_is_sent_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    process = multiprocessing.get_context("forkserver").Process(target=print)
    (ours, theirs), (dump, their_dump) = multiprocessing.Pipe(), multiprocessing.Pipe()
    handle = ProcessHandle(rank=0, process=process, connection=ours, dump=dump)
    pool = ProcessPool(1, "gloo", start_timeout_s=1.0, collective_timeout_s=1.0)
    pool._adopt(handle)
    reports = pool.inspect([0], 0.01, lambda *message: None, insist=True)
    assert reports[0].log is None
    pool.kill("it never started")
    assert sent == [], "pid 0 is this process and its whole group"
    for end in (theirs, their_dump):
        end.close()


@multirank
def test_a_rank_that_died_this_moment_is_no_trouble_to_who_asks_it_for_its_stacks() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        victim = ranks._pool._handles[0]  # type: ignore[attr-defined]
        victim_pid = victim.process.pid
        os.kill(victim_pid, signal.SIGKILL)
        assert wait_until_gone([victim_pid], 3) == []
        victim.process.is_alive = lambda: True  # as it was a moment ago
        try:
            ranks._pool._dump_stacks([victim])  # type: ignore[attr-defined]
        except ProcessLookupError as error:
            pytest.fail(f"the signal to a process that is gone was an error: {error}")
        del victim.process.is_alive

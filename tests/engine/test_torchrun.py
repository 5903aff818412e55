"""Ranks that torchrun started: rank 0 drives, whatever host the others are on; a death ends the run with its report."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]  # some machines have its stubs
import pytest
import torch

from engine.ranks.ranks import RankContext, RankFailure, Ranks
from engine.ranks.torchrun import Launch, check_launch, greet, launched, serve

ROOT = Path(__file__).parents[2]
ENVIRON = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h0", "MASTER_PORT": "1"}
DRIVER = Launch(rank=0, tp_size=2, local_rank=0, local_size=1, host="h0")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def torchrun(words: Sequence[str], *, hosts: int, ranks_a_host: int, timeout_s: float = 90.0) -> list[tuple[int, str, float]]:
    """Launchers on this machine that take themselves for hosts. (exit code, all output, when it ended) of each."""
    port = free_port()
    launchers = []
    for host in range(hosts):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(hosts), "--nproc-per-node", str(ranks_a_host),
                   "--node-rank", str(host), "--master-addr", "127.0.0.1", "--master-port", str(port), *words]
        launchers.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
    results = []
    try:
        for launcher in launchers:
            output, _ = launcher.communicate(timeout=timeout_s)
            results.append((launcher.returncode, output, time.time()))
    finally:
        for launcher in launchers:
            left = [*psutil.Process(launcher.pid).children(recursive=True)] if launcher.poll() is None else []
            for process in left:
                process.kill()
            launcher.kill()
            launcher.communicate()
    return results


# --- what the ranks run: this very module, started by torchrun ---


def total(context: RankContext, count: int) -> tuple[int, int, list[float]]:
    return context.tp.rank, os.getpid(), context.tp.all_reduce(torch.ones(count)).tolist()


def remember(context: RankContext, value: int) -> list[int]:
    seen: list[int] = context.state.setdefault("seen", [])
    seen.append(value)
    return seen


def raise_everywhere(context: RankContext) -> None:
    raise KeyError(f"layer of rank {context.tp.rank}")


def die(context: RankContext, rank: int) -> None:
    context.phase = "prefill"
    if context.tp.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    context.tp.barrier()


def drive(launch: Launch, end: str) -> None:
    size = launch.tp_size
    with Ranks(size, launch=launch) as ranks:
        assert (ranks.fabric, ranks.healthy, ranks.can_restart) == ("gloo", True, False)
        results = ranks.run(total, 3, timeout_s=30)
        assert [rank for rank, *_ in results] == list(range(size))
        assert results[0][1] == os.getpid(), "rank 0 is this process"
        assert len({process for _, process, _ in results}) == size
        assert all(values == [float(size)] * 3 for *_, values in results)
        handles = [ranks.submit(remember, value) for value in range(3)]
        assert [ranks.collect(handle)[0] for handle in handles] == [[0], [0, 1], [0, 1, 2]], "in order, with their state"
        with pytest.raises(RankFailure) as caught:
            ranks.run(raise_everywhere, timeout_s=30)
        assert [error.summary for error in caught.value.failures.values()] == [
            f"KeyError: 'layer of rank {rank}'" for rank in range(size)]
        assert ranks.healthy, "all ranks answered and are in step"
        if end == "closes":
            ranks.close(exit_code=5)
            sys.exit(5)
        began = time.time()
        with pytest.raises(RankFailure) as caught:
            ranks.run(die, size - 1)
        print(str(caught.value).split("\n\n", 1)[0], flush=True)  # noqa: T201
        with pytest.raises(RuntimeError, match="can't be replaced"):
            ranks.run(total, 3)
        with pytest.raises(RuntimeError, match="can't be replaced"):
            ranks.restart()
        print(f"died at {began}", flush=True)  # noqa: T201
    sys.exit(3)


if __name__ == "__main__":
    this_launch = launched()
    assert this_launch is not None
    if this_launch.rank > 0:
        sys.exit(serve(this_launch))
    drive(this_launch, sys.argv[1])


# --- the tests ---


# Of these two tests, which do the same with jobs, the default selection has one.


@pytest.mark.multirank
@pytest.mark.endurance
@pytest.mark.parametrize(("hosts", "ranks_a_host"), [(2, 1), (1, 2)], ids=["on two hosts", "on one host"])
def test_jobs_run_on_ranks_and_all_end_with_the_drivers_exit_code(hosts: int, ranks_a_host: int) -> None:
    for code, output, _ in torchrun(["-m", __name__, "closes"], hosts=hosts, ranks_a_host=ranks_a_host):
        assert "exitcode  : 5" in output, output
        assert code == 1, "torchrun's own code for ranks that ended with another than 0"


@pytest.mark.multirank
@pytest.mark.parametrize(("hosts", "ranks_a_host"), [
    (2, 1), pytest.param(1, 2, marks=pytest.mark.endurance)], ids=["on another host", "on rank 0's host"])
def test_a_rank_that_is_killed_ends_the_run_with_its_report(hosts: int, ranks_a_host: int) -> None:
    results = torchrun(["-m", __name__, "kills"], hosts=hosts, ranks_a_host=ranks_a_host)
    driver = results[0][1]
    assert "job 'die' failed on ranks 0, 1 of 2 (gloo)" in driver, driver
    assert "rank 1, in phase 'prefill': its connection closed: the process, or its host, is gone" in driver
    assert "rank 0 (a consequence), in phase 'prefill'" in driver
    assert "exitcode  : -9" in results[-1][1], "torchrun on the dead rank's host says how it ended"
    if hosts == 2:
        assert "exitcode  : 3" in driver, "rank 0 came to its own end"
    died_at = float(driver.split("died at ")[1].split()[0])
    assert all(code == 1 and ended - died_at < 10 for code, _, ended in results)


def test_a_process_that_torchrun_did_not_start_has_no_launch() -> None:
    assert launched({}) is None
    assert launched({name: value for name, value in ENVIRON.items() if name != "MASTER_ADDR"}) is None
    launch = launched(ENVIRON)
    assert launch == Launch(rank=1, tp_size=4, local_rank=1, local_size=2, host="h0")
    assert not launch.one_host


@pytest.mark.parametrize(("changes", "tp_size", "fabric", "device", "says"), [
    ({"rank": 1}, 2, "auto", "cpu", "rank=1 can't drive"),
    ({}, 3, "auto", "cpu", "tp_size=3, but torchrun started 2 ranks"),
    ({}, 2, "threads", "cpu", "fabric='threads', but torchrun's ranks on device='cpu' are joined by gloo"),
    ({}, 2, "auto", "cuda:1", "device='cuda:1' is not supported under torchrun"),
])
def test_what_torchruns_ranks_cannot_do_is_refused(changes: dict[str, int], tp_size: int, fabric: str, device: str,
                                                   says: str) -> None:
    launch = Launch(**{"rank": 0, "tp_size": 2, "local_rank": 0, "local_size": 1, "host": "h0"} | changes)
    with pytest.raises(ValueError, match=says):
        check_launch(launch, tp_size, fabric, torch.device(device))


def test_on_gpus_each_rank_has_the_one_of_its_place_on_the_host() -> None:
    launch = Launch(rank=0, tp_size=4, local_rank=1, local_size=2, host="h0")
    assert check_launch(launch, 4, "auto", torch.device("cuda")) == ("nccl", torch.device("cuda:1"))


@pytest.mark.parametrize(("rank", "secret", "known"), [
    (1, b"s" * 32, True), (1, b"x" * 32, False), (0, b"s" * 32, False), (2, b"s" * 32, False), ("1", b"s" * 32, False),
], ids=["a rank", "another secret", "rank 0", "no such rank", "no number"])
def test_only_ranks_that_know_the_secret_are_let_in(rank: object, secret: bytes, known: bool) -> None:
    ours, theirs = socket.socketpair()
    with Connection(theirs.detach()) as caller:
        thread = threading.Thread(target=call, args=(caller, secret, rank))
        thread.start()
        greeted = greet(ours, b"s" * 32, DRIVER)
        thread.join()
        assert (greeted is not None) is known
        if greeted is not None:
            assert greeted[0] == rank
            greeted[1].close()


def call(connection: Connection, secret: bytes, rank: object) -> None:
    with contextlib.suppress(AuthenticationError, EOFError, OSError):
        answer_challenge(connection, secret)
        deliver_challenge(connection, secret)
        connection.send(rank)


@pytest.mark.parametrize("says", [b"GET / HTTP/1.1\r\n\r\n", b"", b"\0\0\0\4what"], ids=["HTTP", "nothing", "no answer"])
def test_a_stranger_is_sent_away_within_seconds(says: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(says)
        started = time.monotonic()
        assert greet(ours, b"s" * 32, DRIVER) is None
        assert time.monotonic() - started < 5

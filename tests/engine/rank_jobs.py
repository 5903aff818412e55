"""Jobs for live ranks, of those that fail in every way, and what ranks could leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]  # some machines have its stubs
import pytest
import torch

from engine.ranks.ranks import RankContext, RankFailure

ROOT = Path(__file__).parents[2]
ALL = [
    pytest.param(("solo", 1), id="solo-1"),
    pytest.param(("threads", 2), id="threads-2"),
    pytest.param(("gloo", 2), id="gloo-2", marks=pytest.mark.multirank),
]
SHARED = ALL[1:]
multirank = pytest.mark.multirank


def footprint() -> dict[str, Any]:
    """What ranks could leave behind in this process and on this machine."""
    me = psutil.Process()
    helpers = [  # one of each a process, for its lifetime: they belong to multiprocessing
        child
        for child in me.children()
        if re.search(r"multiprocessing\.(forkserver|resource_tracker)", " ".join(child.cmdline()))
    ]
    return {
        "processes": sorted({child.pid for child in me.children(recursive=True)} - {h.pid for h in helpers}),
        "ports": sorted(c.laddr.port for c in me.net_connections("tcp") if c.status == psutil.CONN_LISTEN),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
        "shared memory": sorted(set(os.listdir("/dev/shm")) - shared_memory_of_others()),
        "intra-op threads": torch.get_num_threads(),
    }


def shared_memory_of_others() -> set[str]:
    """Names in /dev/shm that processes map which this one did not start: another test run, another program."""
    if not os.listdir("/dev/shm"):
        return set()
    me = psutil.Process()
    found: set[str] = set()
    for process_id in set(psutil.pids()) - {me.pid, *(child.pid for child in me.children(recursive=True))}:
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look into
            found |= set(re.findall(r"/dev/shm/(\S+)$", Path(f"/proc/{process_id}/maps").read_text(), flags=re.MULTILINE))
    return found


@contextlib.contextmanager
def failing_within(seconds: float) -> Iterator[pytest.ExceptionInfo[RankFailure]]:
    started = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        yield caught
    assert time.monotonic() - started < seconds




def who(context: RankContext) -> tuple[int, int, str]:
    return context.tp.rank, context.tp.size, context.tp.fabric


def total(context: RankContext, x: torch.Tensor) -> torch.Tensor:
    return context.tp.all_reduce(x * (context.tp.rank + 1))


def remember(context: RankContext, value: int) -> list[int]:
    seen: list[int] = context.state.setdefault("seen", [])
    seen.append(value)
    return seen


def report_progress(context: RankContext, steps: int) -> str:
    for step in range(steps):
        context.emit({"step": step, "rank": context.tp.rank})
    return "done"


def change_argument(context: RankContext, x: torch.Tensor) -> float:
    x += context.tp.rank + 1
    context.tp.barrier()
    return x.sum().item()


def last_row(context: RankContext, rows: int) -> torch.Tensor:
    return torch.arange(rows * 1000).view(rows, 1000)[-1]


def echo(context: RankContext, value: Any) -> Any:
    return value


def environment(context: RankContext, name: str) -> str | None:
    return os.environ.get(name)


def pid(context: RankContext) -> int:
    return os.getpid()


def raise_on(context: RankContext, rank: int, *, then_wait: bool) -> None:
    context.tp.barrier()
    if context.tp.rank == rank:
        context.phase = "load"
        raise ValueError(f"bad weight on rank {rank}")
    if then_wait:
        context.tp.all_reduce(torch.ones(4, 178, dtype=torch.bfloat16))


def raise_everywhere(context: RankContext) -> None:
    context.tp.barrier()
    raise KeyError("layer.7")


def raise_inside_own_framework(context: RankContext) -> None:
    pytest.fail("as a test would")


def die_on(context: RankContext, rank: int, how: Callable[[], Any], *, then_wait: bool = True) -> None:
    if context.tp.rank == rank:
        context.phase = "prefill"
        how()
    if then_wait:
        context.tp.barrier()


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)
    time.sleep(30)


def read_null() -> None:
    ctypes.string_at(0)


def hold_the_interpreter() -> None:
    re.match("(a+)+$", "a" * 60 + "b")


def sleep_long() -> None:
    time.sleep(30)


def hang_on(context: RankContext, rank: int, seconds: float) -> None:
    for _ in range(6):
        context.tp.all_reduce(torch.ones(4, 178, dtype=torch.bfloat16))
    if context.tp.rank == rank:
        wait_for_godot(seconds)
        return
    context.tp.all_reduce(torch.ones(4, 178, dtype=torch.bfloat16))


def wait_at_most(context: RankContext, rank: int, bound_s: float, seconds: float) -> str:
    """``rank`` stays away; the others wait, as for a device in a replay: their log says that they have gone on."""
    context.phase = "generate"
    if context.tp.rank == rank:
        sleep_long()
    context.tp.log.enter("replay")
    context.tp.log.finish()
    with context.at_most(bound_s, "waits for its device"):
        wait_for_godot(seconds)
    wait_for_godot(2 * bound_s)  # no bound holds any more
    return "in time"


def wait_for_godot(seconds: float) -> None:
    time.sleep(seconds)


def skip_a_collective(context: RankContext, rank: int) -> str:
    context.tp.barrier()
    if context.tp.rank != rank:
        context.tp.all_reduce(torch.ones(2, 8))
    return "done"


def nap(context: RankContext, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def unpicklable(context: RankContext) -> Any:
    return lambda: None


class ExplodesOnArrival:
    """Can be pickled in a rank, and not unpickled by the driver."""

    def __init__(self, driver: int) -> None:
        self.driver = driver

    def __reduce__(self) -> tuple[Any, ...]:
        return explode_in, (self.driver,)


def explode_in(driver: int) -> ExplodesOnArrival:
    if os.getpid() == driver:
        raise ImportError("not here")
    return ExplodesOnArrival(driver)


def explosive(context: RankContext, driver: int) -> ExplodesOnArrival:
    return ExplodesOnArrival(driver)

"""Live ranks: jobs, failures of every kind told in full, and nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]  # some machines have its stubs
import pytest
import torch

from engine.parallel.fabric import choose_fabric
from engine.parallel.ranks import RankContext, RankFailure, Ranks

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
        "shared memory": sorted(os.listdir("/dev/shm")),
        "intra-op threads": torch.get_num_threads(),
    }


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Start multiprocessing's helpers, so that they do not count as left behind by the first test."""
    Ranks(2, fabric="gloo").close()
    torch.cuda.device_count()  # keeps a file of the driver's open


@pytest.fixture(autouse=True)
def nothing_is_left_behind(fork_server: None) -> Iterator[None]:
    before = footprint()
    yield
    deadline = time.monotonic() + 3
    while (after := footprint()) != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert after == before


@contextlib.contextmanager
def failing_within(seconds: float) -> Iterator[pytest.ExceptionInfo[RankFailure]]:
    started = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        yield caught
    assert time.monotonic() - started < seconds


# --- jobs ---


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


# --- jobs that succeed ---


@pytest.mark.parametrize("kind", ALL)
def test_a_job_runs_on_every_rank_and_keeps_state(kind: tuple[str, int]) -> None:
    fabric, size = kind
    with Ranks(size, fabric=fabric) as ranks:
        assert ranks.run(who) == [(rank, size, fabric) for rank in range(size)]
        results = ranks.run(total, torch.ones(2, 3), timeout_s=20)
        assert all(torch.equal(result, torch.full((2, 3), sum(range(size + 1)))) for result in results)
        ranks.run(remember, 1)
        assert ranks.run(remember, 2) == [[1, 2]] * size
        ranks.restart()
        assert ranks.run(remember, 3) == [[3]] * size
    with pytest.raises(RuntimeError, match="closed"):
        ranks.run(who)
    ranks.close()


@pytest.mark.parametrize("kind", ALL)
def test_events_arrive_in_order_while_the_job_runs(kind: tuple[str, int]) -> None:
    fabric, size = kind
    events: list[tuple[int, Any]] = []
    with Ranks(size, fabric=fabric) as ranks:
        ranks.run(report_progress, 50, on_event=lambda rank, payload: events.append((rank, payload)))
        assert ranks.run(report_progress, 2) == ["done"] * size, "events that nobody wants are dropped"
    for rank in range(size):
        assert [payload["step"] for source, payload in events if source == rank] == list(range(50))
    assert len(events) == 50 * size


@pytest.mark.parametrize("kind", SHARED)
def test_arguments_travel_by_value(kind: tuple[str, int]) -> None:
    x = torch.zeros(3)
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        assert ranks.run(change_argument, x) == [3.0, 6.0]
    assert x.sum() == 0


@multirank
def test_a_view_travels_as_its_own_elements() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        for row in ranks.run(last_row, 200):
            assert torch.equal(row, torch.arange(199_000, 200_000))
            assert row.untyped_storage().nbytes() == 8000


@multirank
def test_tensors_of_every_kind_come_back_as_they_were() -> None:
    values = [
        torch.arange(6).view(2, 3).t(),
        torch.ones((), dtype=torch.bfloat16),
        torch.empty(0, 4),
        torch.randn(5, requires_grad=True),
        torch.nn.Parameter(torch.randn(4, 4)[1:3]),
        torch.ones(3).expand(2, 3),
        torch.tensor([1 + 2j]),
    ]
    with Ranks(2, fabric="gloo") as ranks:
        for returned in ranks.run(echo, values):
            for before, after in zip(values, returned, strict=True):
                assert type(before) is type(after)
                assert (before.dtype, before.shape) == (after.dtype, after.shape)
                assert before.requires_grad == after.requires_grad
                assert torch.equal(before, after)


@multirank
def test_big_payloads_pass_both_ways_with_jobs_in_flight() -> None:
    big = torch.arange(5_000_000, dtype=torch.float32)  # 20 MB
    with Ranks(2, fabric="gloo") as ranks:
        tickets = [ranks.submit(echo, big + n) for n in range(2)]
        for n, ticket in enumerate(tickets):
            for result in ranks.collect(ticket, timeout_s=30):
                assert torch.equal(result, big + n)


@pytest.mark.parametrize("kind", ALL)
def test_jobs_in_flight_run_in_order_and_can_be_collected_in_any(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        tickets = [ranks.submit(remember, n) for n in range(4)]
        assert [ranks.collect(tickets[n])[0][n] for n in (0, 2, 1, 3)] == [0, 2, 1, 3]
        with pytest.raises(RuntimeError, match="collected before"):
            ranks.collect(tickets[0])


@multirank
def test_ranks_see_the_environment_as_it_is_when_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDPROOF_TEST_ONLY", "seen")
    with Ranks(2, fabric="gloo") as ranks:
        assert ranks.run(environment, "SHARDPROOF_TEST_ONLY") == ["seen", "seen"]


@multirank
def test_ranks_live_side_by_side() -> None:
    with (
        Ranks(2, fabric="gloo") as one,
        Ranks(2, fabric="gloo") as other,
        Ranks(2, fabric="threads") as third,
    ):
        pids = [*one.run(pid), *other.run(pid)]
        assert len(set(pids)) == 4
        tickets = [(ranks, ranks.submit(total, torch.ones(2))) for ranks in (one, other, third)]
        for ranks, ticket in tickets:
            assert ranks.collect(ticket, timeout_s=20)[0].tolist() == [3.0, 3.0]
        assert set(third.run(pid)) == {os.getpid()}


def test_a_partial_is_a_job_and_a_local_function_is_one_without_processes() -> None:
    with Ranks(2, fabric="threads") as ranks:
        assert ranks.run(functools.partial(echo, value=3)) == [3, 3]
        assert ranks.run(lambda context: context.tp.rank) == [0, 1]


# --- jobs that fail ---


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("then_wait", [False, True])
def test_one_rank_that_raises_is_the_cause(kind: tuple[str, int], then_wait: bool) -> None:
    job = functools.partial(raise_on, rank=1, then_wait=then_wait)
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        with failing_within(3) as caught:
            ranks.run(job)
        failure = caught.value
        cause = failure.failures[1]
        assert (cause.kind, cause.phase, cause.consequence) == ("raised", "load", False)
        assert cause.summary == "ValueError: bad weight on rank 1"
        assert "in raise_on" in cause.traceback
        assert "job 'raise_on' failed" in str(failure)
        assert "rank 1, in phase 'load': ValueError: bad weight on rank 1" in str(failure)
        assert list(failure.failures) == ([1, 0] if then_wait else [1]), "causes come first"
        assert ranks.healthy is not then_wait
        if then_wait:
            assert failure.failures[0].consequence
            assert "rank 1 never entered all_reduce #2 (4×178 bfloat16) called at test_ranks.py:" in str(failure)
            with pytest.raises(RuntimeError, match=r"(?s)need restart\(\).*bad weight"):
                ranks.run(who)
            ranks.restart()
        assert [rank for rank, *_ in ranks.run(who)] == [0, 1]
        assert ranks.run(total, torch.ones(1), timeout_s=20)[0].item() == 3


@pytest.mark.parametrize("kind", ALL)
def test_ranks_that_all_raise_stay_usable(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        ranks.run(remember, 1)
        for _ in range(3):
            with failing_within(2) as caught:
                ranks.run(raise_everywhere)
            assert [error.summary for error in caught.value.failures.values()] == ["KeyError: 'layer.7'"] * kind[1]
            assert ranks.healthy
        assert ranks.run(remember, 2) == [[1, 2]] * kind[1]
        assert ranks.run(total, torch.ones(1), timeout_s=20)[0].item() == sum(range(kind[1] + 1))


def test_the_exception_itself_is_kept_where_ranks_share_the_process() -> None:
    with Ranks(1) as ranks, pytest.raises(RankFailure) as caught:
        ranks.run(raise_everywhere)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("kind", ALL)
def test_a_test_framework_can_fail_inside_a_rank(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        with pytest.raises(RankFailure, match="as a test would"):
            ranks.run(raise_inside_own_framework)
        assert ranks.healthy


def test_a_failure_can_be_sent_on() -> None:
    with Ranks(2, fabric="threads") as ranks, pytest.raises(RankFailure) as caught:
        ranks.run(raise_everywhere)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.failures == caught.value.failures


@multirank
@pytest.mark.parametrize(
    ("how", "says", "trace"),
    [
        (kill_self, "killed by SIGKILL", ""),
        (functools.partial(kill_self, signal.SIGTERM), "killed by SIGTERM", ""),
        (functools.partial(os._exit, 7), "exited with code 7", ""),
        (functools.partial(sys.exit, 3), "exited with code 3", ""),
        (read_null, "killed by SIGSEGV", "in read_null"),
        (os.abort, "killed by SIGABRT", "in die_on"),
    ],
    ids=["kill", "term", "_exit", "sys.exit", "segfault", "abort"],
)
@pytest.mark.parametrize("then_wait", [False, True])
def test_a_rank_that_dies_is_the_cause(how: Callable[[], Any], says: str, trace: str, then_wait: bool) -> None:
    with Ranks(2, fabric="gloo", auto_restart=True) as ranks:
        with failing_within(5) as caught:
            ranks.run(functools.partial(die_on, then_wait=then_wait), 1, how)
        failure = caught.value
        first = next(iter(failure.failures.values()))
        assert (first.rank, first.kind, first.phase, first.consequence) == (1, "died", "prefill", False)
        assert first.summary == says
        assert trace in first.traceback
        assert f"rank 1, in phase 'prefill': {says}" in str(failure)
        if then_wait:
            assert failure.failures[0].consequence
        assert not ranks.healthy
        assert ranks.run(total, torch.ones(1), timeout_s=20)[0].item() == 3, "restarted by itself"


@multirank
@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_a_rank_killed_between_jobs_is_found_by_the_next(pause_s: float) -> None:
    with Ranks(2, fabric="gloo") as ranks:
        os.kill(ranks.run(pid)[1], signal.SIGKILL)
        time.sleep(pause_s)
        with failing_within(5) as caught:
            ranks.run(total, torch.ones(1))
        assert caught.value.failures[1].summary == "killed by SIGKILL"


@multirank
def test_a_rank_killed_from_outside_in_mid_job_is_found_at_once() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        victim = ranks.run(pid)[0]
        timer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
        timer.start()
        with failing_within(4) as caught:
            ranks.run(nap, 20.0)
        timer.join()
        assert caught.value.failures[0].summary == "killed by SIGKILL"
        assert caught.value.failures[0].phase == "nap"
        assert "in nap" in caught.value.failures[1].stacks


@pytest.mark.parametrize("kind", SHARED)
def test_a_hang_is_told_with_stacks_and_the_collective_that_was_never_entered(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        ranks.run(who)  # so that the deadline is not spent on imports
        with failing_within(5) as caught:
            ranks.run(hang_on, 1, 2.0, timeout_s=0.7)
        failure = caught.value
        line = hang_on.__code__.co_firstlineno + 6
        assert "no answer within timeout_s=0.7" in str(failure)
        never_entered = f"all_reduce #7 (4×178 bfloat16) called at test_ranks.py:{line}"
        assert f"rank 1 never entered {never_entered}" in str(failure)
        assert list(failure.failures) == [1, 0], "the rank that is behind comes first"
        guilty, waiting = failure.failures[1], failure.failures[0]
        assert (guilty.kind, guilty.consequence) == ("stuck", False)
        assert (waiting.kind, waiting.consequence) == ("stuck", True)
        assert "in wait_for_godot" in guilty.stacks
        assert waiting.summary == f"stuck in {never_entered}"
        assert "in hang_on" in waiting.stacks
        assert not ranks.healthy


@pytest.mark.parametrize("kind", SHARED)
def test_a_rank_that_skips_a_collective_needs_no_deadline_to_be_found(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        with failing_within(4) as caught:
            ranks.run(skip_a_collective, 1)
        assert "rank 1 never entered all_reduce #2 (2×8 float32)" in str(caught.value)


def differ_unnoticed(context: RankContext, rank: int) -> float:
    x = torch.ones(4, 8) if context.tp.rank == rank else torch.ones(8, 4)
    return context.tp.all_reduce(x).sum().item()


@multirank
def test_ranks_that_mix_up_their_collectives_fail_even_if_nobody_hangs() -> None:
    with Ranks(2, fabric="gloo", auto_restart=True) as ranks:
        assert ranks.run(differ_unnoticed, 5) == [64.0, 64.0], "the control: no rank differs"
        with failing_within(3) as caught:
            ranks.run(differ_unnoticed, 1)
        assert "entered different collectives" in str(caught.value)
        assert "part at #2: rank 0 entered all_reduce #2 (8×4 float32)" in str(caught.value)
        assert "rank 1 entered all_reduce #2 (4×8 float32)" in str(caught.value)
        assert ranks.run(differ_unnoticed, 5) == [64.0, 64.0]


@pytest.mark.parametrize("kind", ALL)
def test_a_slow_rank_is_not_taken_for_a_stuck_one(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        assert ranks.run(slow_last_rank, 1.0) == list(range(kind[1]))


def slow_last_rank(context: RankContext, seconds: float) -> int:
    context.tp.barrier()
    if context.tp.rank == context.tp.size - 1:
        time.sleep(seconds)
    return context.tp.rank


@multirank
@pytest.mark.parametrize(
    ("how", "stacks"),
    [
        (sleep_long, "in sleep_long"),
        (hold_the_interpreter, "in hold_the_interpreter"),
        (functools.partial(kill_self, signal.SIGSTOP), ""),
    ],
    ids=["sleeps", "holds the interpreter", "is stopped"],
)
def test_a_rank_that_cannot_answer_is_still_ended_and_told(how: Callable[[], Any], stacks: str) -> None:
    with Ranks(2, fabric="gloo") as ranks:
        ranks.run(who)  # so that the deadline is not spent on imports
        with failing_within(6) as caught:
            ranks.run(die_on, 1, how, timeout_s=0.7)
        error = caught.value.failures[1]
        assert (error.kind, error.phase, error.consequence) == ("stuck", "prefill", False)
        assert stacks in error.stacks


@multirank
def test_a_collective_has_a_deadline_of_its_own() -> None:
    with Ranks(2, fabric="gloo", collective_timeout_s=1.0) as ranks:
        with failing_within(8) as caught:
            ranks.run(hang_on, 1, 30.0)
        assert "rank 1 never entered all_reduce #7" in str(caught.value)


@pytest.mark.parametrize("kind", SHARED)
def test_a_failure_takes_the_jobs_behind_it_along(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        first = ranks.submit(raise_everywhere)
        second = ranks.submit(total, torch.ones(1))
        with failing_within(5):
            ranks.collect(first)
        assert not ranks.healthy
        with pytest.raises(RuntimeError, match=r"(?s)lost with the ranks.*layer\.7"):
            ranks.collect(second)


@multirank
def test_what_cannot_be_sent_harms_nothing() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        with pytest.raises(TypeError, match="can't be sent to the ranks"):
            ranks.run(lambda context: None)
        with pytest.raises(TypeError, match="'echo' or its arguments can't be sent"):
            ranks.run(echo, threading.Lock())
        with pytest.raises(RankFailure, match="in phase 'sending the result'"):
            ranks.run(unpicklable)
        assert ranks.healthy
        assert ranks.run(echo, 1) == [1, 1]


@multirank
def test_a_result_that_the_driver_cannot_read_is_the_ranks_failure() -> None:
    with Ranks(2, fabric="gloo", auto_restart=True) as ranks:
        with pytest.raises(RankFailure, match="ImportError: not here"):
            ranks.run(explosive, os.getpid())
        assert ranks.run(echo, 1) == [1, 1]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts a process in the background has it ignore Ctrl-C: here it must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kind", SHARED)
def test_ctrl_c_ends_the_ranks_at_once(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ranks.run(hang_on, 1, 2.0)
        assert time.monotonic() - started < 2
        timer.join()
        with pytest.raises(RuntimeError, match="KeyboardInterrupt while job 'hang_on' ran"):
            ranks.run(who)


@multirank
def test_ranks_themselves_ignore_ctrl_c() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        for rank_pid in ranks.run(pid):
            os.kill(rank_pid, signal.SIGINT)
        assert ranks.run(echo, 1) == [1, 1]


@pytest.mark.parametrize("kind", SHARED)
def test_an_on_event_that_raises_ends_the_job(kind: tuple[str, int]) -> None:
    def refuse(rank: int, payload: Any) -> None:
        raise LookupError("no thanks")

    with Ranks(kind[1], fabric=kind[0]) as ranks:
        with pytest.raises(LookupError, match="no thanks"):
            ranks.run(report_progress, 3, on_event=refuse)
        assert not ranks.healthy


# --- GPUs ---

multigpu = [pytest.mark.multigpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def sum_on_gpu(context: RankContext) -> tuple[str, torch.Tensor]:
    context.tp.barrier()
    return str(context.device), context.tp.all_reduce(torch.ones(3, device=context.device))


def fail_on_gpu(context: RankContext, how: str) -> None:
    context.tp.all_reduce(torch.ones(4, 178, device=context.device)).sum().item()
    if context.tp.rank == 1:
        context.phase = "prefill"
        if how == "raises":
            raise ValueError("bad weight")
        if how == "is killed":
            kill_self()
        wait_for_godot(60)
    context.tp.all_reduce(torch.ones(4, 178, device=context.device)).sum().item()


class TestOnGPUs:
    pytestmark = multigpu

    def test_each_rank_has_its_gpu_and_results_arrive_on_the_cpu(self) -> None:
        with Ranks(2, device="cuda") as ranks:
            assert ranks.fabric == "nccl"
            results = ranks.run(sum_on_gpu, timeout_s=60)
            assert [device for device, _ in results] == ["cuda:0", "cuda:1"]
            assert all(x.device.type == "cpu" and x.tolist() == [2.0] * 3 for _, x in results)
        initialized: Callable[[], bool] = torch.cuda.is_initialized
        assert not initialized(), "the driver keeps off the GPUs"

    @pytest.mark.parametrize(
        ("how", "summary"),
        [
            ("raises", "ValueError: bad weight"),
            ("is killed", "killed by SIGKILL"),
            ("hangs", "stuck outside any collective; the last it finished was all_reduce #1"),
        ],
    )
    def test_a_rank_that_fails_is_the_cause_and_can_be_replaced(self, how: str, summary: str) -> None:
        with Ranks(2, fabric="nccl", device="cuda", auto_restart=True) as ranks:
            ranks.run(sum_on_gpu, timeout_s=60)
            ranks.restart()
            with failing_within(20) as caught:
                ranks.run(fail_on_gpu, how, timeout_s=10)
            error = next(iter(caught.value.failures.values()))
            assert (error.rank, error.phase, error.consequence) == (1, "prefill", False)
            assert error.summary.startswith(summary)
            if how != "is killed":
                assert "rank 1 never entered all_reduce #2 (4×178 float32)" in str(caught.value)
            assert ranks.run(sum_on_gpu, timeout_s=60)[1][1].tolist() == [2.0] * 3


# --- starting and leaving ---


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
from tests.engine.test_ranks import hang_on, pid, hold_the_interpreter, die_on
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

"""Ranks that fail, in every way: told in full, within seconds, and usable again where they can be."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.ranks import pool
from engine.ranks.pool import limit_stalls
from engine.ranks.ranks import RankContext, RankFailure, Ranks
from tests.engine.rank_jobs import (
    ALL,
    SHARED,
    die_on,
    echo,
    explosive,
    failing_within,
    hang_on,
    hold_the_interpreter,
    kill_self,
    multirank,
    nap,
    pid,
    raise_everywhere,
    raise_inside_own_framework,
    raise_on,
    read_null,
    remember,
    report_progress,
    skip_a_collective,
    sleep_long,
    total,
    unpicklable,
    wait_at_most,
    who,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


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
            assert "rank 1 never entered all_reduce #2 (4×178 bfloat16) called at rank_jobs.py:" in str(failure)
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
        pytest.param(kill_self, "killed by SIGKILL", "", id="kill"),
        pytest.param(functools.partial(kill_self, signal.SIGTERM), "killed by SIGTERM", "", id="term",
                     marks=pytest.mark.endurance),
        pytest.param(functools.partial(os._exit, 7), "exited with code 7", "", id="_exit", marks=pytest.mark.endurance),
        pytest.param(functools.partial(sys.exit, 3), "exited with code 3", "", id="sys.exit"),
        pytest.param(read_null, "killed by SIGSEGV", "in read_null", id="segfault"),
        pytest.param(os.abort, "killed by SIGABRT", "in die_on", id="abort", marks=pytest.mark.endurance),
    ],
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
        never_entered = f"all_reduce #7 (4×178 bfloat16) called at rank_jobs.py:{line}"
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
def test_a_wait_that_takes_longer_than_it_may_ends_the_job_and_the_rank_that_stayed_away_is_the_cause() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        with failing_within(6) as caught:
            ranks.run(wait_at_most, 1, 0.3, 60.0)
        cause, other = caught.value.failures.values()
        assert (cause.rank, cause.kind, cause.consequence) == (1, "stuck", False)
        assert (other.rank, other.kind, other.consequence) == (0, "stuck", True)
        assert (other.phase, other.summary) == ("generate", "waits for its device")
        assert "wait_for_godot" in other.stacks
        assert not ranks.healthy


def test_a_wait_that_ends_in_time_is_no_failure() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        assert ranks.run(wait_at_most, -1, 1.0, 0.1) == ["in time"] * 2


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


def stop_in_mid_message(context: RankContext) -> None:
    if context.tp.rank == 1:
        connection = context.send_event.func.__self__._connection  # type: ignore[attr-defined]
        os.write(connection.fileno(), struct.pack("!i", 1000) + b"not all of it")
        kill_self(signal.SIGSTOP)


@multirank
@pytest.mark.parametrize("who_speaks", ["the rank", "the driver"])
def test_a_rank_that_stops_in_the_middle_of_a_message_holds_the_deadline_up_for_seconds_alone(
    monkeypatch: pytest.MonkeyPatch, who_speaks: str
) -> None:
    monkeypatch.setattr(pool, "limit_stalls", functools.partial(limit_stalls, seconds=1))
    with Ranks(2, fabric="gloo", auto_restart=True) as ranks:
        victim = ranks.run(pid)[1]
        with failing_within(6) as caught:
            if who_speaks == "the rank":
                ranks.run(stop_in_mid_message, timeout_s=0.3)
            else:
                os.kill(victim, signal.SIGSTOP)
                ranks.run(echo, torch.zeros(5_000_000), timeout_s=0.3)
        assert caught.value.failures[1].kind == "stuck"
        assert ranks.run(echo, 1) == [1, 1]


@multirank
def test_a_collective_has_a_deadline_of_its_own() -> None:
    with Ranks(2, fabric="gloo", collective_timeout_s=1.0) as ranks:
        with failing_within(8) as caught:
            ranks.run(hang_on, 1, 30.0)
        assert "rank 1 never entered all_reduce #7" in str(caught.value)


@pytest.mark.parametrize("kind", SHARED)
def test_a_job_has_the_ranks_deadline_unless_it_has_its_own(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0], job_timeout_s=0.5) as ranks:
        assert ranks.run(nap, 1.0, timeout_s=20.0) == [1.0] * kind[1]
        with failing_within(6) as caught:
            ranks.run(nap, 2.0)
        assert "no answer within timeout_s=0.5" in str(caught.value)


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

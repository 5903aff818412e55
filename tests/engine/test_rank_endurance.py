"""Failures of every kind in a row: each is told for what it is, the next clean example passes, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

from engine.ranks.ranks import RankContext, RankFailure, Ranks
from tests.engine.rank_jobs import footprint

KINDS = {
    # how a rank fails: (what the report calls it, what it says)
    "value": (None, ""),
    "raises before": ("raised", "ValueError: planted"),
    "raises after": ("raised", "ValueError: planted"),
    "raises everywhere": ("raised", "ValueError: planted"),
    "exits": ("died", "exited with code 7"),
    "is killed": ("died", "killed by SIGKILL"),
    "hangs": ("stuck", "stuck outside any collective"),
}
HANG_S = 1.0
SHARES = {"value": 4, "raises before": 3, "raises after": 3, "raises everywhere": 4, "exits": 2, "is killed": 2, "hangs": 2}
"""Of 20."""


def example(rank: RankContext, how: str, victim: int) -> list[float]:
    """A clean example, or one in which ``victim`` fails."""
    rank.phase = "example"
    is_victim = rank.tp.rank == victim
    if how == "raises everywhere" or (how == "raises before" and is_victim):
        raise ValueError("planted")
    if is_victim:
        fail_for_good(how)
    y = rank.tp.all_reduce(torch.ones(4))
    if how == "raises after" and is_victim:
        raise ValueError("planted")
    return (y + 1 if how == "value" and is_victim else y).tolist()


def fail_for_good(how: str) -> None:
    if how == "exits":
        os._exit(7)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(60)


def schedule(count: int) -> list[tuple[str, int]]:
    """(how, victim): every kind in its share, in an order that is the same each time."""
    hows = [how for how, share in SHARES.items() for _ in range(share * count // 20)]
    draw = random.Random(count)
    draw.shuffle(hows)
    return [(how, draw.randrange(2)) for how in hows]


def endure(ranks: Ranks, how: str, victim: int) -> None:
    kind, says = KINDS[how]
    if kind is None:
        results = ranks.run(example, how, victim)
        assert results[victim] == [3.0] * 4
        assert results[1 - victim] == [2.0] * 4
        return
    started = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        ranks.run(example, how, victim, timeout_s=HANG_S if how == "hangs" else None)
    assert time.monotonic() - started < HANG_S + 9
    error = caught.value.failures[victim]
    assert (error.kind, error.phase, error.consequence) == (kind, "example", False)
    assert says in error.summary


@pytest.mark.multirank
@pytest.mark.usefixtures("nothing_is_left_behind")
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.endurance)])
def test_after_failures_in_a_row_the_next_example_is_green_and_nothing_is_left(count: int) -> None:
    plan = schedule(count)
    assert len(plan) == count
    assert {how for how, _ in plan} == set(KINDS)
    with Ranks(2, fabric="gloo", auto_restart=True) as ranks:
        assert ranks.run(example, "nothing", -1) == [[2.0] * 4] * 2
        inside = footprint()
        for number, (how, victim) in enumerate(plan):
            endure(ranks, how, victim)
            assert ranks.run(example, "nothing", -1, timeout_s=30) == [[2.0] * 4] * 2, f"after failure {number}: {how}"
        after = footprint()
    assert {what: len(after[what]) for what in ("processes", "ports", "threads", "shared memory")} == {
        what: len(inside[what]) for what in ("processes", "ports", "threads", "shared memory")}, "between failures, too"
    assert after["files"] == inside["files"]

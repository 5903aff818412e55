"""Hypothesis over live ranks: what fails on a rank shrinks to the smallest example, hangs and all, in bounded time."""

from __future__ import annotations

import functools
import importlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from engine.ranks.failures import RankError
from engine.ranks.ranks import RankContext, RankFailure, Ranks
from harness.live_ranks import HANG_ATTEMPTS, HangBudget, RankPools, RanksForTests, fingerprint

TP_SIZE = 2
ROWS, FEATURES = 3, 6
"""The smallest example that goes wrong."""
NEVER_ENTERED = re.compile(
    rf"rank 1 never entered all_reduce #\d+ \({ROWS}×{FEATURES} float32\) called at test_live_ranks.py:\d+")

examples = given(rows=st.integers(0, 64), features=st.integers(1, 512))
patient = settings(deadline=None, database=None, max_examples=100, derandomize=True)


def is_wrong(rows: int, features: int) -> bool:
    return rows >= ROWS and features >= FEATURES


def sum_wrongly(rank: RankContext, rows: int, features: int) -> torch.Tensor:
    y = rank.tp.all_reduce(torch.ones(rows, features))
    if rank.tp.rank == 1 and is_wrong(rows, features):
        y[-1, -1] += 1
    return y


def sum_or_raise(rank: RankContext, rows: int, features: int) -> None:
    if rank.tp.rank == 1 and is_wrong(rows, features):
        raise ValueError(f"rows={rows} features={features}")
    rank.tp.all_reduce(torch.ones(rows, features))


def sum_or_hang(rank: RankContext, rows: int, features: int) -> None:
    if rank.tp.rank == 1 and is_wrong(rows, features):
        time.sleep(60)
    rank.tp.all_reduce(torch.ones(rows, features))


def shrink(test: Any) -> tuple[BaseException, list[tuple[int, int]]]:
    """What the test raised in the end, and the examples that ran: they are counted, since seconds are the machine's."""
    ran: list[tuple[int, int]] = []

    @patient
    @examples
    def run(rows: int, features: int) -> None:
        try:
            test(rows, features)
        except UnsatisfiedAssumption:
            raise  # rejected unseen
        except BaseException:
            ran.append((rows, features))
            raise
        ran.append((rows, features))

    with pytest.raises((AssertionError, RankFailure)) as caught:
        run()
    return caught.value, ran


@pytest.mark.multirank
def test_a_wrong_value_on_one_rank_shrinks_to_the_smallest_example(ranks: RankPools) -> None:
    def sums_agree(rows: int, features: int) -> None:
        for rank, y in enumerate(ranks(TP_SIZE).run(sum_wrongly, rows, features)):
            assert y.eq(TP_SIZE).all(), f"rank {rank} is wrong at {rows}×{features}"

    failure, ran = shrink(sums_agree)
    assert f"rank 1 is wrong at {ROWS}×{FEATURES}" in str(failure)
    assert len(ran) <= 40


@pytest.mark.multirank
def test_an_exception_on_one_rank_shrinks_to_the_smallest_example(ranks: RankPools) -> None:
    failure, ran = shrink(lambda rows, features: ranks(TP_SIZE).run(sum_or_raise, rows, features))
    assert f"rank 1, in phase 'sum_or_raise': ValueError: rows={ROWS} features={FEATURES}" in str(failure)
    assert NEVER_ENTERED.search(str(failure))
    assert len(ran) <= 40


@pytest.mark.multirank
def test_a_hang_shrinks_in_few_attempts(ranks: RankPools) -> None:
    failure, ran = shrink(lambda rows, features: ranks(TP_SIZE).run(sum_or_hang, rows, features, timeout_s=1.0))
    assert NEVER_ENTERED.search(str(failure))
    assert "in sum_or_hang\n    time.sleep(60)" in str(failure)
    first = next(number for number, example in enumerate(ran) if is_wrong(*example))
    assert len(ran[first:]) <= 30


SLOW_MODULE = """
import os, time
time.sleep(2.0)
def leave(rank, how):
    rank.tp.barrier()
    if how == "dies":
        os._exit(7)
    return "here"
"""


@pytest.mark.multirank
def test_a_deadline_is_for_the_job_and_not_for_what_new_ranks_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text(SLOW_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    leave = importlib.import_module("slow_to_import").leave
    with RanksForTests(TP_SIZE, fabric="gloo", auto_restart=True) as live:
        live.budget = HangBudget()
        for _ in range(2):
            assert live.run(leave, "stays", timeout_s=1.5) == ["here", "here"]
            with pytest.raises(RankFailure, match="exited with code 7"):
                live.run(leave, "dies", timeout_s=1.5)
    with Ranks(TP_SIZE, fabric="gloo") as others, pytest.raises(RankFailure, match=r"no answer within timeout_s=1\.5"):
        others.run(leave, "stays", timeout_s=1.5)


# --- the budget alone: hangs are only told ---


def hang(rows: int, features: int) -> None:
    stuck = RankError(rank=1, kind="stuck", phase="", summary="")
    raise RankFailure("hang", {1: stuck}, tp_size=2, fabric=f"rows={rows} features={features}")


def run_within(budget: HangBudget, ran: list[tuple[int, int]], rows: int, features: int) -> None:
    somewhere_else = torch.empty(len(ran) * 100)  # so that no tensor is where it was before
    budget.admit((torch.full((rows, features), 0.5), rows, {"features": features}, somewhere_else.dtype))
    ran.append((rows, features))
    # Nothing about the drawn numbers but this one rule: shrinking has a long way to go.
    if (rows * 64 + features) % 3 == 0 and rows > 20:
        try:
            hang(rows, features)
        except RankFailure as failure:
            budget.note(failure)
            raise


@pytest.mark.parametrize("attempts", [0, 3, HANG_ATTEMPTS])
def test_when_the_attempts_are_spent_the_smallest_hang_so_far_is_told(attempts: int) -> None:
    ran: list[tuple[int, int]] = []
    budget = HangBudget(attempts)
    failure, _ = shrink(lambda rows, features: run_within(budget, ran, rows, features))
    hung = [example for example in ran if example[0] > 20 and (example[0] * 64 + example[1]) % 3 == 0]
    first = ran.index(hung[0])
    assert len(set(ran[first:]) - set(ran[:first])) <= attempts + 1
    assert isinstance(failure, RankFailure)
    assert failure.fabric == "rows={} features={}".format(*hung[-1])


def test_more_attempts_find_a_smaller_hang() -> None:
    smallest = {}
    for attempts in (3, 1000):
        ran: list[tuple[int, int]] = []
        budget = HangBudget(attempts)
        shrink(functools.partial(run_within, budget, ran))
        smallest[attempts] = ran[-1]
    assert smallest[3] > smallest[1000]


def test_arguments_are_the_same_when_their_tensors_bits_are() -> None:
    base = torch.arange(12.0)
    known = fingerprint((base.view(3, 4), 1))
    kept = [base.clone() for _ in range(8)]
    assert all(fingerprint((again.view(3, 4), 1)) == known for again in kept)
    others = [(base.view(4, 3), 1), (base.view(3, 4), 2), (base.view(3, 4).half(), 1), (base.view(3, 4).t(), 1),
              (torch.nn.Parameter(base.view(3, 4)), 1), (base.view(3, 4) + torch.eye(3, 4), 1)]
    assert len({known, *map(fingerprint, others)}) == 1 + len(others)
    assert fingerprint((torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0, 3))) != known
    with pytest.raises(TypeError, match="can't be sent to the ranks"):
        fingerprint((lambda: None,))


def test_outside_hypothesis_nothing_is_rejected() -> None:
    budget = HangBudget(0)
    for rows in range(3):
        budget.admit((rows, 1))
        with pytest.raises(RankFailure) as caught:
            hang(rows, 1)
        budget.note(caught.value)


def test_an_exception_or_a_death_is_no_hang() -> None:
    budget = HangBudget(0)
    for kind in ("raised", "died"):
        error = RankError(rank=1, kind=kind, phase="", summary="")  # type: ignore[arg-type]
        budget.note(RankFailure("job", {1: error}, tp_size=2, fabric="gloo"))

    @patient
    @examples
    def all_are_admitted(rows: int, features: int) -> None:
        budget.admit((rows, features))

    all_are_admitted()

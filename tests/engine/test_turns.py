"""Rank threads that take turns: one at a time while that is quick, side by side where it is not, and never stuck."""

from __future__ import annotations

from engine.parallel.turns import TURNS_WITHOUT_WAITING, Turns


def test_a_turn_is_one_ranks_until_it_gives_it() -> None:
    turns = Turns()
    assert turns.take(0)
    turns.give(1)  # not its own
    assert not turns.take(1), "rank 0 has it"
    turns.give(0)
    for _ in range(TURNS_WITHOUT_WAITING):
        assert not turns.take(1), "who waited in vain runs beside the others for a while"
    assert turns.take(1)
    turns.give(0)
    turns.give(1)
    assert turns.take(0)


def test_a_rank_that_never_gives_its_turn_holds_nobody_up() -> None:
    turns = Turns()
    assert turns.take(0)
    assert not any(turns.take(1) for _ in range(10 * TURNS_WITHOUT_WAITING))

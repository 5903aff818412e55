"""Large imports go without the garbage collector, and leave it as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from engine.collector import without_collector


class Node:
    """Something that the collector looks after."""


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> Iterator[None]:
    was_frozen = gc.get_freeze_count()  # by pytest's configuration here
    gc.unfreeze()
    yield
    gc.enable()
    if was_frozen:
        gc.freeze()


def test_nothing_is_collected_meanwhile_and_what_came_up_counts_as_old() -> None:
    looks: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        looks.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        with without_collector():
            made = [Node() for _ in range(100_000)]
    finally:
        gc.callbacks.remove(note)
    assert looks == []
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    old = {id(one) for one in gc.get_objects(generation=2)}
    assert all(id(one) in old for one in made)


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with without_collector(), without_collector():
        pass
    assert not gc.isenabled()


def test_inside_another_the_outer_one_decides() -> None:
    with without_collector():
        with without_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_is_frozen_stays_so_and_an_exception_passes() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError, match="no such thing"), without_collector():
        raise ImportError("no such thing")
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen

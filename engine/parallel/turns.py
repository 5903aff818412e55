"""Rank threads that compute one after the other, while what each computes between two collectives is short."""

from __future__ import annotations

import threading

PATIENCE_S = 0.001
TURNS_WITHOUT_WAITING = 8


class Turns:
    """Has the threads of one group run one at a time, from one collective to the next.

    Each operation of torch lets go of the interpreter. Threads that take it from each other at every one of them spend more on
    that than tiny operations take. Nobody depends on a turn: a thread that waited ``PATIENCE_S`` in vain runs beside the others,
    and nobody waits for the next ``TURNS_WITHOUT_WAITING`` turns. So large operations run side by side, and no rank is held up
    by one that sleeps or hangs.
    """

    def __init__(self) -> None:
        self._taken = threading.Lock()
        self._rank: int | None = None
        self._without_waiting = 0

    def take(self, rank: int) -> bool:
        """Before a rank computes. Whether it is its turn: else it runs beside the others."""
        if self._without_waiting > 0:
            self._without_waiting -= 1
            return False
        if not self._taken.acquire(timeout=PATIENCE_S):
            self._without_waiting = TURNS_WITHOUT_WAITING
            return False
        self._rank = rank
        return True

    def give(self, rank: int) -> None:
        """When it waits for the others, or is done. Does nothing if the turn is not its own."""
        if self._rank == rank:
            self._rank = None
            self._taken.release()

"""Rank threads that compute one after the other, while what each computes between two collectives is short."""

from __future__ import annotations

import threading

PATIENCE_S = 0.001
"""A tiny model's layers take less than this between two collectives, and those of a real one longer."""
TURNS_WITHOUT_WAITING = 8
"""After a wait in vain. More cost tiny models what turns save them, and fewer hold real models up."""


class Turns:
    """Has the threads of one group run one at a time, from one collective to the next.

    Each operation of torch releases the GIL, and threads that hand it to each other at every one spend more time on that than on
    tiny operations. A turn is a hint, no lock: a thread that waited ``PATIENCE_S`` in vain runs beside the others, and nobody
    waits for the next ``TURNS_WITHOUT_WAITING`` turns. So large operations run side by side, and a rank that sleeps or hangs
    holds nobody up.
    """

    def __init__(self) -> None:
        self._taken = threading.Lock()
        self._rank: int | None = None
        self._without_waiting = 0

    def take(self, rank: int) -> bool:
        """Called before a rank computes. Returns whether it is its turn; if not, it runs beside the others."""
        if self._without_waiting > 0:
            self._without_waiting -= 1
            return False
        if not self._taken.acquire(timeout=PATIENCE_S):
            self._without_waiting = TURNS_WITHOUT_WAITING
            return False
        self._rank = rank
        return True

    def give(self, rank: int) -> None:
        """Called when a rank waits for the others, or is done. Does nothing if it is another's turn."""
        if self._rank == rank:
            self._rank = None
            self._taken.release()

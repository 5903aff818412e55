"""What each rank's collectives were, in order, and how the logs of all ranks are held against each other.

Ranks in one tensor-parallel group must enter the same collectives in the same order. When one does not, the
others wait for ever inside a collective that it never enters, so the log is written *before* a collective
starts and can be read from another thread while the rank is stuck.
"""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

RING_SIZE = 256
"""How many of the latest collectives a log keeps. The running counts are never cut."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective as one rank entered it. ``number`` counts from 1 over the life of the group."""

    number: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    site: str

    def __str__(self) -> str:
        content = f" ({self.content})" if self.dtype else ""
        return f"{self.op} #{self.number}{content} called at {self.site}"

    @property
    def content(self) -> str:
        """Shape and dtype for people: ``4×178 bfloat16``; a 0-dim tensor is a ``scalar``."""
        shape = "×".join(map(str, self.shape)) or "scalar"
        return f"{shape} {self.dtype}"

    def agrees_with(self, other: Collective) -> bool:
        """Whether two ranks can have meant the same collective. The call site may differ between ranks."""
        return (self.op, self.shape, self.dtype) == (other.op, other.shape, other.dtype)


@dataclass(frozen=True, slots=True)
class LogSnapshot:
    """A log at one moment: plain data, to be sent home.

    digest   of every collective entered so far (op, shape, dtype), equal on ranks that entered the same ones
    records  the latest, oldest first
    """

    entered: int
    finished: int
    digest: int = 0
    records: tuple[Collective, ...] = ()

    @property
    def inside(self) -> bool:
        """Whether the rank is inside a collective, or left one by an exception."""
        return self.entered != self.finished

    @property
    def last(self) -> Collective | None:
        return self.records[-1] if self.records else None

    def numbered(self, number: int) -> Collective | None:
        """The collective of that number, or None where the log no longer (or does not yet) hold it."""
        if not self.records:
            return None
        position = number - self.records[0].number
        return self.records[position] if 0 <= position < len(self.records) else None


@functools.cache
def _checksum(name: object) -> int:
    return zlib.crc32(str(name).encode())


_Entry = tuple[int, str, Sequence[int], torch.dtype | None, str, int]


class CollectiveLog:
    """One rank's collectives: running counts and a ring of the latest. Written by the rank, read by anyone.

    Costs one to two microseconds a collective: one frame look-up, no text is made until someone reads.
    On CUDA ``finished`` means that the host has gone on; the device may still be working.
    """

    __slots__ = ("_ring", "digest", "entered", "finished")

    def __init__(self) -> None:
        self.entered = 0
        self.finished = 0
        self.digest = 0
        self._ring: list[_Entry | None] = [None] * RING_SIZE

    def enter(self, op: str, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> None:
        """Note that a collective starts. The call site is the nearest caller outside the group's own code."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename in OWN_FILES and frame.f_back is not None:
            frame = frame.f_back
        number = self.entered + 1
        # The record goes in before the count, so that a reader never sees a number without its record.
        self._ring[number % RING_SIZE] = (number, op, shape, dtype, frame.f_code.co_filename, frame.f_lineno)
        self.entered = number
        # Hashes of integers are the same in every process, those of strings are not.
        self.digest = hash((self.digest, _checksum(op), _checksum(dtype), *shape))

    def finish(self) -> None:
        """Note that the collective entered last came back."""
        self.finished = self.entered

    @property
    def last(self) -> Collective | None:
        """The collective entered last, or None before the first."""
        tail = self.tail(1)
        return tail[-1] if tail else None

    def tail(self, count: int = RING_SIZE) -> tuple[Collective, ...]:
        """The latest ``count`` collectives, oldest first (at most ``RING_SIZE``)."""
        entered = self.entered
        oldest = max(1, entered - min(count, RING_SIZE) + 1)
        # Another thread may be writing: what it overtakes carries a number outside the range and drops out.
        kept = sorted(
            (entry for entry in self._ring[:] if entry is not None and oldest <= entry[0] <= entered),
            key=lambda entry: entry[0],
        )
        return tuple(
            Collective(
                number=number,
                op=op,
                shape=tuple(shape),
                dtype="" if dtype is None else str(dtype).removeprefix("torch."),
                site=f"{os.path.basename(filename)}:{line}",
            )
            for number, op, shape, dtype, filename, line in kept
        )

    def snapshot(self, count: int = RING_SIZE) -> LogSnapshot:
        """The log as plain data. ``count`` = 0 leaves the records out and keeps the counts."""
        finished = self.finished
        return LogSnapshot(self.entered, finished, self.digest, self.tail(count) if count else ())


OWN_FILES = {__file__}
"""Source files whose frames are never a call site; ``group.py`` adds itself."""


def compare_logs(logs: Mapping[int, LogSnapshot]) -> list[str]:
    """Sentences on where the ranks' logs part, the earliest divergence only; empty when they agree.

    Either two ranks entered different collectives under the same number, or some ranks never entered one that
    others did: ``rank 1 never entered all_reduce #7 (4×178 bfloat16) called at linear.py:88``.
    """
    if len(logs) < 2:
        return []
    shortest = min(log.entered for log in logs.values())
    longest = max(log.entered for log in logs.values())
    for number in range(max(1, longest - RING_SIZE + 1), shortest + 1):
        here = {rank: record for rank, log in logs.items() if (record := log.numbered(number)) is not None}
        groups: list[tuple[Collective, list[int]]] = []
        for rank, record in sorted(here.items()):
            for known, ranks in groups:
                if known.agrees_with(record):
                    ranks.append(rank)
                    break
            else:
                groups.append((record, [rank]))
        if len(groups) > 1:
            met = "; ".join(f"{name_ranks(ranks)} entered {record}" for record, ranks in groups)
            return [f"the ranks' collectives part at #{number}: {met}"]
    if shortest == longest:
        return []
    behind = [rank for rank, log in sorted(logs.items()) if log.entered == shortest]
    first_missed = next((record for log in logs.values() if (record := log.numbered(shortest + 1)) is not None), None)
    missed = str(first_missed) if first_missed else f"collective #{shortest + 1}"
    sentence = f"{name_ranks(behind)} never entered {missed}"
    lasts = {last for rank in behind if (last := logs[rank].last) is not None}
    if len(lasts) == 1:
        sentence += f"; the last it entered was {lasts.pop()}" if len(behind) == 1 else ""
    return [sentence]


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 1`` or ``ranks 0, 2``."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"

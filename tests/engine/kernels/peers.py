"""Ranks as threads around a memory of the host's, for the plain twins of what GPUs do with each other's memory."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from engine.kernels.peer_all_reduce import FLAG_BYTES, MAX_PROGRAMS, PeerMemory


def shared_memory(size: int, half_bytes: int = 1024, room_bytes: int = 0) -> list[PeerMemory]:
    """Each rank's view of one memory."""
    parts = tuple(torch.zeros(FLAG_BYTES + 2 * half_bytes + 2 * room_bytes, dtype=torch.uint8) for _ in range(size))
    return [PeerMemory(rank, size, half_bytes, parts, torch.zeros(MAX_PROGRAMS, dtype=torch.int64), room_bytes)
            for rank in range(size)]


def on_ranks(memories: list[PeerMemory], job: Callable[[PeerMemory], Any], *, timeout_s: float = 60.0) -> list[Any]:
    """``job`` on every rank at once; the results in rank order. What a rank raises is raised."""
    results: list[Any] = [None] * len(memories)
    failures: list[BaseException] = []

    def run(memory: PeerMemory) -> None:
        try:
            results[memory.rank] = job(memory)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(memory,), daemon=True) for memory in memories]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert failures or not thread.is_alive(), "a rank waits for ever"
    if failures:
        raise failures[0]
    return results


def integers(rank: int, call: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """One rank's numbers for a call: no two calls have the same sums, and every dtype counts exactly that far."""
    return ((torch.arange(count) * 7 + 5 * rank + 3 * call) % 23 + rank).to(dtype)


def dawdle(draw: random.Random) -> None:
    """Be late, now and then."""
    if draw.random() < 0.2:
        time.sleep(draw.random() * 2e-3)

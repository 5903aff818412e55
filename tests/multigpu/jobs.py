"""Jobs of the tests on NCCL ranks: what runs there must be importable there."""

from __future__ import annotations

import os
import signal

import torch

from engine.ranks.ranks import RankContext


def sum_of_ranks(rank: RankContext) -> float:
    """1 + 2 + ... over the ranks, by one all-reduce, on every rank."""
    total = rank.tp.all_reduce(torch.full((1000,), rank.tp.rank + 1.0, device=rank.device))
    assert total.unique().numel() == 1
    return total[0].item()


def die_before_the_all_reduce(rank: RankContext, victim: int) -> float:
    """The victim is killed as the system kills: at once, without a word. The others wait for it on their GPUs."""
    rank.phase = "summing"
    if rank.tp.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum_of_ranks(rank)

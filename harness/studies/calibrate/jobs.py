"""What runs inside the ranks: sums over them in another order, an error in one rank's part, and a model's logits.

Groups stand before another one, both for threads, which are quick to start and take any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.parallel.group import TPGroup
from engine.ranks.ranks import RankContext
from harness.subjects.base import Loaded, Schedule
from harness.subjects.engine_rank import EngineRank
from harness.subjects.on_ranks import load_on

ORDERS = ("flat", "ring")
"""Of summation over the ranks: in float32 and rounded once, as threads do; or along a ring and rounded at every step, as gloo."""


class _Behind(TPGroup):
    """All collectives are those of another group."""

    def __init__(self, inner: TPGroup) -> None:
        super().__init__(inner.rank, inner.size, inner.fabric)
        self.inner = inner
        # One count a rank: a new one, from 0, would look like a rank that never entered what others did.
        self.log = inner.log

    def _all_reduce(self, x: Tensor) -> Tensor:
        return self.inner.all_reduce(x)

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self.inner.all_gather(x, dim=dim)

    def _all_reduce_min(self, value: int) -> int:
        return self.inner.all_reduce_min(value)

    def _barrier(self) -> None:
        self.inner.barrier()


class RingGroup(_Behind):
    """Sums as gloo does on a CPU: along a ring, rounded to the dtype at every step.

    The flat tensor is cut into ``size`` pieces of equal and even length, the last ones shorter or empty. Piece ``c`` starts
    on rank ``c - 1`` and takes in ranks ``c - 2``, ``c - 3`` and so on down, and rank ``c`` last.
    """

    def _all_reduce(self, x: Tensor) -> Tensor:
        parts = self.inner.all_gather(x.reshape(1, -1), dim=0)
        return ring_sum(parts).view(x.shape)


def ring_sum(parts_PN: Tensor) -> Tensor:
    """``[ranks, N] -> [N]``, each addition rounded to the dtype."""
    size, length = parts_PN.shape
    total = torch.empty_like(parts_PN[0])
    per_piece = 2 * max(1, -(-length // (2 * size)))
    for piece, start in enumerate(range(0, length, per_piece)):
        span = slice(start, start + per_piece)
        order = [(piece - step) % size for step in range(1, size + 1)]
        running = parts_PN[order[0], span]
        for rank in order[1:]:
            running = running + parts_PN[rank, span]
        total[span] = running
    return total


class SpoilingGroup(_Behind):
    """One rank's part is too large by a factor before every sum.

    Args:
        tp_rank: whose part.
        error: relative, 0.01 for one percent.
    """

    def __init__(self, inner: TPGroup, *, tp_rank: int, error: float) -> None:
        super().__init__(inner)
        self.factor = 1 + error if inner.rank == tp_rank else 1.0

    def _all_reduce(self, x: Tensor) -> Tensor:
        return self.inner.all_reduce((x.double() * self.factor).to(x.dtype) if self.factor != 1 else x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoiled:
    """A planted error: this rank's part is too large by this much, relatively."""

    tp_rank: int
    error: float


def arrange(rank: RankContext, order: str, spoiled: Spoiled | None = None) -> None:
    """Job: from now on the rank sums in that order, with that error in its part of every sum."""
    own: TPGroup = rank.state.setdefault("own_group", rank.tp)
    group = RingGroup(own) if order == "ring" else own
    rank.tp = group if spoiled is None else SpoilingGroup(group, tp_rank=spoiled.tp_rank, error=spoiled.error)


def load_model(rank: RankContext, folder: Path, dtype: str, options: dict[str, int]) -> None:
    """Job: load the engine, with the sums that are arranged."""
    load_on(rank, EngineRank, Loaded(folder=folder, dtype=dtype, options=options))


def run_logits(rank: RankContext, schedule: Schedule, path: str | None = None, planted: Spoiled | None = None) -> list[Tensor]:
    """Job: the loaded model's logits, from rank 0. ``path``: of the one module whose sum is spoiled."""
    subject = rank.state["subject"]
    if path is None or planted is None:
        return _from_first(rank, subject.logits(schedule))
    module = subject.runner.model.get_submodule(path)
    clean = module.tp
    try:
        module.tp = SpoilingGroup(clean, tp_rank=planted.tp_rank, error=planted.error)
        return _from_first(rank, subject.logits(schedule))
    finally:
        module.tp = clean


def _from_first(rank: RankContext, logits: list[Tensor]) -> list[Tensor]:
    return [torch.cat(logits)] if rank.tp.rank == 0 else []

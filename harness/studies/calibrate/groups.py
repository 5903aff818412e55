"""Groups that stand before another one: one sums in the order of a ring, one spoils a rank's part.

Both for threads, which are quick to start and take any number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.parallel.group import TPGroup


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

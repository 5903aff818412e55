"""Matrix products that are summed in drawn orders: what another machine, or another library, may make of them.

Shape suffixes: B = products in a batch, M = rows, N = columns, K = addends, L = lanes that are summed apart, S = addends of each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ranks.ranks import JobHandle, RankContext, Ranks
from harness.verification.simulated import EveryProduct

LANES = (1, 1, 2, 4, 8, 16, 32)
MOST_ELEMENTS = 1 << 24
"""Of all lanes of a product together, so that they fit into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One way to add up K products."""

    lanes: int
    """Blocks of addends that are summed apart, one after the other, as vector units do; 1: one sequential sum; K: pairwise."""
    pairwise: bool
    """The lanes' sums are added in pairs of pairs; if not, one after the other."""
    permuted: bool
    fused: bool
    """Multiply and add round once."""
    addend_first: bool
    """What is added to the product, a bias, is there before the sum; if not, it is added in the end."""
    seed: int

    @classmethod
    def draw(cls, draw: random.Random, num_addends: int) -> Order:
        """Any of them."""
        return cls(lanes=min(num_addends, draw.choice((*LANES, num_addends))), pairwise=draw.random() < 0.5,
                   permuted=draw.random() < 0.5, fused=draw.random() < 0.5, addend_first=draw.random() < 0.5,
                   seed=draw.randrange(2**31))


def product(a_BMK: Tensor, b_BKN: Tensor, order: Order, addend: Tensor | None = None) -> Tensor:
    """``a @ b + addend`` in that order, in float32 and rounded once to the operands' dtype. Batched, or with no B."""
    num_addends, dtype = a_BMK.shape[-1], a_BMK.dtype
    a_BMK, b_BKN = a_BMK.float(), b_BKN.float()
    if order.permuted:
        index = torch.randperm(num_addends, generator=torch.Generator().manual_seed(order.seed))
        a_BMK, b_BKN = a_BMK[..., index], b_BKN[..., index, :]
    steps = -(-num_addends // order.lanes)
    missing = steps * order.lanes - num_addends
    a_LSBM1 = F.pad(a_BMK, (0, missing)).unflatten(-1, (order.lanes, steps)).movedim((-2, -1), (0, 1))[..., None]
    b_LSB1N = F.pad(b_BKN, (0, 0, 0, missing)).unflatten(-2, (order.lanes, steps)).movedim((-3, -2), (0, 1))[..., None, :]
    sum_LBMN = a_BMK.new_zeros((order.lanes, *a_BMK.shape[:-1], b_BKN.shape[-1]))
    if addend is not None and order.addend_first:
        sum_LBMN[0] += addend
    for step in range(steps):
        if order.fused:  # a product of two float32 is exact in float64
            sum_LBMN = torch.addcmul(sum_LBMN.double(), a_LSBM1[:, step].double(), b_LSB1N[:, step].double()).float()
        else:
            sum_LBMN = sum_LBMN + a_LSBM1[:, step] * b_LSB1N[:, step]
    sums = list(sum_LBMN)
    while len(sums) > 1:
        sums = ([first + second for first, second in zip(sums[::2], sums[1::2], strict=False)] + sums[len(sums) & ~1 :]
                if order.pairwise else [sums[0] + sums[1], *sums[2:]])
    total: Tensor = sums[0]
    if addend is not None and not order.addend_first:
        total = total + addend
    return total.to(dtype)


class DrawnOrders(EveryProduct):
    """Within it each matrix product of 16 or 32 bits is summed in an order of its own: which one follows from seed and number."""

    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self.number = 0

    def product(self, func: Any, a: Tensor, b: Tensor, addend: Tensor | None) -> Tensor:
        """In the next order."""
        self.number += 1
        draw = random.Random(f"{self.seed}/{self.number}")
        order = Order.draw(draw, a.shape[-1])
        if order.lanes * a[..., 0].numel() * b.shape[-1] > MOST_ELEMENTS:
            order = replace(order, lanes=1)
        return product(a, b, order, addend)


class InDrawnOrders:
    """Live ranks whose jobs run in drawn orders, the same ones on each rank: what all of them compute stays equal."""

    def __init__(self, ranks: Ranks, seed: int) -> None:
        self.ranks = ranks
        self.tp_size, self.fabric, self.device = ranks.tp_size, ranks.fabric, ranks.device
        self.seed = seed
        self.collect = ranks.collect

    @property
    def healthy(self) -> bool:
        """As ``Ranks.healthy``."""
        return self.ranks.healthy

    def run(self, job: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """As ``Ranks.run``."""
        return self.collect(self.submit(job, *args), timeout_s=timeout_s)

    def submit(self, job: Callable[..., Any], *args: Any) -> JobHandle:
        """As ``Ranks.submit``."""
        return self.ranks.submit(_run_in_drawn_orders, self.seed, job, args)


def _run_in_drawn_orders(rank: RankContext, seed: int, job: Callable[..., Any], args: Sequence[Any]) -> Any:
    with DrawnOrders(seed):
        return job(rank, *args)

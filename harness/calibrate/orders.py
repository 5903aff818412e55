"""Matrix products that are summed in drawn orders: what another machine, or another library, may make of them.

Shape suffixes: B = products in a batch, M = rows, N = columns, K = addends, L = lanes that are summed apart, S = addends of each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.parallel.ranks import RankContext, Ranks

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
    a_LSBM1 = torch.nn.functional.pad(a_BMK, (0, missing)).unflatten(-1, (order.lanes, steps)).movedim((-2, -1), (0, 1))[..., None]
    b_LSB1N = torch.nn.functional.pad(b_BKN, (0, 0, 0, missing)).unflatten(-2, (order.lanes, steps)).movedim((-3, -2), (0, 1))
    b_LSB1N = b_LSB1N[..., None, :]
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
        sums = ([sum(pair[1:], pair[0]) for pair in zip(sums[::2], sums[1::2], strict=False)] + sums[len(sums) & ~1 :]
                if order.pairwise else [sums[0] + sums[1], *sums[2:]])
    result = sums[0] if addend is None or order.addend_first else sums[0] + addend
    return result.to(dtype)


class DrawnOrders(TorchDispatchMode):
    """Within it each matrix product of 16 or 32 bits is summed in an order of its own: which one follows from seed and number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _SUMS and not kwargs and args[-1].dtype in (torch.float32, torch.bfloat16, torch.float16):
            *addend, a, b = args
            self.number += 1
            order = Order.draw(random.Random(f"{self.seed}/{self.number}"), a.shape[-1])
            if order.lanes * a.numel() // max(1, a.shape[-1]) * b.shape[-1] > MOST_ELEMENTS:
                order = Order.draw(random.Random(f"{self.seed}/{self.number}"), 1)
            return product(a, b, order, *addend)
        if func in _MADE_OF_SUMS:
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


_SUMS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
_MADE_OF_SUMS = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default)


class InDrawnOrders:
    """Live ranks whose jobs run in drawn orders, the same ones on each rank: what all of them compute stays equal."""

    def __init__(self, ranks: Ranks, seed: int) -> None:
        self.ranks = ranks
        self.tp_size, self.fabric = ranks.tp_size, ranks.fabric
        self.seed = seed

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """As ``Ranks.run``."""
        return self.ranks.run(_run_in_drawn_orders, self.seed, job, args)


def _run_in_drawn_orders(rank: RankContext, seed: int, job: Callable[..., Any], args: Sequence[Any]) -> Any:
    with DrawnOrders(seed):
        return job(rank, *args)

"""Brings home the samples that the constants are fitted on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from engine.ranks.ranks import Ranks
from harness.studies.calibrate.draws import drawn_models
from harness.studies.calibrate.jobs import ORDERS as RANK_ORDERS
from harness.studies.calibrate.jobs import arrange, load_model, run_logits
from harness.studies.calibrate.orders import DrawnOrders, InDrawnOrders
from harness.studies.calibrate.samples import Sample, measured

DTYPES = ("bfloat16", "float16", "float32")
TP_SIZES = (1, 2, 3, 4, 6, 8)
ORDERS = ("this machine's", "drawn")
"""Of the sums in matrix products, those of the baseline included: an order of one machine alone would fit to that machine."""
OPTIONS = {"block_size": 16, "num_kv_blocks": 24, "max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Of the engine, for tiny models."""


class Pools(AbstractContextManager["Pools"]):
    """Thread ranks by tp_size, started on first use. A context manager."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def __call__(self, tp_size: int, order: str = RANK_ORDERS[0]) -> Ranks:
        """Ranks that sum in that order, with no error in it."""
        if tp_size not in self._ranks:
            self._ranks[tp_size] = Ranks(tp_size, fabric="solo" if tp_size == 1 else "threads")
        self._ranks[tp_size].run(arrange, order)
        return self._ranks[tp_size]

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks."""
        while self._ranks:
            self._ranks.popitem()[1].close()


def orders_of(tp_size: int) -> tuple[str, ...]:
    """Two parts have one order of summation."""
    return RANK_ORDERS if tp_size > 2 else RANK_ORDERS[-1:]


def sample_models(pools: Pools, draw: random.Random, dtype: str, orders: str, num_models: int) -> Iterator[Sample]:
    """A sample of each model on every number of ranks, with sums in such ``ORDERS``."""
    is_drawn = orders == ORDERS[1]
    for results in drawn_models(draw, "fit", num_models, (dtype,)):
        with DrawnOrders(draw.randrange(2**31)) if is_drawn else nullcontext():
            baseline = torch.cat(results.baseline_logits)
        simulated = list(torch.cat(results.simulated_logits, 1))
        for tp_size in TP_SIZES:
            ranks = pools(tp_size, draw.choice(orders_of(tp_size)))
            ranks.run(load_model, results.folder, results.dtype, OPTIONS)
            runner = InDrawnOrders(ranks, draw.randrange(2**31)) if is_drawn else ranks
            found = runner.run(run_logits, results.schedule)[0][0]
            yield measured(orders, results.dtype, tp_size, found, baseline, torch.cat(results.exact_logits), simulated)

"""Draws cases and brings their samples home: layers, tiny models, a real model."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engine.parallel.ranks import Ranks
from harness.calibrate.samples import (
    ORDERS,
    Sample,
    load_model,
    measured,
    random_layer,
    random_model,
    run_layers,
    run_logits,
)
from harness.truth import Truth

DTYPES = ("bfloat16", "float16", "float32")
TP_SIZES = (1, 2, 3, 4, 6, 8)


class Pools:
    """Thread ranks by tp_size, started on first use. A context manager."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def __call__(self, tp_size: int) -> Ranks:
        if tp_size not in self._ranks:
            self._ranks[tp_size] = Ranks(tp_size, fabric="solo" if tp_size == 1 else "threads")
        return self._ranks[tp_size]

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._ranks:
            self._ranks.popitem()[1].close()


def orders_of(tp_size: int) -> tuple[str, ...]:
    """Two parts have one order of summation."""
    return ORDERS if tp_size > 2 else ORDERS[-1:]


def sample_layers(pools: Pools, draw: random.Random, num_cases: int) -> Iterator[Sample]:
    """Samples of every rank, a rank's worth of layers of one dtype at a time."""
    per_job = 20
    for _ in range(-(-num_cases // per_job)):
        tp_size, dtype = draw.choice(TP_SIZES), draw.choice(DTYPES)
        cases = [random_layer(draw, tp_size, dtype) for _ in range(per_job)]
        for samples in pools(tp_size).run(run_layers, cases, draw.choice(orders_of(tp_size))):
            yield from samples


@contextmanager
def drawn_truth(draw: random.Random, dtype: str) -> Iterator[Truth]:
    """A tiny model that any of ``TP_SIZES`` can share, with its reference."""
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        folder = random_model(draw, Path(scratch) / "model", dtype, tp_size=max(TP_SIZES))
        yield Truth(folder, dtype=dtype, seed=draw.randrange(2**31))


def sample_logits(pools: Pools, truth: Truth, layouts: Sequence[tuple[int, str]], kind: str = "logits") -> Iterator[Sample]:
    """One sample a layout, ``(tp_size, order)``: all tokens of the script."""
    for tp_size, order in layouts:
        pools(tp_size).run(load_model, truth.folder, truth.dtype, order)
        yield logits_sample(truth, pools(tp_size).run(run_logits, truth.script)[0][0], tp_size, order, kind)


def logits_sample(truth: Truth, found: Tensor, tp_size: int, order: str, kind: str = "logits") -> Sample:
    float32 = None if truth.float32_logits is None else torch.cat(truth.float32_logits)
    return measured(kind, truth.dtype, tp_size, order, found, torch.cat(truth.baseline_logits), torch.cat(truth.exact_logits),
                    float32=float32)


def all_layouts() -> list[tuple[int, str]]:
    return [(tp_size, order) for tp_size in TP_SIZES for order in orders_of(tp_size)]

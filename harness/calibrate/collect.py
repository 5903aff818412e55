"""Brings home the samples that the constants are fitted on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.parallel.ranks import Ranks
from harness.calibrate.draws import Shape, drawn_models, layer_shape, random_layer
from harness.calibrate.jobs import ORDERS, arrange, load_model, run_layers, run_logits
from harness.calibrate.samples import Sample, measured
from harness.truth import Truth

DTYPES = ("bfloat16", "float16", "float32")
TP_SIZES = (1, 2, 3, 4, 6, 8)
LAYERS_PER_JOB = 20
OPTIONS = {"block_size": 16, "num_kv_blocks": 24, "max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Of the engine, for tiny models."""


class Pools:
    """Thread ranks by tp_size, started on first use. A context manager."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def __call__(self, tp_size: int, order: str = ORDERS[0]) -> Ranks:
        """Ranks that sum in that order, with no error in it."""
        if tp_size not in self._ranks:
            self._ranks[tp_size] = Ranks(tp_size, fabric="solo" if tp_size == 1 else "threads")
        self._ranks[tp_size].run(arrange, order)
        return self._ranks[tp_size]

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._ranks:
            self._ranks.popitem()[1].close()


def orders_of(tp_size: int) -> tuple[str, ...]:
    """Two parts have one order of summation."""
    return ORDERS if tp_size > 2 else ORDERS[-1:]


def sample_layers(pools: Pools, draw: random.Random, num_cases: int, seen: set[Shape]) -> Iterator[list[Sample]]:
    """Samples of each case, one a rank. Their shapes are added to ``seen``."""
    left = num_cases
    while left > 0:
        tp_size, dtype = draw.choice(TP_SIZES), draw.choice(DTYPES)
        cases = [random_layer(draw, tp_size, dtype) for _ in range(min(LAYERS_PER_JOB, left))]
        seen.update(layer_shape(case, tp_size) for case in cases)
        by_rank = pools(tp_size, draw.choice(orders_of(tp_size))).run(run_layers, cases)
        yield from map(list, zip(*by_rank, strict=True))
        left -= len(cases)


def sample_models(pools: Pools, draw: random.Random, num_models: int, seen: set[Shape]) -> Iterator[Sample]:
    """A sample of each model on every number of ranks. Their shapes are added to ``seen``."""
    for truth in drawn_models(draw, "fit", num_models, DTYPES, seen):
        for tp_size in TP_SIZES:
            ranks = pools(tp_size, draw.choice(orders_of(tp_size)))
            ranks.run(load_model, truth.folder, truth.dtype, OPTIONS)
            found = ranks.run(run_logits, truth.script)[0][0]
            yield logits_sample(truth, found, tp_size)


def logits_sample(truth: Truth, found: Tensor, tp_size: int) -> Sample:
    """As the check of logits looks at them."""
    float32 = None if truth.float32_logits is None else torch.cat(truth.float32_logits)
    return measured("logits", truth.dtype, tp_size, found, torch.cat(truth.baseline_logits), torch.cat(truth.exact_logits),
                    float32=float32)

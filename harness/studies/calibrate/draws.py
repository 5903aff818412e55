"""Models that are drawn for calibration, and the samples of their logits that the constants are fitted on.

Seeds of values are even where constants are fitted and odd where they are judged.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from engine.ranks.ranks import Ranks
from harness.strategies import random_config
from harness.studies.calibrate.fit import Sample, measured
from harness.studies.calibrate.jobs import ORDERS as RANK_ORDERS
from harness.studies.calibrate.jobs import arrange, load_model, run_logits
from harness.studies.calibrate.orders import DrawnOrders, InDrawnOrders
from harness.verification.reference_results import ReferenceResults
from reference.checkpoints import random_checkpoint
from reference.writing import edited

Purpose = Literal["fit", "judge"]

LARGEST_TP = 8
"""Ranks that can share any drawn model."""
SHARP, OUTLIER = 4, 32
"""Of ill-conditioned models: how much sharper attention is; how much larger a feature of the residual stream."""

FABRICS = {"cpu": ("threads",), "cuda": ("threads", "nccl")}
"""By device. As threads any number of ranks share one."""
DTYPES = ("bfloat16", "float16", "float32")
TP_SIZES = (1, 2, 3, 4, 6, 8)
ORDERS = ("this machine's", "drawn")
"""Of the sums in matrix products, those of the baseline included: an order of one machine alone would fit to that machine."""
OPTIONS = {"block_size": 16, "num_kv_blocks": 24, "max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Of the engine, for tiny models."""


def value_seed(draw: random.Random, purpose: Purpose) -> int:
    """Of tensors: even or odd."""
    return 2 * draw.randrange(2**30) + (purpose == "judge")


def drawn_models(draw: random.Random, purpose: Purpose, num_models: int, dtypes: tuple[str, ...],
                 device: str = "cpu") -> Iterator[ReferenceResults]:
    """Tiny models that up to ``LARGEST_TP`` ranks can share, with scripts to run on them, each there until the next one."""
    for number in range(num_models):
        dtype = dtypes[number % len(dtypes)]
        config = random_config(draw, LARGEST_TP, max_width=draw.choice((32, 128)), max_layers=draw.choice((2, 8)))
        lengths = tuple(draw.randint(3, 24) for _ in range(draw.randint(1, 3)))
        with written(draw, config, dtype, value_seed(draw, purpose)) as folder:
            yield ReferenceResults(folder, dtype=dtype, seed=value_seed(draw, purpose), device=device, schedule_lengths=lengths)


@contextmanager
def written(draw: random.Random, config: dict[str, Any], dtype: str, seed: int) -> Iterator[Path]:
    """Half of the models are ill-conditioned, as real ones are: attention is sharp, a feature dwarfs the others."""
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        folder = random_checkpoint(Path(scratch) / "model", config, dtype=dtype, seed=seed)
        if draw.random() < 0.5:
            with edited(folder) as tensors:
                for name, tensor in tensors.items():
                    if name.endswith("q_proj.weight"):
                        tensor *= SHARP
                    if name.endswith("embed_tokens.weight"):
                        tensor[:, draw.randrange(tensor.shape[1])] *= OUTLIER
        yield folder


@contextmanager
def sizes_alone(config: dict[str, Any], dtype: str, seed: int, device: str = "cpu") -> Iterator[ReferenceResults]:
    """For checks that draw what they need by themselves: a model's config without its weights."""
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        yield ReferenceResults(Path(scratch), dtype=dtype, seed=seed, device=device)


class Pools(AbstractContextManager["Pools"]):
    """Ranks by tp_size, started on first use. A context manager.

    fabric  ``threads``, of which any number share a device; or one of processes, of which there are up to ``most``
    """

    def __init__(self, device: str = "cpu", fabric: str = "threads", most: int = LARGEST_TP) -> None:
        self.device, self.fabric, self.most = device, fabric, most
        self._ranks: dict[int, Ranks] = {}

    def __call__(self, tp_size: int, order: str = RANK_ORDERS[0]) -> Ranks:
        """Ranks that sum in that order, with no error in it."""
        if tp_size not in self._ranks:
            self._ranks[tp_size] = Ranks(tp_size, fabric="solo" if tp_size == 1 else self.fabric, device=self.device)
        self._ranks[tp_size].run(arrange, order)
        return self._ranks[tp_size]

    def sizes(self, tp_sizes: Sequence[int]) -> list[int]:
        """Those that there can be ranks of. One rank is the same on any fabric: threads have it."""
        return [tp_size for tp_size in tp_sizes if tp_size <= self.most and (tp_size > 1 or self.fabric == "threads")]

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
    for results in drawn_models(draw, "fit", num_models, (dtype,), pools.device):
        with DrawnOrders(draw.randrange(2**31)) if is_drawn else nullcontext():
            baseline = torch.cat(results.baseline_logits)
        simulated = list(torch.cat(results.simulated_logits, 1))
        for tp_size in pools.sizes(TP_SIZES):
            ranks = pools(tp_size, draw.choice(orders_of(tp_size)))
            ranks.run(load_model, results.folder, results.dtype, OPTIONS)
            runner = InDrawnOrders(ranks, draw.randrange(2**31)) if is_drawn else ranks
            found = runner.run(run_logits, results.schedule)[0][0]
            yield measured(orders, results.dtype, tp_size, found, baseline, torch.cat(results.exact_logits), simulated)

"""Models that are drawn for calibration: seeds of values are even where constants are fitted and odd where they are judged."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from harness.strategies import random_config
from harness.verification.reference_results import ReferenceResults
from reference.checkpoints import random_checkpoint
from reference.writing import edited

Purpose = Literal["fit", "judge"]

LARGEST_TP = 8
"""Ranks that can share any drawn model."""
SHARP, OUTLIER = 4, 32
"""Of ill-conditioned models: how much sharper attention is; how much larger a feature of the residual stream."""


def value_seed(draw: random.Random, purpose: Purpose) -> int:
    """Of tensors: even or odd."""
    return 2 * draw.randrange(2**30) + (purpose == "judge")


def drawn_models(draw: random.Random, purpose: Purpose, num_models: int, dtypes: tuple[str, ...]) -> Iterator[ReferenceResults]:
    """Tiny models that up to ``LARGEST_TP`` ranks can share, with scripts to run on them, each there until the next one."""
    for number in range(num_models):
        dtype = dtypes[number % len(dtypes)]
        config = random_config(draw, LARGEST_TP, max_width=draw.choice((32, 128)), max_layers=draw.choice((2, 8)))
        lengths = tuple(draw.randint(3, 24) for _ in range(draw.randint(1, 3)))
        with written(draw, config, dtype, value_seed(draw, purpose)) as folder:
            yield ReferenceResults(folder, dtype=dtype, seed=value_seed(draw, purpose), schedule_lengths=lengths)


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
def sizes_alone(config: dict[str, Any], dtype: str, seed: int) -> Iterator[ReferenceResults]:
    """For checks that draw what they need by themselves: a model's config without its weights."""
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        yield ReferenceResults(Path(scratch), dtype=dtype, seed=seed)

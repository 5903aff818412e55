"""Checkpoints on disk: random ones, index-valued ones, and the way from a model's name to its folder.

Both kinds of made-up checkpoint are Hugging Face folders (config.json and safetensors, in one file or several
with an index), written from names and shapes alone: no model is ever built in memory.
"""

import math
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.checkpoint_files import CONFIG_FILE, weight_files
from engine.checkpoint.hub import SMOLLM2, find_model
from reference.building import longest_sequence, read_config
from reference.elements import CheckpointError, DownloadError, Element, ElementIndex, checkpoint_shapes
from reference.smollm2 import fetch_smollm2
from reference.writing import DTYPES, as_config, generator_of, shapes_and_ties, weight_shapes, write_checkpoint

__all__ = [
    "CheckpointError",
    "DownloadError",
    "Element",
    "ElementIndex",
    "as_config",
    "checkpoint_dtype",
    "checkpoint_shapes",
    "fetch_smollm2",
    "index_checkpoint",
    "longest_sequence",
    "random_checkpoint",
    "read_config",
    "resolve",
    "shapes_and_ties",
    "weight_shapes",
    "write_checkpoint",
]


def checkpoint_dtype(config: Any) -> str:
    """The dtype that a config says its weights are in, as ``bfloat16``; ``float32`` if it says none."""
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def random_checkpoint(
    folder: str | Path,
    config: Any,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write random weights for ``config`` into ``folder`` and return the folder.

    Scaled so that activations stay near 1 and logits near 2, with no tensor that could be left out unseen:
    norm weights are near 1 but not 1, biases are not 0. A tensor's values depend on ``seed`` and its name
    alone: not on torch's global generator, other tensors, or ``dtype``, which only rounds them.

    Args:
        folder: made where it is missing.
        config: a transformers config, or a dict with ``model_type``: "llama", "mistral", "phi3", "qwen2" and
            "qwen3" are tested.
        dtype: "float32", "float64" (float32's values), "bfloat16" or "float16".
        seed: of all values.
        max_shard_size: bytes, or a size such as "500MB": more than that goes to further files, with an index.
            None: one file.
    """
    config = as_config(config)
    shapes = weight_shapes(config)

    def values(name: str) -> torch.Tensor:
        drawn = _random_values(name, shapes[name], tied=getattr(config, "tie_word_embeddings", False), seed=seed)
        return drawn.to(DTYPES[dtype])

    return write_checkpoint(folder, config, shapes, values, dtype=dtype, max_shard_size=max_shard_size)


def _random_values(name: str, shape: tuple[int, ...], *, tied: bool, seed: int) -> torch.Tensor:
    """[*shape] float32."""
    draw = torch.empty(shape, dtype=torch.float32).normal_(generator=generator_of(name, seed))
    if name.endswith(".bias"):
        return draw.mul_(0.25)
    if len(shape) <= 1:
        return draw.mul_(0.1).add_(1.0)
    if name.endswith("lm_head.weight") or (tied and name.endswith("embed_tokens.weight")):
        return draw.mul_(2.0 / math.sqrt(shape[-1]))
    if name.endswith("embed_tokens.weight"):
        return draw
    return draw.mul_(1.0 / math.sqrt(shape[-1]))


def index_checkpoint(folder: str | Path, config: Any) -> Path:
    """Write a checkpoint whose every value is its element's number in ``ElementIndex``; return the folder.

    float32 while that is exact (2^24 elements), float64 above. So a rank that shows a value tells which
    element of which tensor it was given: a wrong row, or gate and up in each other's place, names itself.
    """
    config = as_config(config)
    shapes = weight_shapes(config)
    index = ElementIndex(shapes)

    def values(name: str) -> torch.Tensor:
        return torch.from_numpy(index.values(name)).to(DTYPES[index.dtype])

    return write_checkpoint(folder, config, shapes, values, dtype=index.dtype)


def resolve(model: str | Path) -> Path:
    """The folder of ``model``: "smollm2" (the real small model), a folder, or an id on the model hub.

    Only safetensors are taken, and no code that a model brings along is ever run.

    Raises:
        DownloadError: if it is not here and cannot be downloaded; the message says what to do instead.
        CheckpointError: if there is no such folder, it is not whole, or its weights are of a kind that is refused.
    """
    if str(model) == SMOLLM2:
        return fetch_smollm2()
    folder = find_model(model)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"folder={folder} holds no {CONFIG_FILE}; pass a Hugging Face model folder")
    weight_files(folder)
    return folder

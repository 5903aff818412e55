"""Checkpoints on disk: random ones, index-valued ones, and the way from a model's name to its folder.

Both kinds of made-up checkpoint are Hugging Face folders (config.json and safetensors, in one file or several
with an index), written from names and shapes alone: no model is ever built in memory.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError

from reference.elements import CheckpointError, DownloadError, Element, ElementIndex, checkpoint_shapes
from reference.smollm2 import fetch_smollm2
from reference.writing import DTYPES, as_config, weight_shapes, write_checkpoint

__all__ = [
    "CheckpointError",
    "DownloadError",
    "Element",
    "ElementIndex",
    "as_config",
    "checkpoint_shapes",
    "fetch_smollm2",
    "index_checkpoint",
    "random_checkpoint",
    "resolve",
    "weight_shapes",
    "write_checkpoint",
]

# Weights, config and tokenizer; nothing that is code, and nothing that runs code when it is opened.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
REFUSED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf")


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

    Parameters
    ----------
    config
        A transformers config, or a dict with ``model_type``: "llama", "qwen2" and "qwen3" are tested.
    dtype
        "float32", "float64" (float32's values), "bfloat16" or "float16".
    max_shard_size
        Bytes, or a size such as "500MB": more than that goes to further files, with an index. None: one file.
    """
    config = as_config(config)
    shapes = weight_shapes(config)

    def values(name: str) -> torch.Tensor:
        drawn = _random_values(name, shapes[name], tied=config.tie_word_embeddings, seed=seed)
        return drawn.to(DTYPES[dtype])

    return write_checkpoint(folder, config, shapes, values, dtype=dtype, max_shard_size=max_shard_size)


def _random_values(name: str, shape: tuple[int, ...], *, tied: bool, seed: int) -> torch.Tensor:
    """[*shape] float32."""
    # crc32, because Python's hash of a str differs from process to process; and the seed inside it, because
    # torch's CPU generator looks at the lowest 32 bits alone.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    draw = torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
    if name.endswith(".bias"):
        return draw.mul_(0.25)
    if len(shape) == 1:
        return draw.mul_(0.1).add_(1.0)
    if name.endswith("lm_head.weight") or (tied and name.endswith("embed_tokens.weight")):
        return draw.mul_(2.0 / math.sqrt(shape[-1]))
    if name.endswith("embed_tokens.weight"):
        return draw
    return draw.mul_(1.0 / math.sqrt(shape[-1]))


def index_checkpoint(folder: str | Path, config: Any, *, max_shard_size: int | str | None = None) -> Path:
    """Write a checkpoint whose every value is its element's number in ``ElementIndex``; return the folder.

    float32 while that is exact (2^24 elements), float64 above. So a rank that shows a value tells which
    element of which tensor it was given: a wrong row, or gate and up in each other's place, names itself.
    """
    config = as_config(config)
    shapes = weight_shapes(config)
    index = ElementIndex(shapes)

    def values(name: str) -> torch.Tensor:
        return torch.from_numpy(index.values(name)).to(DTYPES[index.dtype])

    return write_checkpoint(folder, config, shapes, values, dtype=index.dtype, max_shard_size=max_shard_size)


def resolve(model: str | Path) -> Path:
    """The folder of ``model``: "smollm2" (the real small model), a folder, or an id on the model hub.

    Only safetensors are taken, and no code that a model brings along is ever run.

    Raises
    ------
    DownloadError
        It is not here and cannot be downloaded; the message says what to do instead.
    CheckpointError
        There is no such folder, it is not whole, or its weights are of a kind that is refused.
    """
    if str(model) == "smollm2":
        return fetch_smollm2()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _checked(folder)
    if isinstance(model, Path) or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"model={str(model)!r}: there is no such folder")
    try:
        # Of the top folder alone: some models keep a second copy of their weights further down.
        snapshot = huggingface_hub.snapshot_download(
            model, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
    except (OSError, HFValidationError) as failure:
        raise DownloadError(
            f"model={model!r} is no folder here, and as a model id it could not be downloaded "
            f"({type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}). Without network: "
            f"copy its config.json, *.safetensors and tokenizer files into a folder and pass that"
        ) from failure
    return _checked(Path(snapshot))


def _checked(folder: Path) -> Path:
    """``folder``, once it is seen to hold a config and all of its safetensors."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"folder={folder} holds no config.json; pass a Hugging Face model folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        needed = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(name for name in needed if not (folder / name).is_file()):
            raise CheckpointError(f"folder={folder}: {index.name} names {missing}, which are not there")
    elif not list(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in REFUSED_WEIGHTS for path in folder.glob(pattern))
        held = f"; {', '.join(others)} is refused: convert it to safetensors" if others else ""
        raise CheckpointError(f"folder={folder} holds no *.safetensors{held}")
    return folder

"""Writes Hugging Face folders from names, shapes and a function that gives a tensor's values."""

import copy
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from reference.building import building
from reference.elements import CheckpointError, Shapes

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def generator_of(name: str, seed: int) -> torch.Generator:
    """Of the random values of the tensor ``name``, which depend on that and the seed alone."""
    # crc32, because Python's hash of a str differs from process to process; and the seed inside it, because
    # torch's CPU generator looks at the lowest 32 bits alone.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def as_config(config: Any) -> Any:
    """A transformers config from one, or from a dict that names its ``model_type``.

    Raises:
        CheckpointError: if ``config`` is a dict without ``model_type``, of a type that transformers does not know, or with values
            that it refuses.
    """
    if not isinstance(config, Mapping):
        return copy.deepcopy(config)
    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise CheckpointError(f"config={dict(config)} has no model_type; add one, such as model_type='llama'")
    with building(f"transformers takes no {model_type} of this config"):
        try:
            return transformers.AutoConfig.for_model(model_type, **values)
        except ValueError as unknown:
            raise CheckpointError(f"model_type={model_type!r} is unknown to transformers") from unknown


def weight_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of ``config`` holds, by sorted name; kept buffers too.

    Tied models have no ``lm_head.weight``: their checkpoints hold the embedding alone.

    Raises:
        CheckpointError: if transformers cannot build such a model.
    """
    return shapes_and_ties(config)[0]


def without_weights(config: Any) -> Any:
    """The transformers model of a config, on the meta device.

    Raises:
        CheckpointError: if transformers cannot build it.
    """
    with building(f"transformers cannot build a {config.model_type} of this config"), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def shapes_and_ties(config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """``weight_shapes``, and of tensors that a model of ``config`` has under two names the second, each with the first.

    Raises:
        CheckpointError: if transformers cannot build such a model.
    """
    tensors: dict[str, torch.Tensor] = without_weights(as_config(config)).state_dict(keep_vars=True)
    first: dict[int, str] = {}  # in the order of the modules
    tied = {name: first[id(tensor)] for name, tensor in tensors.items() if first.setdefault(id(tensor), name) != name}
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items()) if name not in tied}, tied


def write_checkpoint(
    folder: str | Path,
    config: Any,
    shapes: Shapes,
    values: Callable[[str], torch.Tensor],
    *,
    dtype: str,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write config.json and ``values(name)`` for every name of ``shapes``, one file's tensors at a time."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {sorted(DTYPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if left := sorted(path.name for path in folder.glob("*.safetensors*")):
        raise CheckpointError(f"folder={folder} already holds {', '.join(left)}; choose an empty one")

    files = _split(shapes, DTYPES[dtype].itemsize, _size_in_bytes(max_shard_size))
    count = len(files)
    file_names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        file_names = ["model.safetensors"]
    for file_name, names in zip(file_names, files, strict=True):
        tensors = {name: values(name).contiguous() for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if count > 1:
        total_bytes = sum(map(math.prod, shapes.values())) * DTYPES[dtype].itemsize
        weight_map = {name: file for file, names in zip(file_names, files, strict=True) for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    config = as_config(config)
    config.dtype = DTYPES[dtype]
    config.architectures = [type(without_weights(config)).__name__]
    config.save_pretrained(folder)
    return folder


@contextmanager
def edited(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a checkpoint of one file, to be changed in place, replaced or added; written back in the end."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


def _split(shapes: Shapes, itemsize: int, max_bytes: float) -> list[list[str]]:
    """Names by file, in order. A tensor above ``max_bytes`` has a file to itself."""
    files: list[list[str]] = [[]]
    room = max_bytes
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if files[-1] and num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= num_bytes
    return files


def _size_in_bytes(size: int | str | None) -> float:
    if size is None:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(size), flags=re.IGNORECASE)
    if not match:
        raise ValueError(f"max_shard_size={size!r} is not a size; write bytes, or a number with KB, MB or GB")
    return float(match[1]) * 10.0 ** (3 * " KMGT".index(match[2].upper() or " "))

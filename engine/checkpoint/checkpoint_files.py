"""Which files of a Hugging Face folder are its checkpoint, and under which of their names a model finds its tensors there.

Transformers' rules, once for all who read checkpoints: engine, reference, harness and download. If each chose by itself, a
stale index or a second copy of the weights would look like a bug of tensor parallelism. So this is the engine's one module,
with :mod:`engine.checkpoint.hub`, that the reference may import: it knows of no rank and no shard, and imports nothing of the
project. Whether the choice is transformers' is not taken on trust: the reference loads its model by transformers itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf")
DERIVED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers that old exporters saved. They follow from the config, and nobody reads them."""
PREFIX = "model."
"""What stands before the names of all but the LM head; checkpoints of the bare decoder leave it out."""

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint can't be found or read, is not whole, or does not fit its config. The message says what to do."""


class DownloadError(CheckpointError):
    """A model is not on this machine and could not be brought here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as its file's header tells of it; ``dtype`` in safetensors' words, as ``BF16``."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"tensor={self.name} in file={self.file}"


def read_json(path: Path) -> dict[str, Any]:
    """The object that ``path`` holds.

    Raises:
        CheckpointError: if the file can't be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"file={path} can't be read ({error.strerror or type(error).__name__}): it must be a readable "
                              "JSON file") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise CheckpointError(f"file={path} is not valid JSON ({error}): mend it, or fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"file={path} holds a {type(values).__name__}, expected a JSON object: fetch it again")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in ``folder``, each seen to be there.

    Raises:
        CheckpointError: if there are none, one is missing, the index is broken, or a name leaves the folder.
    """
    files = named_files(folder)
    if not files:
        raise CheckpointError(f"no {SINGLE_FILE} and no {INDEX_FILE} in folder={folder}{_refused(folder)}")
    for file in files:
        if not os.path.isfile(file):  # for names too long, Path.is_file raises
            raise CheckpointError(f"file={file} is missing, but {CONFIG_FILE} or an index names it: fetch it again")
    return files


def named_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint in ``folder``, whether they are there or not; nothing if none is named.

    The file that config.json names as ``transformers_weights``, or else a whole ``model.safetensors``, or else the files that
    an index names. All other files are passed over, such as a second copy of the weights, or an index beside a whole file.
    """
    config = folder / CONFIG_FILE
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    if named is not None:
        path = _inside(folder, named, f"transformers_weights in file={config}", (".safetensors", ".safetensors.index.json"))
    elif (folder / SINGLE_FILE).is_file():
        path = folder / SINGLE_FILE
    elif (folder / INDEX_FILE).is_file():
        path = folder / INDEX_FILE
    else:
        return []
    return _shards_of(path, folder) if path.name.endswith(".json") else [path]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in ``folder``, by the names in its files. Headers are read, and no tensor.

    Raises:
        CheckpointError: as :func:`weight_files`, and if a file is damaged or two hold the same name.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        with open_file(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not iterable
                if name in found:
                    raise CheckpointError(f"tensor={name} is in file={found[name].file} and again in file={file}: remove one")
                part = opened.get_slice(name)
                found[name] = StoredTensor(name=name, file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype())
    return found


def open_file(file: Path) -> Any:
    """``safetensors.safe_open`` for torch tensors on the CPU.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"file={file} is damaged or cut short: {error}: fetch it again") from error


def by_model_name(stored: Mapping[str, T], names: Collection[str], tied: Mapping[str, str] | None = None) -> dict[str, T]:
    """What ``stored`` holds, by the names of a model's tensors: derived buffers left out, all else there.

    As transformers has it, ``model.`` may be missing before a name, or stand there once too often; and of two tied tensors
    either may be stored for both.

    Args:
        stored: anything by a tensor's name in the files.
        names: all that the model wants to be given.
        tied: names of tied tensors -> the one of ``names`` that they are tied to.

    Raises:
        CheckpointError: if two names in the files mean the same tensor.
    """
    wanted = {*names, *(tied or {})}
    found: dict[str, T] = {}
    for name, value in stored.items():
        if DERIVED.search(name):
            continue
        bare = name.removeprefix(PREFIX)
        meant = bare if bare != name and bare in wanted else PREFIX + name if PREFIX + name in wanted else name
        if meant in found:
            raise CheckpointError(f"{value} means tensor={meant}, and so does {found[meant]}: remove one")
        found[meant] = value
    for copy, original in (tied or {}).items():
        if original not in found and copy in found:
            found[original] = found.pop(copy)
    return found


def one_line(error: BaseException) -> str:
    """What ``error`` says, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def short(value: object) -> str:
    """``repr``, in not too many characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _shards_of(index: Path, folder: Path) -> list[Path]:
    where = f"file={index} is not a safetensors index"
    values = read_json(index)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map={short(weight_map)} must be an object of tensors and files: fetch it again")
    # Of no use to anyone, but transformers reads it.
    if not isinstance(values.get("metadata"), dict):
        raise CheckpointError(f"{where}: metadata={short(values.get('metadata'))} must be an object: add \"metadata\": {{}}")
    return sorted({_inside(folder, name, where, (".safetensors",)) for name in weight_map.values()})


def _inside(folder: Path, name: object, where: str, suffixes: tuple[str, ...]) -> Path:
    """The file of that name. One that is reached from outside the folder, or whose opening may run code, is refused."""
    if not isinstance(name, str) or not name.endswith(suffixes):
        raise CheckpointError(f"{where}: name={short(name)} must be a file name that ends with {' or '.join(suffixes)}")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name.isprintable():
        raise CheckpointError(f"{where}: name={short(name)} leaves the folder, or can't be printed: put the file inside")
    return folder / name


def _refused(folder: Path) -> str:
    names = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    return (f"; found {', '.join(names)}: refused, for pickled checkpoints can run code; convert it to safetensors"
            if names else ": give a Hugging Face model folder with its weights")

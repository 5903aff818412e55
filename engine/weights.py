"""Checkpoint -> this rank's shards. Safetensors only; each rank reads the slices it owns; every name is accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.parallel.parameter import CheckpointError, ShardParameter

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that old exporters saved; they follow from the config.
DERIVED = re.compile(r"rotary_emb\.inv_freq$")


class CheckpointTensor:
    """One tensor of a checkpoint, still on disk: indexing reads the part asked for and nothing else."""

    def __init__(self, name: str, file: Path, raw: Any) -> None:
        self.name = name
        self.file = file
        self.shape = tuple(raw.get_shape())
        self.bytes_read = 0
        dtype = raw.get_dtype()
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{self}: dtype={dtype} is not supported; supported: {', '.join(FLOAT_DTYPES)}")
        self._raw = raw

    def __getitem__(self, index: Any) -> Tensor:
        value: Tensor = self._raw[index]
        self.bytes_read += value.numel() * value.element_size()
        return value

    def __str__(self) -> str:
        return f"tensor={self.name} in file={self.file}"


class Checkpoint(Mapping[str, CheckpointTensor]):
    """The tensors of a Hugging Face model folder by name, single file or sharded with an index. A context manager.

    Raises:
        CheckpointError: if there are no safetensors, a file is missing or damaged, or the index does not fit the files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        try:
            self._tensors = self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> dict[str, CheckpointTensor]:
        index_path = self.folder / INDEX_FILE
        weight_map: dict[str, str] | None = None
        if index_path.is_file():
            try:
                weight_map = json.loads(index_path.read_text())["weight_map"]
                files = sorted({self.folder / name for name in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"file={index_path} is not a safetensors index: {error!r}") from error
        elif (self.folder / SINGLE_FILE).is_file():
            files = [self.folder / SINGLE_FILE]
        else:
            pickled = sorted(path.name for pattern in PICKLED for path in self.folder.glob(pattern))
            hint = (f"; found {', '.join(pickled)}: pickled checkpoints can run code and are refused, convert them to "
                    "safetensors" if pickled else "")
            raise CheckpointError(f"no {SINGLE_FILE} and no {INDEX_FILE} in folder={self.folder}{hint}")
        tensors: dict[str, CheckpointTensor] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"file={file} is missing, but {INDEX_FILE} names it")
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise CheckpointError(f"file={file} is damaged or truncated: {error}") from error
            for name in handle.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                if name in tensors:
                    raise CheckpointError(f"tensor={name} is in file={tensors[name].file} and again in file={file}")
                tensors[name] = CheckpointTensor(name, file, handle.get_slice(name))
        if weight_map is not None and (differing := sorted(weight_map.keys() ^ tensors.keys())):
            raise CheckpointError(f"file={index_path} and the files it names do not hold the same tensors: {differing[:8]}")
        return tensors

    def __getitem__(self, name: str) -> CheckpointTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What one rank asked of the checkpoint, and what it holds."""

    bytes_read: Mapping[str, int]
    """By checkpoint name."""
    parameter_bytes: int


def checkpoint_names(model: nn.Module, packed: Mapping[str, tuple[str, str | int]]) -> dict[str, tuple[str, str | int | None]]:
    """Checkpoint name -> (parameter name, shard_id) for every tensor that the model expects.

    Args:
        packed: checkpoint module -> (fused module of the model, shard_id), as ``{"q_proj": ("qkv_proj", "q")}``.
    """
    names: dict[str, tuple[str, str | int | None]] = {}
    parts: list[tuple[str, str | int | None]]
    for name, _ in model.named_parameters():  # a tied parameter comes once, under its first name
        *path, module, kind = name.split(".")
        parts = [(source, shard_id) for source, (fused, shard_id) in packed.items() if fused == module]
        for source, shard_id in parts or [(module, None)]:
            names[".".join((*path, source, kind))] = (name, shard_id)
    return names


def load_weights(model: nn.Module, folder: str | Path, *, packed: Mapping[str, tuple[str, str | int]],
                 tied: Mapping[str, str] | None = None) -> LoadReport:
    """Fill the model's parameters with this rank's shards.

    Args:
        tied: checkpoint names that may stand beside the tensor they are tied to, if equal: ``{"lm_head.weight": ...}``.

    Raises:
        CheckpointError: naming file and tensor, if a tensor is missing, extra, misshapen or of a foreign dtype, if a file is
            damaged, or if an element of some parameter was left unwritten.
    """
    names = checkpoint_names(model, packed)
    tied = tied or {}
    parameters: dict[str, Any] = dict(model.named_parameters())
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        found = {name for name in checkpoint if not DERIVED.search(name)}
        missing, extra = sorted(names.keys() - found), sorted(found - names.keys() - tied.keys())
        if missing or extra:
            raise CheckpointError(f"folder={checkpoint.folder}: missing from the checkpoint: {_some(missing)}; "
                                  f"not in the model: {_some(extra)}")
        for name, (parameter_name, shard_id) in names.items():
            _load(parameters[parameter_name], checkpoint[name], shard_id)
        for name in sorted(tied.keys() & found):
            _check_copy(parameters[names[tied[name]][0]], checkpoint[name], tied[name])
        bytes_read = {name: tensor.bytes_read for name, tensor in checkpoint.items()}
    check_written(parameters)
    return LoadReport(bytes_read=bytes_read, parameter_bytes=sum(p.numel() * p.element_size() for p in parameters.values()))


def _load(parameter: Any, tensor: CheckpointTensor, shard_id: str | int | None = None) -> None:
    arguments = (parameter, tensor) if shard_id is None else (parameter, tensor, shard_id)
    try:
        parameter.weight_loader(*arguments)
    except (CheckpointError, SafetensorError) as error:
        raise CheckpointError(f"{tensor}: {error}") from error


def _check_copy(parameter: Any, tensor: CheckpointTensor, original: str) -> None:
    """Raise unless ``tensor`` holds for this rank what ``original`` put into ``parameter``; no other rank's part is read."""
    copy = ShardParameter(parameter.shape, dtype=parameter.dtype, device=parameter.device,
                          weight_loader=parameter.weight_loader)
    _load(copy, tensor)
    if not torch.equal(copy, parameter):
        raise CheckpointError(f"{tensor} differs from tensor={original}, but the config ties them: "
                              "set tie_word_embeddings=false in config.json")


def check_written(parameters: Mapping[str, ShardParameter]) -> None:
    """Raise ``CheckpointError`` if some element of some parameter was never written: it would still run, on NaN."""
    unwritten = [f"{name} ({parameter.num_unwritten} of {parameter.numel()} elements)"
                 for name, parameter in parameters.items() if parameter.num_unwritten]
    if unwritten:
        raise CheckpointError(f"never written by any loader: {_some(unwritten)}")


def _some(names: list[str], most: int = 8) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

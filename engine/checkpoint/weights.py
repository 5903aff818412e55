"""Checkpoint -> this rank's shards. Safetensors only; each rank reads the slices it owns; every name is accounted for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine.checkpoint.checkpoint_files import CheckpointError, StoredTensor, by_model_name, open_file, read_headers
from engine.models.table import Module, held_in
from engine.parallel.parameter import ShardParameter

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointTensor:
    """One tensor of a checkpoint, still on disk: indexing reads the part asked for and nothing else.

    Args:
        raw: the slice of an open file; None: values are neither known nor needed, indexing gives tensors on ``meta``.
    """

    def __init__(self, stored: StoredTensor, raw: Any = None) -> None:
        self.stored = stored
        self.name = stored.name
        self.shape = stored.shape
        self.bytes_read = 0
        self._raw = raw

    def __getitem__(self, index: Any) -> Tensor:
        if self._raw is None:
            return torch.empty(self.shape, dtype=FLOAT_DTYPES[self.stored.dtype], device="meta")[index]
        value: Tensor = self._raw[index]
        self.bytes_read += value.numel() * value.element_size()
        return value

    def __str__(self) -> str:
        return str(self.stored)


class Checkpoint(Mapping[str, CheckpointTensor], AbstractContextManager["Checkpoint"]):
    """The tensors of a Hugging Face model folder by name, from its one file or several. A context manager.

    Args:
        names, tied: what a model asks for, as in :func:`engine.checkpoint.checkpoint_files.by_model_name`.
        headers_only: tensors have shapes, but no values.

    Raises:
        CheckpointError: if there are no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path, names: Collection[str] = (), tied: Mapping[str, str] | None = None, *,
                 headers_only: bool = False) -> None:
        self.folder = Path(folder)
        self._stack = ExitStack()
        stored = by_model_name(read_headers(self.folder), names, tied)
        try:
            files = {} if headers_only else {file: self._stack.enter_context(open_file(file))
                                             for file in sorted({tensor.file for tensor in stored.values()})}
            self._tensors = {name: CheckpointTensor(tensor, files[tensor.file].get_slice(tensor.name) if files else None)
                             for name, tensor in stored.items()}
        except BaseException:
            self._stack.close()
            raise

    def __getitem__(self, name: str) -> CheckpointTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What one rank asked of the checkpoint, and what it holds."""

    bytes_read: Mapping[str, int]
    """By checkpoint name."""
    parameter_bytes: int


def checkpoint_names(model: nn.Module, modules: Sequence[Module]) -> dict[str, tuple[str, str | int | None]]:
    """Checkpoint name -> (parameter name, shard_id) for every tensor that the model expects.

    Args:
        model: this rank's, or one on ``meta``.
        modules: the module table of the model's family.
    """
    names: dict[str, tuple[str, str | int | None]] = {}
    for name, _ in model.named_parameters():  # a tied parameter comes once, under its first name
        path, _, kind = name.rpartition(".")
        held = held_in(modules, path)
        assert held, f"parameter={name} is in no row of its family's module table"
        names |= {f"{module.path}.{kind}": (name, module.part) for module in held}
    return names


def load_weights(model: nn.Module, folder: str | Path, *, modules: Sequence[Module],
                 tied: Mapping[str, str] | None = None, headers_only: bool = False) -> LoadReport:
    """Fill the model's parameters with this rank's shards.

    Args:
        model: this rank's, whose parameters have a ``weight_loader``.
        folder: with the safetensors.
        modules: the module table of the model's family.
        tied: checkpoint names -> the tensor that they equal (``ModelConfig`` has seen to that): a copy is not read.
        headers_only: for a model on ``meta``: everything is checked but the values, which are not read.

    Raises:
        CheckpointError: naming file and tensor, if a tensor is missing, extra, misshapen or of a foreign dtype, if a file is
            damaged, or if an element of some parameter was left unwritten.
    """
    names = checkpoint_names(model, modules)
    tied = tied or {}
    parameters: dict[str, Any] = dict(model.named_parameters())
    with Checkpoint(folder, names, tied, headers_only=headers_only) as checkpoint, torch.inference_mode():
        missing, extra = sorted(names.keys() - checkpoint.keys()), sorted(checkpoint.keys() - names.keys() - tied.keys())
        if missing or extra:
            files = sorted({tensor.stored.file.name for tensor in checkpoint.values()})
            raise CheckpointError(f"folder={checkpoint.folder}: missing from the checkpoint: {_some(missing)}; "
                                  f"not in the model: {_some(extra)}; files={_some(files)} must be those of its config.json")
        for name, (parameter_name, shard_id) in names.items():
            _load(parameters[parameter_name], checkpoint[name], shard_id)
        bytes_read = {name: tensor.bytes_read for name, tensor in checkpoint.items()}
    check_written(parameters)
    return LoadReport(bytes_read=bytes_read, parameter_bytes=sum(p.numel() * p.element_size() for p in parameters.values()))


def _load(parameter: Any, tensor: CheckpointTensor, shard_id: str | int | None = None) -> None:
    arguments = (parameter, tensor) if shard_id is None else (parameter, tensor, shard_id)
    if tensor.stored.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{tensor}: dtype={tensor.stored.dtype} is not supported; supported: {', '.join(FLOAT_DTYPES)}: "
                              "use an unquantised checkpoint")
    try:
        parameter.weight_loader(*arguments)
    except (CheckpointError, SafetensorError) as error:
        raise CheckpointError(f"{tensor}: {error}") from error


def check_written(parameters: Mapping[str, ShardParameter]) -> None:
    """Raise ``CheckpointError`` if some element of some parameter was never written: it would still run, on NaN."""
    unwritten = [f"{name} ({parameter.num_unwritten} of {parameter.numel()} elements)"
                 for name, parameter in parameters.items() if parameter.num_unwritten]
    if unwritten:
        raise CheckpointError(f"never written by any loader: {_some(unwritten)}")


def _some(names: list[str], most: int = 4) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

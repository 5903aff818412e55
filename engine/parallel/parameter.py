"""Parameters that know how they are loaded and which of their elements were.

The field's protocol stays: a parameter carries ``weight_loader(param, loaded_weight[, shard_id])``. ``loaded_weight`` is the
*whole* checkpoint tensor or a safetensors slice of it: both are indexed the same way, so a loader reads only what it owns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.checkpoint.checkpoint_files import CheckpointError


class LoadedWeight(Protocol):
    """A checkpoint tensor: a ``torch.Tensor``, or ``weights.CheckpointTensor``, which reads only what is indexed."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class ShardParameter(nn.Parameter):
    """This rank's shard of a weight, with a ledger of what was written into it.

    Built poisoned with NaN: an element that no loader wrote shows up as NaN in the first output, and
    :meth:`check_written` proves by counting that there is none.
    """

    weight_loader: Callable[..., None]
    written: list[tuple[range, ...]]

    def __new__(cls, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str,
                weight_loader: Callable[..., None]) -> ShardParameter:
        data = torch.full(tuple(shape), math.nan, dtype=dtype, device=device)
        param: ShardParameter = torch.Tensor._make_subclass(cls, data, False)
        param.weight_loader = weight_loader
        param.written = []
        return param

    def write(self, value: Tensor, *, rows: range, columns: range | None = None) -> None:
        """Copy ``value`` into ``rows`` (dim 0) and ``columns`` (dim 1; all by default) and note it in the ledger.

        Raises:
            CheckpointError: if the shapes differ, the region leaves the shard, or a part was already written.
        """
        if columns is None:
            columns = range(self.shape[-1])
        region = (rows,) if self.dim() == 1 else (rows, columns)
        if tuple(value.shape) != tuple(map(len, region)):
            raise CheckpointError(f"shape={tuple(value.shape)} does not fit the shard's region {region} of {tuple(self.shape)}")
        # Counted in the ledger, what lies outside would stand for an element inside that nobody wrote.
        if any(part.start < 0 or part.stop > size for part, size in zip(region, self.shape, strict=True)):
            raise CheckpointError(f"region {region} reaches outside the shard of shape={tuple(self.shape)}")
        for earlier in self.written:
            if all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(earlier, region, strict=True)):
                raise CheckpointError(f"region {region} overlaps region {earlier}, which was already written")
        if value.numel():
            self.data[tuple(slice(r.start, r.stop) for r in region)].copy_(value)
            self.written.append(region)

    @property
    def num_unwritten(self) -> int:
        """Elements that no loader wrote. Regions never overlap, so counting is proof."""
        return self.numel() - sum(math.prod(map(len, region)) for region in self.written)


def check_shape(loaded_weight: LoadedWeight, expected: Sequence[int]) -> None:
    """Raise ``CheckpointError`` unless the whole checkpoint tensor has the shape that the model's config asks for."""
    if tuple(loaded_weight.shape) != tuple(expected):
        raise CheckpointError(f"shape={tuple(loaded_weight.shape)} in the checkpoint, but the config asks for {tuple(expected)}")


def replicated_loader(param: ShardParameter, loaded_weight: LoadedWeight) -> None:
    """Every rank holds the whole tensor."""
    check_shape(loaded_weight, param.shape)
    param.write(loaded_weight[:], rows=range(param.shape[0]))


def rows_of(loaded_weight: LoadedWeight, rows: range) -> Tensor:
    """``loaded_weight[rows]``: only these rows are read."""
    return loaded_weight[rows.start : rows.stop]


def columns_of(loaded_weight: LoadedWeight, columns: range) -> Tensor:
    """``loaded_weight[:, columns]``: only these columns are read."""
    return loaded_weight[:, columns.start : columns.stop]

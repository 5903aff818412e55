"""What subjects whose ranks hold DTensors have in common: which elements of a checkpoint each rank has, and process groups."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from harness.errors import UsageError
from harness.subjects.base import Placement
from harness.subjects.on_ranks import LiveRank, OnRanks
from reference.checkpoints import CheckpointError
from reference.shards import Ownership


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one rank holds of a checkpoint's tensor: the indices along ``dim``; ``dim`` None: all of it."""

    shape: tuple[int, ...]
    dim: int | None
    indices: NDArray[np.int64]


class DTensorRank(LiveRank):
    """One rank of a model whose sharded tensors are DTensors."""

    model: Any

    def tensors(self) -> dict[str, Tensor]:
        """The model's own, by its own names."""
        found: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        return found

    @abstractmethod
    def by_checkpoint_name(self, numbers: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """The way back from the model's tensors to the checkpoint's.

        Args:
            numbers: in the place of each of ``tensors``, whole, a number for each of its elements.

        Returns:
            By checkpoint name, and of the checkpoint's shape: the number of each element's place in the model.
        """

    @cached_property
    def _shards(self) -> dict[str, tuple[Held, Tensor]]:
        """By checkpoint name: which part of the tensor this rank holds, and the part.

        The way back from the model to the checkpoint is run on tensors that hold the number of each element, which tells where
        every element of a checkpoint's tensor is.
        """
        tensors = self.tensors()
        starts = [0, *accumulate(tensor.numel() for tensor in tensors.values())]
        numbers = {name: torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
                   for start, (name, tensor) in zip(starts, tensors.items(), strict=False)}
        held = torch.cat([_local_part(numbers[name], tensor).flatten() for name, tensor in tensors.items()])
        values = torch.cat([plain(tensor).detach().cpu().flatten() for tensor in tensors.values()])  # in the widest dtype
        place = torch.full((starts[-1],), -1).index_copy(0, held, torch.arange(len(held)))
        dtypes = [tensor.dtype for tensor in tensors.values()]
        found = {}
        for name, number in self.by_checkpoint_name(numbers).items():
            part = _held(name, place[number] >= 0)
            dtype = dtypes[bisect(starts, int(number.min())) - 1] if number.numel() else values.dtype
            if part.dim is not None:
                number = number.index_select(part.dim, torch.from_numpy(part.indices))
            found[name] = part, values[place[number]].to(dtype)
        return found

    def shards(self) -> dict[str, Tensor]:
        # Of what others hold alone this rank has nothing, in no shape: along which dimension can't be told.
        return {name: shard for name, (held, shard) in self._shards.items() if held.dim is None or shard.numel()}

    def held(self) -> dict[str, Held]:
        """By checkpoint name: which part of the tensor this rank holds, as its DTensors' placements say."""
        return {name: held for name, (held, _) in self._shards.items()}


class DTensorSubject(OnRanks):
    """Its layouts are what its ranks' placements say of what is loaded."""

    rank_class: ClassVar[type[DTensorRank]]

    @classmethod
    def check_fit(cls, folder: Path, placements: Sequence[Placement]) -> None:
        """Refuse ranks that are threads.

        Raises:
            UsageError: if there are some.
        """
        if threads := [placement.tp_size for placement in placements if placement.fabric == "threads"]:
            raise UsageError(f"tp_sizes={threads} would run as threads, and DTensor needs processes: use --fabric gloo")

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self._layout: list[dict[str, Held]] | None = None
        super().load(folder, dtype=dtype, options=options)

    def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Ownership:
        """Where the placements say that the elements are, of what is loaded."""
        if self._layout is None:
            self._layout = self._ask("held")
        held = [of_rank[name] for of_rank in self._layout if name in of_rank]
        if not held:
            raise CheckpointError(f"tensor={name}: the loaded model has no parameter that it went to")
        dims = ({part.dim for part in held if part.dim is not None and len(part.indices)}
                or {part.dim for part in held if part.dim is not None})  # whole on some ranks, not there on others
        dim = dims.pop() if len(dims) == 1 else None
        whole = Held(shape=shape, dim=None, indices=np.arange(0))  # asked of a rank that has nothing from there
        every = np.arange(shape[dim] if dim is not None else 0)
        return Ownership(name=name, shape=held[0].shape, tp_size=self.tp_size, dim=dim, indices=tuple(
            every if part.dim is None else part.indices for part in (of_rank.get(name, whole) for of_rank in self._layout)))


def plain(value: Tensor) -> Tensor:
    """This rank's own values: of a DTensor its part, and of a collective under way what comes of it.

    An un-waited collective's tensor, pickled, would be the sum of some ranks only.
    """
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, AsyncCollectiveTensor):
        value = value.wait()
    return value


@contextmanager
def own_groups(owner: object) -> Iterator[None]:
    """Process groups that are made meanwhile end with ``owner``: libraries make several a model, and end none.

    Those too of a load that raises. Each has threads that wake up all the time, and a hundred of them leave no core to others.
    """
    before = set(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else set()
    try:
        yield
    finally:
        if dist.is_initialized():
            made = [group for group in dist.distributed_c10d._world.pg_map if group not in before]
            weakref.finalize(owner, _end_groups, made)


def _end_groups(groups: Sequence[dist.ProcessGroup]) -> None:
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def _local_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that this rank holds of a tensor that is placed as ``like`` is."""
    if not isinstance(like, DTensor) or all(isinstance(place, Replicate) for place in like.placements):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _held(name: str, mask: Tensor) -> Held:
    """From which elements are there to indices along one dimension."""
    shape = tuple(mask.shape)
    if bool(mask.all()):
        return Held(shape=shape, dim=None, indices=np.arange(0))
    for dim in range(mask.ndim):
        rest = [other for other in range(mask.ndim) if other != dim]
        some, every = (mask.amax(rest), mask.amin(rest)) if rest else (mask, mask)
        if torch.equal(some, every):
            return Held(shape=shape, dim=dim, indices=some.nonzero().flatten().numpy())
    raise ValueError(f"tensor={name}: what this rank holds of it is no set of rows of one dimension")

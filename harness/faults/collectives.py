"""Faults in the collectives themselves, and in who enters them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.layers.matmul import linear
from engine.parallel.group import ProcessTPGroup, TPGroup
from engine.parallel.linear import RowParallelLinear
from harness.faults.base import Patches, around, fault, instead

EMBEDDING = "model.embed_tokens"


@fault(rows=(44,), checks=("collectives", "layers", "logits"), module="lm_head", effect="zeros")
@around(ProcessTPGroup, "_all_gather")
def gathered_into_a_scratch_tensor(original: Any, self: ProcessTPGroup, x: Tensor, dim: int) -> Tensor:
    """The all-gather fills one tensor and returns another, of fresh memory."""
    gathered: Tensor = original(self, x, dim)
    return torch.zeros_like(gathered)


def _reorder_gathered(patch: Patches, reorder: Any) -> None:
    """``reorder(parts, dim)`` in place of joining the gathered parts in rank order."""

    @patch.around(ProcessTPGroup, "_all_gather")
    def all_gather(original: Any, self: ProcessTPGroup, x: Tensor, dim: int) -> Any:
        parts = original(self, x, dim).chunk(self.size, dim)
        return reorder(parts, dim)


@fault(rows=(56,), checks=("collectives", "layers", "logits"), module="lm_head", effect="permuted")
def gather_interleaves_the_ranks(patch: Patches, tp: TPGroup) -> None:
    """Gathered rows come out with the ranks' columns in turn. A single row goes another way, and is right."""

    def reorder(parts: tuple[Tensor, ...], dim: int) -> Tensor:
        if parts[0].shape[0] == 1:
            return torch.cat(parts, dim)
        return torch.stack(parts, dim + 1).flatten(dim, dim + 1)

    _reorder_gathered(patch, reorder)


@fault(rows=(56,), layout="small-vocabulary", tp_sizes=(4,), checks=("collectives", "layers", "logits"), module="lm_head",
       effect="permuted")
def gathered_in_another_order(patch: Patches, tp: TPGroup) -> None:
    """The ranks' parts are joined from the second on, the first one last."""
    _reorder_gathered(patch, lambda parts, dim: torch.cat((*parts[1:], parts[0]), dim))


@fault(rows=(54,), checks=("collectives",))
@instead(ProcessTPGroup, "_all_reduce_min")
def minimum_became_a_sum(self: ProcessTPGroup, value: int) -> int:
    """The backend sums integers where their minimum was asked for."""
    total = torch.tensor([value], dtype=torch.int64, device=self.device)
    dist.all_reduce(total, group=self.process_group)
    return int(total.item())


@fault(rows=(48, 50), checks=("collectives", "logits"), module=EMBEDDING, effect="lost")
@around(ProcessTPGroup, "_all_reduce")
def sum_read_too_early(original: Any, self: ProcessTPGroup, x: Tensor) -> Tensor:
    """Rank 1 reads a result of more than two rows before the others' parts are in."""
    own = x.clone()
    total: Tensor = original(self, x)
    return own if self.rank == 1 and x.shape[:1] > (2,) else total


def _result_of_the_call_before(patch: Patches, tp: TPGroup, name: str) -> None:
    """Rank 1 gets what the last call of this collective with this shape gave."""
    before: dict[tuple[Any, ...], Tensor] = {}

    if tp.rank == 1:
        @patch.around(ProcessTPGroup, name)
        def collective(original: Any, self: ProcessTPGroup, x: Tensor, *dim: int) -> Tensor:
            result: Tensor = original(self, x, *dim)
            old = before.get((x.dtype, x.shape, dim), result)
            before[(x.dtype, x.shape, dim)] = result.clone()
            return old


@fault(rows=(51,), layout="qwen2", checks=("collectives", "logits"), module=EMBEDDING)
def sum_of_the_call_before(patch: Patches, tp: TPGroup) -> None:
    """The flag that says that the sum is there is still set from the last call of that shape: rank 1 reads the old sum."""
    _result_of_the_call_before(patch, tp, "_all_reduce")


@fault(rows=(51,), checks=("collectives", "logits"), module="lm_head", effect="stale")
def logits_of_the_step_before(patch: Patches, tp: TPGroup) -> None:
    """The same for an all-gather: rank 1 draws from the logits of the last step with as many rows."""
    _result_of_the_call_before(patch, tp, "_all_gather")


@fault(checks=("collectives", "layers", "logits"), module=EMBEDDING, effect="lost")
@around(ProcessTPGroup, "_all_reduce")
def last_rank_left_out(original: Any, self: ProcessTPGroup, x: Tensor) -> Any:
    """A sum over the ranks ends one rank too early."""
    return original(self, x * 0 if self.rank == self.size - 1 else x)


@fault(rows=(42,), layout="llama-odd", checks=("collectives", "layers", "logits"), module=EMBEDDING, effect="multiplied")
@around(ProcessTPGroup, "_all_reduce")
def mean_instead_of_sum(original: Any, self: ProcessTPGroup, x: Tensor) -> Tensor:
    """The all-reduce averages over the ranks, as it would for gradients."""
    total: Tensor = original(self, x)
    return (total / self.size).to(x.dtype)


@fault(layout="llama-odd", checks=("collectives", "logits"), module=EMBEDDING)
@around(ProcessTPGroup, "_all_reduce")
def sums_in_half_precision(original: Any, self: ProcessTPGroup, x: Tensor) -> Tensor:
    """Float32 parts travel, and are added, as bfloat16: an error that is rounding, and far too much of it."""
    total: Tensor = original(self, x.bfloat16())
    return total.to(x.dtype)


@fault(rows=(79,), checks=("layers", "logits"))
@around(RowParallelLinear, "forward")
def one_rank_takes_another_way(original: Any, self: RowParallelLinear, x_TI: Tensor) -> Any:
    """For steps of up to four tokens rank 1 decides by itself to leave out an all-reduce, and the others wait for it."""
    if self.tp.rank == 1 and len(x_TI) <= 4:
        return linear(x_TI, self.weight, self.bias)
    return original(self, x_TI)

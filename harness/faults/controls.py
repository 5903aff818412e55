"""Controls: changes that are right, or mere rounding. A check that minds one of them is wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import engine.kernels.attention_torch as attention_module
import engine.layers.norm as norm_module
import engine.parallel.embedding as embedding_module
import engine.parallel.linear as linear_module
from engine.kernels.rms_norm import rms_norm_torch
from engine.layers.matmul import linear
from engine.models.decoder import MLP
from engine.parallel.embedding import VocabParallelEmbedding
from engine.parallel.group import ProcessTPGroup, TPGroup
from engine.parallel.linear import RowParallelLinear
from engine.scheduling.kv_cache import BlockManager
from harness.faults.base import Patches, around, control, instead


def _widened(x: Tensor) -> Tensor:
    """In float32, or in float64 as it is: a step down would be no mere rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@control(rows=(39,))
@instead(RowParallelLinear, "forward")
def bias_on_rank_0_before_the_reduce(self: RowParallelLinear, x_TI: Tensor) -> Tensor:
    """Rank 0 alone adds the bias to its part: reported as a bug once, and none."""
    return self.tp.all_reduce(linear(x_TI, self.weight, self.bias if self.tp.rank == 0 else None))


@control(layout="llama-cut-group", tp_sizes=(3,))
@instead(ProcessTPGroup, "_all_reduce")
def ranks_summed_backwards(self: ProcessTPGroup, x: Tensor) -> Tensor:
    """The parts are gathered and added from the last rank to the first, rounded at each step."""
    parts = [torch.empty_like(x) for _ in range(self.size)]
    dist.all_gather(parts, x, group=self.process_group)
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total = total + part
    return x.copy_(total)


@control()
@instead(ProcessTPGroup, "_all_reduce")
def sums_in_two_messages(self: ProcessTPGroup, x: Tensor) -> Tensor:
    """An all-reduce travels as two, one for each half of the elements."""
    for half in x.view(-1).tensor_split(2):
        dist.all_reduce(half, group=self.process_group)
    return x


@control(rows=(47,))
@instead(norm_module, "add_rms_norm_torch")
def residual_kept_in_float32(x: Tensor, residual: Tensor, weight: Tensor, eps: float, **launch: Any) -> tuple[Tensor, Tensor]:
    """The residual is added and handed on in at least float32: other rounding than the baseline's, and no bug."""
    total = _widened(x) + _widened(residual)
    return rms_norm_torch(total, weight, eps).to(x.dtype), total


@control(layout="qwen3")
def products_added_in_two_halves(patch: Patches, tp: TPGroup) -> None:
    """A matmul adds the first half of the features up, then the second, in at least float32."""

    @patch.around(linear_module, "linear")
    @patch.around(embedding_module, "linear")
    def linear_in_halves(original: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        half = x.shape[1] // 2
        wide_x, wide_weight = _widened(x), _widened(weight)
        y = wide_x[:, :half] @ wide_weight[:, :half].T + wide_x[:, half:] @ wide_weight[:, half:].T
        return (y if bias is None else y + _widened(bias)).to(x.dtype)


@control(layout="llama-odd")
def reduced_at_another_call_site(patch: Patches, tp: TPGroup) -> None:
    """Row-parallel layers are reduced from another file and line than on the other ranks."""

    def forward(self: RowParallelLinear, x_TI: Tensor) -> Tensor:
        y_TO = self.tp.all_reduce(linear(x_TI, self.weight))
        return y_TO if self.bias is None else y_TO + self.bias

    if tp.rank == 1:
        patch.replace(RowParallelLinear, "forward", lambda original: forward)


@control(layout="qwen2")
def one_barrier_more(patch: Patches, tp: TPGroup) -> None:
    """All ranks meet once more in every layer."""

    @patch.around(MLP, "forward")
    def forward(original: Any, self: MLP, x_TE: Tensor) -> Any:
        tp.barrier()
        return original(self, x_TE)


@control(layout="qwen2")
@around(BlockManager, "__init__")
def blocks_handed_out_backwards(original: Any, self: BlockManager, *arguments: Any, **options: Any) -> None:
    """The cache's blocks are used from the last to the first."""
    original(self, *arguments, **options)
    for block in sorted(self.free, reverse=True):
        self.free.move_to_end(block)


@control(layout="llama-odd")
@instead(VocabParallelEmbedding, "forward")
def foreign_tokens_add_plain_zeros(self: VocabParallelEmbedding, token_ids_T: Tensor) -> Tensor:
    """Ranks add 0.0 for other ranks' tokens, not -0.0: no value changes."""
    ids = self.shard.ids
    is_mine_T = (token_ids_T >= ids.start) & (token_ids_T < ids.stop)
    row_T = (token_ids_T - ids.start).where(is_mine_T, 0)
    return self.tp.all_reduce(nn.functional.embedding(row_T, self.weight) * is_mine_T.unsqueeze(-1))


@control(layout="llama-cut-group")
@around(attention_module, "_attend")
def keys_copied_for_every_query_head(original: Any, q: Tensor, k_ANLH: Tensor, v_ANLH: Tensor, contexts: Tensor,
                                     kv_heads: list[int], scale: float) -> Any:
    """Every query head attends to a copy of its KV head, also where a group could share one."""
    return original(q, k_ANLH[:, kv_heads], v_ANLH[:, kv_heads], contexts, list(range(len(kv_heads))), scale)


@control()
def tensors_read_whole_then_cut(patch: Patches, tp: TPGroup) -> None:
    """Loaders read all of a tensor and cut it in memory."""
    patch.replace(linear_module, "rows_of", lambda original: lambda loaded, rows: loaded[:][rows.start : rows.stop])
    patch.replace(linear_module, "columns_of",
                  lambda original: lambda loaded, columns: loaded[:][:, columns.start : columns.stop])

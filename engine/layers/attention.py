"""Attention of one layer on one rank: rotate, write to the paged cache, attend.

Shape suffixes: T = tokens, C = columns of the fused projection, Q / N = local query / KV heads, H = head dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.kernels.rope import rope_store_kv, rope_store_kv_torch
from engine.layers.attention_layout import AttentionBackend, LayerCache
from engine.layers.dispatch import pick
from engine.layers.norm import RMSNorm
from engine.parallel.sharding import HeadShard
from engine.scheduling.batch import StepBatch

RopeTables = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """``[T, C] -> [T, Q * H]`` for this rank's heads: no collective.

    The model's rotary tables are handed in with each call: they are the same for all layers.
    """

    rope_options: ClassVar[dict[str, Any]] = {"settled": True}
    """How the rotation is launched."""

    def __init__(self, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, qkv_TC: Tensor, cache: LayerCache, batch: StepBatch, rope: RopeTables,
                q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None) -> Tensor:
        q_TQH = pick(qkv_TC, rope_store_kv, rope_store_kv_torch)(
            qkv_TC, batch.positions_T, *rope, cache.k_PNBH, cache.v_PNBH, batch.slots_T,
            q_norm_weight_H=None if q_norm is None else q_norm.weight,
            k_norm_weight_H=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps, **self.rope_options,
        )
        return self.backend(q_TQH, cache, batch).flatten(1)


def allocate_cache(num_layers: int, num_blocks: int, heads: HeadShard, block_size: int, head_dim: int, *,
                   dtype: torch.dtype, device: torch.device) -> list[LayerCache]:
    """An empty cache for every layer. Its content means nothing until written, and counts for nothing.

    Zeros all the same: kernels that load whole blocks multiply free slots by a probability of zero, which hides no NaN.
    """
    shape = (num_layers, 2, num_blocks, heads.local_num_kv_heads, block_size, head_dim)
    return [LayerCache(k, v) for k, v in torch.zeros(shape, dtype=dtype, device=device)]

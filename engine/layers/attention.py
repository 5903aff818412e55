"""Attention of one layer on one rank: rotate, write to the paged cache, attend, by a backend chosen by name.

Shape suffixes: T = tokens, C = columns of the fused projection, Q / N = local query / KV heads, H = head dim, P = cache
blocks, B = slots in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.batch import StepBatch
from engine.kernels.attention_torch import paged_attention_torch
from engine.kernels.rope import rope_store_kv_torch
from engine.layers.norm import RMSNorm
from engine.parallel.sharding import HeadShard

BACKENDS = ("torch",)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer on one rank, each ``[P, N, B, H]``."""

    k_PNBH: Tensor
    v_PNBH: Tensor


AttentionBackend = Callable[[Tensor, LayerCache, StepBatch], Tensor]
"""``(q [T, Q, H], cache, batch) -> [T, Q, H]``. The cache holds this step's keys and values already."""


def torch_backend(heads: HeadShard, head_dim: int) -> AttentionBackend:
    """Plain torch: runs anywhere, any GQA map, any block size; the truth that the kernels are held against."""
    scale = head_dim**-0.5
    kv_of_q = list(heads.kv_of_q)

    def attend(q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        return paged_attention_torch(q_TQH, cache.k_PNBH, cache.v_PNBH, batch.block_tables_SB, batch.cu_seqlens_S1,
                                     batch.context_lens_S, kv_of_q, scale)

    return attend


def select_backend(name: str, heads: HeadShard, head_dim: int) -> AttentionBackend:
    """The backend of that name; ``auto`` takes the fastest that serves this layout here.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"attention_backend={name!r} is unknown; supported: auto, {', '.join(BACKENDS)}")
    return torch_backend(heads, head_dim)


class Attention(nn.Module):
    """``[T, C] -> [T, Q * H]`` for this rank's heads: no collective.

    The model's rotary tables are handed in with each call: they are the same for all layers.
    """

    def __init__(self, heads: HeadShard, head_dim: int, *, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.backend = backend

    def forward(self, qkv_TC: Tensor, cache: LayerCache, batch: StepBatch, rope: tuple[Tensor, Tensor],
                q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None) -> Tensor:
        cos, sin = rope
        q_TQH = rope_store_kv_torch(
            qkv_TC, batch.positions_T, cos, sin, cache.k_PNBH, cache.v_PNBH, batch.slots_T,
            q_norm_weight_H=None if q_norm is None else q_norm.weight,
            k_norm_weight_H=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps,
        )
        return self.backend(q_TQH, cache, batch).flatten(1)


def allocate_cache(num_layers: int, num_blocks: int, heads: HeadShard, block_size: int, head_dim: int, *,
                   dtype: torch.dtype, device: torch.device) -> list[LayerCache]:
    """An empty cache for every layer. Its content means nothing until written: it is never read before."""
    shape = (num_layers, 2, num_blocks, heads.local_num_kv_heads, block_size, head_dim)
    return [LayerCache(k, v) for k, v in torch.empty(shape, dtype=dtype, device=device)]

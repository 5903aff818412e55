"""Rotary position embedding (Su et al., 2021) with the optional per-head RMSNorm of queries and keys before it.

Rotation is by halves, as Hugging Face's ``rotate_half`` does it: element ``i`` pairs with ``i + rotary_dim / 2``. With
tables of ``rotary_dim / 2`` columns and ``rotary_dim < head_dim`` the remaining elements pass unrotated.
"""

from __future__ import annotations

import torch

from engine.kernels.common import cdiv, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.rms_norm import rms_norm_torch
from engine.kernels.store_kv import store_kv_torch

# Shape suffixes: T = tokens, N = heads (queries' or keys'), H = head dim, M = positions in the table,
# R = rotary_dim / 2, P = cache blocks, B = slots in a block, C = columns of the fused projection


def _norm_and_rotate(
    x_TNH: torch.Tensor,
    cos_T1R: torch.Tensor,
    sin_T1R: torch.Tensor,
    norm_weight_H: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    x = x_TNH.to(compute_dtype(x_TNH))
    if norm_weight_H is not None:
        x = rms_norm_torch(x, norm_weight_H, eps)
    half = cos_T1R.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = (first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R, rest)
    return torch.cat(rotated, dim=-1).to(x_TNH.dtype)


def apply_rope_torch(
    q_TNH: torch.Tensor,
    k_TNH: torch.Tensor,
    positions_T: torch.Tensor,
    cos_table_MR: torch.Tensor,
    sin_table_MR: torch.Tensor,
    q_norm_weight_H: torch.Tensor | None = None,
    k_norm_weight_H: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch twin of :func:`apply_rope`; float64 input is computed in float64 (from the tables' values)."""
    dtype = compute_dtype(q_TNH)
    positions_T = positions_T.long()
    cos_T1R = cos_table_MR[positions_T].unsqueeze(1).to(dtype)
    sin_T1R = sin_table_MR[positions_T].unsqueeze(1).to(dtype)
    return (
        _norm_and_rotate(q_TNH, cos_T1R, sin_T1R, q_norm_weight_H, eps),
        _norm_and_rotate(k_TNH, cos_T1R, sin_T1R, k_norm_weight_H, eps),
    )


def rope_store_kv_torch(
    qkv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    cos_table_MR: torch.Tensor,
    sin_table_MR: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    q_norm_weight_H: torch.Tensor | None = None,
    k_norm_weight_H: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Plain-torch twin of :func:`rope_store_kv`."""
    num_kv_heads, head_dim = k_cache_PNBH.shape[1], k_cache_PNBH.shape[3]
    num_q_heads = _num_q_heads(qkv_TC, num_kv_heads, head_dim)
    heads = qkv_TC.unflatten(1, (num_q_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = apply_rope_torch(
        q, k, positions_T, cos_table_MR, sin_table_MR, q_norm_weight_H, k_norm_weight_H, eps
    )
    store_kv_torch(k, v, k_cache_PNBH, v_cache_PNBH, slot_mapping_T)
    return q


def _num_q_heads(qkv_TC: torch.Tensor, num_kv_heads: int, head_dim: int) -> int:
    """Query heads in a row of the fused projection ``[q heads | k heads | v heads]``."""
    num_heads, rest = divmod(qkv_TC.shape[1], head_dim)
    if rest or num_heads <= 2 * num_kv_heads:
        raise ValueError(
            f"qkv columns={qkv_TC.shape[1]} must be (num_q_heads + 2 * num_kv_heads) * head_dim with at least one query "
            f"head, for num_kv_heads={num_kv_heads} and head_dim={head_dim} of the cache: pass the fused projection's output"
        )
    return num_heads - 2 * num_kv_heads

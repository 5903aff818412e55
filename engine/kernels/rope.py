"""Rotary position embedding (Su et al., 2021), with an optional per-head RMSNorm before it.

Rotation is by halves, as Hugging Face's ``rotate_half`` does it: element ``i`` pairs with
``i + rotary_dim / 2``. Where the tables have fewer than ``head_dim / 2`` columns, the elements from
``rotary_dim`` on pass unrotated. Norm and rotation are float32 with a single rounding at the end.
"""

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs
from engine.kernels.rms_norm import rms_norm_torch
from engine.kernels.store_kv import check_caches, store_kv_torch

# Shape suffixes: T = tokens, N = heads (queries' or keys'), H = head dim, M = positions in the table,
# R = rotary_dim / 2, P = cache blocks, B = slots in a block, C = columns of the fused projection

_HEADS_PER_PROGRAM = 8


@triton.jit
def _load_half(at, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """HALF numbers from ``at`` on, a row for all heads."""
    dims = tl.arange(0, HALF_PAD)
    return tl.load(at + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _norm_and_rotate(
    source, target, source_stride_n, target_stride_n, heads, num_heads, cos, sin, first_weight, second_weight, norm_weight, eps,
    H: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, NORM: tl.constexpr,
    SETTLED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate ``heads`` of one token, from ``source`` to ``target``.

    With SETTLED, ``cos``, ``sin`` and halves of the norm's weight are loaded already; else they are where to load them from.
    """
    dims = tl.arange(0, HALF_PAD)
    keep = (heads < num_heads)[:, None] & (dims < HALF)[None, :]
    from_ = source + heads[:, None] * source_stride_n + dims[None, :]
    to = target + heads[:, None] * target_stride_n + dims[None, :]
    first = tl.load(from_, mask=keep, other=0.0).to(tl.float32)
    second = tl.load(from_ + HALF, mask=keep, other=0.0).to(tl.float32)
    if not SETTLED:
        cos = _load_half(cos, HALF, HALF_PAD)
        sin = _load_half(sin, HALF, HALF_PAD)
        if NORM:
            first_weight = _load_half(first_weight, HALF, HALF_PAD)
            second_weight = _load_half(second_weight, HALF, HALF_PAD)
    if REST_PAD > 0:
        rest_dims = 2 * HALF + tl.arange(0, REST_PAD)
        keep_rest = (heads < num_heads)[:, None] & (rest_dims < H)[None, :]
        from_rest = source + heads[:, None] * source_stride_n + rest_dims[None, :]
        rest = tl.load(from_rest, mask=keep_rest, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        if REST_PAD > 0:
            squares += tl.sum(rest * rest, axis=1)
        inverse_rms = tl.rsqrt(squares / H + eps)[:, None]
        first = first * inverse_rms * first_weight
        second = second * inverse_rms * second_weight
        if REST_PAD > 0:
            rest_weight = tl.load(norm_weight + rest_dims, mask=rest_dims < H, other=0.0).to(tl.float32)
            rest = rest * inverse_rms * rest_weight[None, :]
    element_ty: tl.constexpr = target.dtype.element_ty
    tl.store(to, (first * cos - second * sin).to(element_ty), mask=keep)
    tl.store(to + HALF, (second * cos + first * sin).to(element_ty), mask=keep)
    if REST_PAD > 0:
        to_rest = target + heads[:, None] * target_stride_n + rest_dims[None, :]
        tl.store(to_rest, rest.to(element_ty), mask=keep_rest)


@triton.jit
def _rope_kernel(
    q, k, v, q_out, k_out, v_out, slot_mapping, positions, cos_table, sin_table,
    q_norm_weight, k_norm_weight, eps,
    q_stride_t, q_stride_n, k_stride_t, k_stride_n, v_stride_t, v_stride_n,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HEADS: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, STORE: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per token and group of HEADS heads: the query heads' groups first, then the KV heads'.

    With STORE, ``k_out`` and ``v_out`` are the caches; else ``k_out`` is ``[T, N, H]``, and no values.
    """
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    q_groups: tl.constexpr = (NUM_Q + HEADS - 1) // HEADS
    position = tl.load(positions + token).to(tl.int64)
    slot = token
    if STORE:
        slot = tl.load(slot_mapping + token).to(tl.int64)
    cos = cos_table + position * HALF
    sin = sin_table + position * HALF
    q_weight_1, q_weight_2 = q_norm_weight, q_norm_weight + HALF
    k_weight_1, k_weight_2 = k_norm_weight, k_norm_weight + HALF
    if SETTLED:
        # All of this comes in while the kernels ahead still work on the projection.
        cos = _load_half(cos, HALF, HALF_PAD)
        sin = _load_half(sin, HALF, HALF_PAD)
        if NORM_Q:
            q_weight_1 = _load_half(q_weight_1, HALF, HALF_PAD)
            q_weight_2 = _load_half(q_weight_2, HALF, HALF_PAD)
        if NORM_K:
            k_weight_1 = _load_half(k_weight_1, HALF, HALF_PAD)
            k_weight_2 = _load_half(k_weight_2, HALF, HALF_PAD)
        wait_for_inputs(OVERLAP)
    if group < q_groups:
        heads = group * HEADS + tl.arange(0, HEADS)
        _norm_and_rotate(
            q + token * q_stride_t, q_out + token * (NUM_Q * H), q_stride_n, H, heads, NUM_Q,
            cos, sin, q_weight_1, q_weight_2, q_norm_weight, eps, H, HALF, HALF_PAD, REST_PAD, NORM_Q, SETTLED,
        )  # fmt: skip
    else:
        heads = (group - q_groups) * HEADS + tl.arange(0, HEADS)
        if STORE:
            target = (slot // BLOCK_SIZE) * STRIDE_P + (slot % BLOCK_SIZE) * STRIDE_B
        else:
            target = token * (NUM_KV * H)
        if slot >= 0:
            _norm_and_rotate(
                k + token * k_stride_t, k_out + target, k_stride_n, STRIDE_N, heads, NUM_KV,
                cos, sin, k_weight_1, k_weight_2, k_norm_weight, eps, H, HALF, HALF_PAD, REST_PAD, NORM_K, SETTLED,
            )  # fmt: skip
            if STORE:
                dims = tl.arange(0, H_PAD)
                keep = (heads < NUM_KV)[:, None] & (dims < H)[None, :]
                from_ = v + token * v_stride_t + heads[:, None] * v_stride_n + dims[None, :]
                rows = tl.load(from_, mask=keep)
                tl.store(v_out + target + heads[:, None] * STRIDE_N + dims[None, :], rows, mask=keep)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    slot_mapping_T: torch.Tensor | None,
    positions_T: torch.Tensor,
    cos_table_MR: torch.Tensor,
    sin_table_MR: torch.Tensor,
    q_norm_weight_H: torch.Tensor | None,
    k_norm_weight_H: torch.Tensor | None,
    eps: float,
    settled: bool,
    overlap: bool | None,
    heads: int | None = None,
) -> torch.Tensor:
    positions_T = positions_T.contiguous()
    weights = {"q_norm_weight": q_norm_weight_H, "k_norm_weight": k_norm_weight_H}
    check_kernel_inputs(q=q, k=k, **{name: w for name, w in weights.items() if w is not None})
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], cos_table_MR.shape[1]
    if 2 * half > head_dim or not (cos_table_MR.is_contiguous() and sin_table_MR.is_contiguous()):
        raise ValueError(
            f"cos and sin tables {tuple(cos_table_MR.shape)} must be contiguous with at most "
            f"head_dim / 2 columns, for head_dim={head_dim}: pass one column per rotated pair"
        )
    q_out = torch.empty((num_tokens, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return q_out
    store = v_out is not None
    # Without a cache k_out is [T, N, H]: only its head stride is looked at.
    stride_p, stride_n, stride_b = k_out.stride()[:3] if store else (0, head_dim, 0)
    block_size = k_out.shape[2] if store else 1
    rest = head_dim - 2 * half
    heads = heads or min(_HEADS_PER_PROGRAM, next_power_of_2(max(num_q_heads, num_kv_heads)))
    overlap = may_overlap(q, overlap)
    # Only the product of one token is a kernel that lets this one in early; behind others, asking in turn costs time.
    settled = settled and num_tokens == 1
    # Arguments that a variant never reads still need a tensor in their place.
    v = k if v is None else v
    _rope_kernel[(num_tokens, cdiv(num_q_heads, heads) + cdiv(num_kv_heads, heads))](
        q, k, v, q_out, k_out, k_out if v_out is None else v_out,
        positions_T if slot_mapping_T is None else slot_mapping_T.contiguous(),
        positions_T, cos_table_MR, sin_table_MR,
        cos_table_MR if q_norm_weight_H is None else q_norm_weight_H,
        cos_table_MR if k_norm_weight_H is None else k_norm_weight_H, eps,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        stride_p, stride_n, stride_b, block_size,
        num_q_heads, num_kv_heads, head_dim, next_power_of_2(head_dim),
        half, next_power_of_2(half), next_power_of_2(rest) if rest else 0, heads,
        q_norm_weight_H is not None, k_norm_weight_H is not None, store, settled, overlap,
        num_warps=max(1, heads * next_power_of_2(half) // 256), **early_launch(overlap),
    )  # fmt: skip
    return q_out


def apply_rope(
    q_TNH: torch.Tensor,
    k_TNH: torch.Tensor,
    positions_T: torch.Tensor,
    cos_table_MR: torch.Tensor,
    sin_table_MR: torch.Tensor,
    q_norm_weight_H: torch.Tensor | None = None,
    k_norm_weight_H: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    settled: bool = False,
    overlap: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, each RMS-normed per head where a weight is given, then rotated; new tensors.

    q_TNH, k_TNH   ``[T, heads, H]``, strided views allowed
    positions_T    ``[T]`` int32 or int64, each within ``[0, M)`` (padding tokens: 0)
    tables         ``[M, rotary_dim / 2]`` float32, contiguous
    settled        the kernel launched just before this one writes nothing but queries, keys and values
    overlap        whether to launch as :mod:`engine.kernels.overlap` describes; by default, where the device can

    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32 and for wider tables.
    """
    k_out = torch.empty(k_TNH.shape, dtype=k_TNH.dtype, device=k_TNH.device)
    q_out = _launch(
        q_TNH, k_TNH, None, k_out, None, None,
        positions_T, cos_table_MR, sin_table_MR, q_norm_weight_H, k_norm_weight_H, eps, settled, overlap,
    )  # fmt: skip
    return q_out, k_out


def rope_store_kv(
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
    *,
    settled: bool = False,
    overlap: bool | None = None,
    heads: int | None = None,
) -> torch.Tensor:
    """Norm, rotation and cache write in one pass over the fused projection; returns queries ``[T, N, H]``.

    qkv_TC   ``[T, (num_q_heads + 2 * num_kv_heads) * H]``: queries, keys, values; rows may be strided
    heads    of a program, a power of two: with a number of its own, a head's norm is summed alike however many a rank has
    others   as in :func:`apply_rope` and :func:`engine.kernels.store_kv.store_kv`; the number of KV heads and
             ``H`` are the caches'

    Tokens with slot -1 get queries and leave the caches alone. Raises ``ValueError`` as those two do, and
    when the columns fit no number of query heads.
    """
    check_caches(k_cache_PNBH, v_cache_PNBH)
    q, k, v = _split_heads(qkv_TC, k_cache_PNBH)
    return _launch(
        q, k, v, k_cache_PNBH, v_cache_PNBH, slot_mapping_T,
        positions_T, cos_table_MR, sin_table_MR, q_norm_weight_H, k_norm_weight_H, eps, settled, overlap, heads,
    )  # fmt: skip


def apply_rope_torch(
    q_TNH: torch.Tensor,
    k_TNH: torch.Tensor,
    positions_T: torch.Tensor,
    cos_table_MR: torch.Tensor,
    sin_table_MR: torch.Tensor,
    q_norm_weight_H: torch.Tensor | None = None,
    k_norm_weight_H: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch twin of :func:`apply_rope`; float64 input is computed in float64."""
    del settled
    dtype = compute_dtype(q_TNH)
    positions_T = positions_T.long()
    cos_T1R = cos_table_MR[positions_T].unsqueeze(1).to(dtype)
    sin_T1R = sin_table_MR[positions_T].unsqueeze(1).to(dtype)
    return (
        _norm_and_rotate_torch(q_TNH, cos_T1R, sin_T1R, q_norm_weight_H, eps),
        _norm_and_rotate_torch(k_TNH, cos_T1R, sin_T1R, k_norm_weight_H, eps),
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
    *,
    settled: bool = False,
) -> torch.Tensor:
    """Plain-torch twin of :func:`rope_store_kv`."""
    del settled
    q, k, v = _split_heads(qkv_TC, k_cache_PNBH)
    q, k = apply_rope_torch(q, k, positions_T, cos_table_MR, sin_table_MR, q_norm_weight_H, k_norm_weight_H, eps)
    store_kv_torch(k, v, k_cache_PNBH, v_cache_PNBH, slot_mapping_T)
    return q


def _norm_and_rotate_torch(
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


def _split_heads(qkv_TC: torch.Tensor, k_cache_PNBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a fused projection's query, key and value heads, each ``[T, heads, H]``."""
    num_kv_heads, head_dim = k_cache_PNBH.shape[1], k_cache_PNBH.shape[3]
    num_heads, rest = divmod(qkv_TC.shape[1], head_dim)
    if rest or num_heads <= 2 * num_kv_heads:
        raise ValueError(
            f"qkv columns={qkv_TC.shape[1]} must be (num_q_heads + 2 * num_kv_heads) * head_dim with "
            f"at least one query head, for num_kv_heads={num_kv_heads} and head_dim={head_dim} of the cache: "
            f"pass the whole output of the fused projection"
        )
    heads = qkv_TC.unflatten(1, (num_heads, head_dim))
    q, k, v = heads.split([num_heads - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v

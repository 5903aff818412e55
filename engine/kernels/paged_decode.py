"""Decode attention: one query token per sequence against its keys in the paged cache, split over the keys.

One program per (KV head, sequence, split) reads that part of the cache once, for all query heads of the KV
head together; where there are splits, a second kernel combines them (the split-KV scheme of FlashDecoding:
Dao, Haziza, Massa and Sizov, 2023, on the online softmax of Milakov and Gimelshein, 2018).

Grids depend on shapes and on bounds known to the host, never on the lengths on the device: CUDA graphs can
hold them.
"""

import math

import torch

from engine.kernels.attention_torch import paged_attention_torch
from engine.kernels.common import cdiv, check_kernel_inputs, next_power_of_2, rows_adjacent, tl, triton
from engine.kernels.store_kv import check_caches

# Shape suffixes: S = sequences, Q = query heads on this rank, N = KV heads on this rank, H = head dim,
# P = cache blocks, B = slots in a block, X = splits

_MAX_SPLITS = 64
_PROGRAMS_PER_SM = 8  # enough work in flight to hide the longest sequence's tail
_COMBINED_AT_ONCE = 16  # fixed, so that the order of summation does not depend on the number of splits


@triton.jit
def _tokens_per_split(context, split_len, num_splits, TILE: tl.constexpr):
    """``split_len``, or where that is 0 the context's tiles spread evenly; at least one tile."""
    even = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    return tl.where(split_len > 0, split_len, tl.maximum(even, TILE))


@triton.jit
def attend_keys(
    q_rows, k_head, v_head, table, begin, end, scale_log2,
    STRIDE_P: tl.constexpr, STRIDE_B: tl.constexpr, BLOCK_SIZE: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query rows to the keys ``begin : end`` of one sequence and KV head, ``begin`` a multiple of TILE.

    Returns the sums of values, not yet divided by the sums of weights, these, and the largest scores in units of log2.
    """
    dims = tl.arange(0, H_PAD)
    tile = tl.arange(0, TILE)
    top = tl.full([ROWS], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, H_PAD], tl.float32)
    for start in range(begin, end, TILE):
        start = tl.multiple_of(start, TILE)
        keep = start + tile < end
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            at = ((start % BLOCK_SIZE + tile) * STRIDE_B)[:, None] + dims[None, :]
            k_at = k_head + block * STRIDE_P + at
            v_at = v_head + block * STRIDE_P + at
        else:
            blocks = tl.load(table + (start + tile) // BLOCK_SIZE, mask=keep, other=0).to(tl.int64)
            at = (blocks * STRIDE_P + (start + tile) % BLOCK_SIZE * STRIDE_B)[:, None] + dims[None, :]
            k_at = k_head + at
            v_at = v_head + at
        keep_kv = keep[:, None]
        if H != H_PAD:
            keep_kv = keep_kv & (dims < H)[None, :]
        # Free slots hold anything, NaN included: they must come in as zeros, not only be masked out later.
        k = tl.load(k_at, mask=keep_kv, other=0.0)
        v = tl.load(v_at, mask=keep_kv, other=0.0)
        scores = tl.dot(q_rows, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(keep[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    return acc, total, top


# What changes from step to step must not compile a new kernel: each variant would stall a step for a second.
@triton.jit(do_not_specialize=["lse_stride_s", "lse_stride_h", "table_stride"],
            do_not_specialize_on_alignment=["block_tables", "context_lens"])  # fmt: skip
def _decode_kernel(
    q, k_cache, v_cache, block_tables, context_lens, q_start, q_count, out, lse, scale_log2, split_len,
    q_stride_s, q_stride_h, out_stride_s, out_stride_h, out_stride_x,
    lse_stride_s, lse_stride_h, table_stride,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out`` is the result; with SPLIT, float32 partial results and ``lse`` (log2) their weights."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + seq)
    begin = 0
    end = context
    if SPLIT:
        tokens = _tokens_per_split(context, split_len, tl.num_programs(2), TILE)
        begin = split * tokens
        end = tl.minimum(begin + tokens, context)
        if begin >= end:
            return

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, H_PAD)
    keep_rows = rows < tl.load(q_count + kv_head)
    heads = tl.load(q_start + kv_head) + rows
    keep_q = keep_rows[:, None] & (dims < H)[None, :]
    q_at = q + seq.to(tl.int64) * q_stride_s + heads[:, None] * q_stride_h + dims[None, :]
    q_rows = tl.load(q_at, mask=keep_q, other=0.0)
    acc, total, top = attend_keys(
        q_rows, k_cache + kv_head.to(tl.int64) * STRIDE_N, v_cache + kv_head.to(tl.int64) * STRIDE_N,
        block_tables + seq.to(tl.int64) * table_stride, begin, end, scale_log2,
        STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, ROWS, TILE, PRECISION,
    )  # fmt: skip
    # A padding sequence has no keys: its rows are zeros.
    safe_total = tl.where(total > 0, total, 1.0)
    acc = acc / safe_total[:, None]
    out_at = out + seq.to(tl.int64) * out_stride_s + heads[:, None] * out_stride_h + dims[None, :]
    if SPLIT:
        out_at += split * out_stride_x
        lse_at = lse + seq.to(tl.int64) * lse_stride_s + heads * lse_stride_h + split
        tl.store(lse_at, top + tl.log2(safe_total), mask=keep_rows)
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=keep_q)


@triton.jit(do_not_specialize=["num_splits", "lse_stride_s", "lse_stride_h"],
            do_not_specialize_on_alignment=["context_lens"])  # fmt: skip
def _combine_kernel(
    partial, lse, context_lens, out, split_len, num_splits,
    partial_stride_s, partial_stride_h, partial_stride_x,
    lse_stride_s, lse_stride_h, out_stride_s, out_stride_h,
    H: tl.constexpr, H_PAD: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per (query head, sequence): the weighted mean of its splits that hold keys."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    context = tl.load(context_lens + seq)
    active = tl.cdiv(context, _tokens_per_split(context, split_len, num_splits, TILE))
    dims = tl.arange(0, H_PAD)
    chunk = tl.arange(0, CHUNK)
    lse_row = lse + seq.to(tl.int64) * lse_stride_s + head * lse_stride_h
    partial_row = partial + seq.to(tl.int64) * partial_stride_s + head * partial_stride_h
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([H_PAD], tl.float32)
    for first in range(0, active, CHUNK):
        splits = first + chunk
        keep = splits < active
        logs = tl.load(lse_row + splits, mask=keep, other=float("-inf"))
        values_at = partial_row + splits[:, None] * partial_stride_x + dims[None, :]
        values = tl.load(values_at, mask=keep[:, None] & (dims < H)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(logs, axis=0))
        weights = tl.exp2(logs - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(weights[:, None] * values, axis=0)
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)
    out_at = out + seq.to(tl.int64) * out_stride_s + head * out_stride_h + dims
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=dims < H)


def choose_splits(num_seqs: int, num_kv_heads: int, max_context: int, *, num_sms: int = 132) -> int:
    """Splits that fill ``num_sms`` multiprocessors: 1 for a large batch, up to 64 for one sequence.

    A function of shapes and bounds alone, hence constant for a captured graph. No split is planned for fewer
    than 128 tokens of ``max_context``.

    >>> choose_splits(256, 8, 4096), choose_splits(1, 8, 32768), choose_splits(1, 8, 100)
    (1, 64, 1)
    """
    wanted = cdiv(_PROGRAMS_PER_SM * num_sms, max(1, num_seqs * num_kv_heads))
    return max(1, min(wanted, max_context // 128, _MAX_SPLITS))


def paged_decode(
    q_SQH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens_S: torch.Tensor,
    q_start_N: torch.Tensor,
    q_count_N: torch.Tensor,
    scale: float,
    *,
    out_SQH: torch.Tensor | None = None,
    max_context: int | None = None,
    max_group: int | None = None,
    num_splits: int | None = None,
    split_len: int | None = None,
    tile: int | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
) -> torch.Tensor:
    """Attention of one query token per sequence to that sequence's ``context_len`` cached keys.

    q_SQH            ``[S, Q, H]``, strided views allowed
    caches           ``[P, N, B, H]``, both laid out alike, this step's token already stored
    block_tables     ``[S, max_blocks]`` int32; entries past a sequence's length are never read
    context_lens_S   ``[S]`` int32; 0 marks a padding sequence, whose result is zeros
    q_start_N, q_count_N   ``[N]`` int32: KV head ``n`` serves the query heads ``start : start + count``;
                     counts may differ, together they cover every query head
    scale            factor on the scores, usually ``H ** -0.5``
    out_SQH          where to write (last dimension contiguous); allocated if None
    max_context      a bound on ``context_lens``, default ``max_blocks * B``; shapes the grid
    max_group        a bound on ``q_count``; the default holds for any but may pad more rows than needed
    num_splits       programs that share one sequence's keys, by default :func:`choose_splits`; each
                     sequence's tiles are spread evenly over them
    split_len        instead: splits of so many tokens, a multiple of the tile, at absolute positions. The
                     result's bits then do not depend on the batch, nor on ``max_context``
    tile, num_warps, num_stages   keys per inner step, and Triton's launch parameters

    Scores, softmax and sums are float32; the probabilities are rounded to the cache's dtype before they meet
    the values (not in float32), and the result ``[S, Q, H]`` once more.
    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32, for caches laid out differently,
    and for splits that do not fit together.
    """
    check_kernel_inputs(q=q_SQH)
    check_caches(k_cache_PNBH, v_cache_PNBH)
    block_tables, context_lens_S = rows_adjacent(block_tables), context_lens_S.contiguous()
    num_seqs, num_q_heads, head_dim = q_SQH.shape
    num_kv_heads, block_size = k_cache_PNBH.shape[1], k_cache_PNBH.shape[2]
    device = q_SQH.device
    if out_SQH is None:
        out_SQH = torch.empty((num_seqs, num_q_heads, head_dim), dtype=q_SQH.dtype, device=device)
    if num_seqs == 0:
        return out_SQH
    if max_context is None:
        max_context = block_tables.shape[1] * block_size
    if split_len is not None:
        num_splits = max(1, cdiv(max_context, split_len))
    elif num_splits is None:
        num_splits = choose_splits(num_seqs, num_kv_heads, max_context)
    head_dim_padded = max(16, next_power_of_2(head_dim))
    if tile is None:
        # With pinned splits the tile is part of what is pinned: it must not depend on the number of splits.
        whole = num_splits == 1 and split_len is None
        tile = default_tile(whole, head_dim_padded, q_SQH.element_size())
    if split_len is not None and (split_len <= 0 or split_len % tile):
        raise ValueError(f"split_len={split_len} must be a positive multiple of tile={tile}: change either")
    # Every other KV head serves at least one query head.
    group_bound = num_q_heads - num_kv_heads + 1 if max_group is None else max_group
    split = num_splits > 1
    if split:
        partial_SQXH = torch.empty((num_seqs, num_q_heads, num_splits, head_dim), dtype=torch.float32, device=device)
        lse_SQX = torch.empty((num_seqs, num_q_heads, num_splits), dtype=torch.float32, device=device)
        target, target_strides = partial_SQXH, partial_SQXH.stride()[:3]
        lse, lse_strides = lse_SQX, lse_SQX.stride()[:2]
    else:
        target, target_strides = out_SQH, (out_SQH.stride(0), out_SQH.stride(1), 0)
        lse, lse_strides = out_SQH, (0, 0)  # never read
    stride_p, stride_n, stride_b, _ = k_cache_PNBH.stride()
    _decode_kernel[(num_kv_heads, num_seqs, num_splits)](
        q_SQH, k_cache_PNBH, v_cache_PNBH, block_tables, context_lens_S,
        q_start_N.contiguous(), q_count_N.contiguous(), target, lse,
        scale * math.log2(math.e), split_len or 0,
        q_SQH.stride(0), q_SQH.stride(1), *target_strides, *lse_strides, block_tables.stride(0),
        stride_p, stride_n, stride_b, block_size, head_dim, head_dim_padded,
        max(16, next_power_of_2(max(1, group_bound))), tile, split,
        "ieee",
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if split:
        _combine_kernel[(num_q_heads, num_seqs)](
            partial_SQXH, lse_SQX, context_lens_S, out_SQH, split_len or 0, num_splits,
            *partial_SQXH.stride()[:3], *lse_SQX.stride()[:2], out_SQH.stride(0), out_SQH.stride(1),
            head_dim, head_dim_padded, tile, _COMBINED_AT_ONCE,
        )  # fmt: skip
    return out_SQH


def default_tile(whole: bool, head_dim_padded: int, element_size: int) -> int:
    """Measured best on an H200: 128 keys for whole sequences, 64 for splits, within 32 KiB of keys."""
    if element_size == 4:  # exact float32 products run on the ordinary cores: registers are the limit
        return max(16, min(64, 2048 // head_dim_padded))
    return min(128 if whole else 64, 16384 // head_dim_padded)


def paged_decode_torch(
    q_SQH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens_S: torch.Tensor,
    q_start_N: torch.Tensor,
    q_count_N: torch.Tensor,
    scale: float,
    *,
    out_SQH: torch.Tensor | None = None,
    max_context: int | None = None,
    max_group: int | None = None,
    num_splits: int | None = None,
    split_len: int | None = None,
    tile: int | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
) -> torch.Tensor:
    """Plain-torch twin of :func:`paged_decode`; how the kernel is launched means nothing here."""
    del max_context, max_group, num_splits, split_len, tile, num_warps, num_stages
    kv_of_q = [0] * q_SQH.shape[1]
    for kv_head, (start, count) in enumerate(zip(q_start_N.tolist(), q_count_N.tolist(), strict=True)):
        kv_of_q[start : start + count] = [kv_head] * count
    cu_seqlens = range(q_SQH.shape[0] + 1)
    out = paged_attention_torch(q_SQH, k_cache_PNBH, v_cache_PNBH, block_tables, cu_seqlens, context_lens_S, kv_of_q, scale)
    return out if out_SQH is None else out_SQH.copy_(out)

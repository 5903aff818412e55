"""Causal attention on a GPU of which a query's bits depend on its own keys and values alone.

Keys are taken in tiles at absolute positions. A tile is attended to by itself: its largest score, its weights and their sum, its
weighted values. Then the tiles' results are put together one after the other, from the first on. Prompts do that in
registers; decode steps give tiles to many programs and put their results together in a second launch, in the same order and by
the same operations. None is contracted to a fused one behind our back, and what a row of a tensor core's tile gets does not
depend on the other rows: whether they are heads or tokens, and of whom.

Shape suffixes: T = tokens, S = sequences, Q / N = this rank's query / KV heads, H = head dim, P = cache blocks, B = slots of a
block, K = tiles of keys, G = query heads of a KV head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.common import cdiv, next_power_of_2, rows_adjacent, tl, triton
from engine.kernels.overlap import LINE_BYTES, early_launch, fetch_lines, may_overlap, wait_for_inputs
from engine.kernels.paged_prefill import sequence_of_tile

TILE = 64
_ROWS = 64
"""The least rows of a tile for Hopper's instruction. The older one takes 16, and gives the same bits."""
_NUM_SMS = 132  # of an H200; a guess elsewhere costs speed, not bits


class DecodeLaunch(NamedTuple):
    """How decode steps are cut and launched: for speed alone.

    rows              of a tensor core's tile, of which a warp has 16
    programs_per_sm   that run at once
    num_stages        tiles on their way, or at work
    together          tiles whose results are on their way at once
    fetches           whether a program asks for its first keys and values while the kernels ahead still work
    """

    rows: int = _ROWS
    programs_per_sm: int = 2
    num_stages: int = 3
    together: int = 8
    fetches: bool = True


def decode_launch_of(num_seqs: int, num_kv_heads: int) -> DecodeLaunch:
    """The fastest on an H200 of those that were measured."""
    if num_seqs * num_kv_heads < _NUM_SMS // 8:
        return DecodeLaunch(programs_per_sm=1, together=16)
    if num_seqs * num_kv_heads < _NUM_SMS:
        return DecodeLaunch(rows=16, programs_per_sm=4, num_stages=2, together=16)
    return DecodeLaunch(num_stages=2)


@triton.jit
def _attend(
    q_rows, last_seen, start, context, k_head, v_head, table, scale_log2,
    STRIDE_P: tl.constexpr, STRIDE_B: tl.constexpr, BLOCK_SIZE: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Query rows to the keys ``start : start + TILE``: weighted values, sums of weights, largest scores in units of log2.

    Without MASKED all rows see all of these keys. A row that sees none gets zeros, and -inf.
    """
    dims = tl.arange(0, H_PAD)
    keys = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        at = ((start % BLOCK_SIZE + tl.arange(0, TILE)) * STRIDE_B)[:, None] + dims[None, :] + block * STRIDE_P
    else:
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < context, other=0).to(tl.int64)
        at = (blocks * STRIDE_P + keys % BLOCK_SIZE * STRIDE_B)[:, None] + dims[None, :]
    # Free slots hold anything, NaN included: they must come in as zeros, not only be masked out later.
    keep = (keys < context)[:, None] & (dims < H)[None, :]
    k = tl.load(k_head + at, mask=keep, other=0.0)
    v = tl.load(v_head + at, mask=keep, other=0.0)
    scores = tl.dot(q_rows, tl.trans(k)) * scale_log2
    if MASKED:
        scores = tl.where(keys[None, :] <= last_seen[:, None], scores, float("-inf"))
    top = tl.max(scores, axis=1)
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    return tl.dot(weights.to(v.dtype), v), tl.sum(weights, axis=1), top


@triton.jit
def _put_together(acc, total, top, tile_acc, tile_total, tile_top):
    """What all tiles so far have, and one more. A tile without keys changes nothing."""
    new_top = tl.maximum(top, tile_top)
    decay = tl.where(top == float("-inf"), 0.0, tl.exp2(top - new_top))
    share = tl.where(tile_top == float("-inf"), 0.0, tl.exp2(tile_top - new_top))
    return acc * decay[:, None] + tile_acc * share[:, None], total * decay + tile_total * share, new_top


@triton.jit
def _result(acc, total):
    """A mean of values; where there were no keys, zeros."""
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    return tl.where(mean == 0.0, 0.0, mean)  # a tile without keys may have added 0 to -0


# What changes from step to step must not compile a new kernel: each variant would stall a step for a second.
@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "table_stride"],
            do_not_specialize_on_alignment=["block_tables", "cu_seqlens", "context_lens"])  # fmt: skip
def _prefill_kernel(
    q, k_cache, v_cache, block_tables, cu_seqlens, context_lens, kv_of_q, out, scale_log2, num_seqs, num_tokens,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h, table_stride,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr, H_PAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per (query head, tile of queries)."""
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # a sequence's last tile sees the most keys
    seq, first, q_begin, q_end = sequence_of_tile(cu_seqlens, tile, num_seqs, num_tokens, ROWS)
    if first >= q_end - q_begin:
        return
    rows = first + tl.arange(0, ROWS)
    dims = tl.arange(0, H_PAD)
    tokens = (q_begin + rows).to(tl.int64)
    keep = (rows < q_end - q_begin)[:, None] & (dims < H)[None, :]
    q_rows = tl.load(q + tokens[:, None] * q_stride_t + head * q_stride_h + dims[None, :], mask=keep, other=0.0)
    context = tl.load(context_lens + seq, mask=seq < num_seqs, other=0)
    offset = context - (q_end - q_begin)  # position of the sequence's first query
    # Keys that all rows see, in whole tiles, and keys that any of them sees. Padding sees none.
    common = tl.where(context > 0, tl.maximum(offset + first + 1, 0) // TILE * TILE, 0)
    end = tl.minimum(offset + first + ROWS, context)
    table = block_tables + tl.cast(seq, tl.int64) * table_stride
    kv_head = tl.load(kv_of_q + head).to(tl.int64)
    k_head, v_head = k_cache + kv_head * STRIDE_N, v_cache + kv_head * STRIDE_N
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, H_PAD], tl.float32)
    for start in range(0, common, TILE):
        start = tl.multiple_of(start, TILE)
        tile_acc, tile_total, tile_top = _attend(
            q_rows, offset + rows, start, context, k_head, v_head, table, scale_log2,
            STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, TILE, False,
        )  # fmt: skip
        acc, total, top = _put_together(acc, total, top, tile_acc, tile_total, tile_top)
    for start in range(common, end, TILE):
        start = tl.multiple_of(start, TILE)
        tile_acc, tile_total, tile_top = _attend(
            q_rows, offset + rows, start, context, k_head, v_head, table, scale_log2,
            STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, TILE, True,
        )  # fmt: skip
        acc, total, top = _put_together(acc, total, top, tile_acc, tile_total, tile_top)
    out_at = out + tokens[:, None] * out_stride_t + head * out_stride_h + dims[None, :]
    tl.store(out_at, _result(acc, total).to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["table_stride", "max_tiles"], do_not_specialize_on_alignment=["block_tables", "context_lens"])
def _decode_kernel(
    q, k_cache, v_cache, block_tables, context_lens, q_start, q_count, out, partial, stats, scale_log2, max_tiles,
    q_stride_s, q_stride_h, out_stride_s, out_stride_h, table_stride,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr, H_PAD: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
    FETCH: tl.constexpr, LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (s, n, w) of (S, N, W): every W-th tile from w on of sequence s, for the query heads of KV head n.

    With WHOLE, W is 1: all tiles, put together. Else each tile's result is left for :func:`_combine_kernel`.
    """
    # Lengths and tables are a step's inputs, written before its first kernel: only queries and cache are waited for.
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    context = tl.load(context_lens + seq)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, H_PAD)
    keep_rows = rows < tl.load(q_count + kv_head)
    keep = keep_rows[:, None] & (dims < H)[None, :]
    heads = tl.load(q_start + kv_head) + rows
    q_at = q + seq * q_stride_s + heads[:, None] * q_stride_h + dims[None, :]
    table = block_tables + seq * table_stride
    k_head, v_head = k_cache + kv_head.to(tl.int64) * STRIDE_N, v_cache + kv_head.to(tl.int64) * STRIDE_N
    if FETCH:
        keys = tl.program_id(2) * TILE + tl.arange(0, TILE)
        old = keys < context  # the last of them may not be there yet: what is asked for twice is right the second time
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=old, other=0).to(tl.int64)
        lines_at = (blocks * STRIDE_P + keys % BLOCK_SIZE * STRIDE_B)[:, None]
        fetch_lines(k_head + lines_at, old[:, None], H, FETCH, LINE)
        fetch_lines(v_head + lines_at, old[:, None], H, FETCH, LINE)
    wait_for_inputs(OVERLAP)
    q_rows = tl.load(q_at, mask=keep, other=0.0)
    last_seen = tl.zeros([ROWS], tl.int32) + (context - 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, H_PAD], tl.float32)
    for start in range(tl.program_id(2) * TILE, context, tl.num_programs(2) * TILE):
        start = tl.multiple_of(start, TILE)
        tile_acc, tile_total, tile_top = _attend(
            q_rows, last_seen, start, context, k_head, v_head, table, scale_log2,
            STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, TILE, True,
        )  # fmt: skip
        if WHOLE:
            acc, total, top = _put_together(acc, total, top, tile_acc, tile_total, tile_top)
        else:
            at = ((seq * tl.num_programs(1) + kv_head) * max_tiles + start // TILE) * GROUP + rows
            tl.store(stats + 2 * at, tile_total, mask=keep_rows)
            tl.store(stats + 2 * at + 1, tile_top, mask=keep_rows)
            tl.store(partial + at[:, None] * H + dims[None, :], tile_acc, mask=keep)
    if WHOLE:
        out_at = out + seq * out_stride_s + heads[:, None] * out_stride_h + dims[None, :]
        tl.store(out_at, _result(acc, total).to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["max_tiles"], do_not_specialize_on_alignment=["context_lens"])
def _combine_kernel(
    context_lens, q_start, q_count, partial, stats, out, max_tiles, out_stride_s, out_stride_h,
    H: tl.constexpr, H_PAD: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, TOGETHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (s, n, g): query head g of KV head n, one tile after the other, of which TOGETHER are loaded at a time."""
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    tiles = tl.cdiv(tl.load(context_lens + seq), TILE)
    num_rows = tl.load(q_count + kv_head)
    head = tl.load(q_start + kv_head) + row
    wait_for_inputs(OVERLAP)
    if row >= num_rows:
        return
    one = tl.arange(0, 1)
    dims = tl.arange(0, H_PAD)
    first = (seq * tl.num_programs(1) + kv_head) * max_tiles * GROUP + row
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, H_PAD], tl.float32)
    for start in range(0, tiles, TOGETHER):
        for next_ in tl.static_range(TOGETHER):
            tile = start + next_
            at = first + tile * GROUP + one
            keep = (one >= 0) & (tile < tiles)
            tile_acc = tl.load(partial + at[:, None] * H + dims[None, :], mask=keep[:, None] & (dims < H)[None, :], other=0.0)
            tile_total = tl.load(stats + 2 * at, mask=keep, other=0.0)
            tile_top = tl.load(stats + 2 * at + 1, mask=keep, other=float("-inf"))
            acc, total, top = _put_together(acc, total, top, tile_acc, tile_total, tile_top)
    out_at = out + seq * out_stride_s + head * out_stride_h + dims[None, :]
    tl.store(out_at, _result(acc, total).to(out.dtype.element_ty), mask=(dims < H)[None, :])


def prefill_in_order(q_TQH: Tensor, k_cache_PNBH: Tensor, v_cache_PNBH: Tensor, block_tables_SB: Tensor, cu_seqlens_S1: Tensor,
                     context_lens_S: Tensor, kv_of_q_Q: Tensor, scale: float, *, out_TQH: Tensor, rows: int = 128) -> None:
    """As :func:`engine.kernels.paged_prefill.paged_prefill`, in bfloat16.

    rows   queries of a program, for speed alone
    """
    num_tokens, num_q_heads, head_dim = q_TQH.shape
    if num_tokens == 0:
        return
    block_tables_SB = rows_adjacent(block_tables_SB)
    num_seqs, block_size = block_tables_SB.shape[0], k_cache_PNBH.shape[2]
    _prefill_kernel[(num_q_heads, num_tokens // rows + num_seqs + 1)](
        q_TQH, k_cache_PNBH, v_cache_PNBH, block_tables_SB, cu_seqlens_S1, context_lens_S, kv_of_q_Q, out_TQH,
        scale * math.log2(math.e), num_seqs, num_tokens,
        q_TQH.stride(0), q_TQH.stride(1), out_TQH.stride(0), out_TQH.stride(1), block_tables_SB.stride(0),
        *k_cache_PNBH.stride()[:3], block_size, head_dim, max(16, next_power_of_2(head_dim)), rows, TILE,
        num_warps=rows // 16, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip


def decode_in_order(q_SQH: Tensor, k_cache_PNBH: Tensor, v_cache_PNBH: Tensor, block_tables_SB: Tensor, context_lens_S: Tensor,
                    q_start_N: Tensor, q_count_N: Tensor, scale: float, *, out_SQH: Tensor, max_context: int,
                    max_group: int, programs: int | None = None) -> None:
    """As :func:`engine.kernels.paged_decode.paged_decode`, in bfloat16.

    programs   that share the tiles of a sequence and KV head, for speed alone; by default as many as keep the device busy
    """
    num_seqs, _, head_dim = q_SQH.shape
    if num_seqs == 0:
        return
    block_tables_SB = rows_adjacent(block_tables_SB)
    num_kv_heads, block_size = k_cache_PNBH.shape[1], k_cache_PNBH.shape[2]
    max_tiles = max(1, cdiv(max_context, TILE))
    cut = decode_launch_of(num_seqs, num_kv_heads)
    programs = programs or max(1, min(max_tiles, cut.programs_per_sm * _NUM_SMS // (num_seqs * num_kv_heads)))
    whole = programs == 1
    overlap = may_overlap(q_SQH)
    partial = torch.empty((0 if whole else num_seqs, num_kv_heads, max_tiles, max_group, head_dim), dtype=torch.float32,
                          device=q_SQH.device)
    stats = torch.empty((*partial.shape[:-1], 2), dtype=torch.float32, device=q_SQH.device)
    head_dim_padded, rows = max(16, next_power_of_2(head_dim)), max(cut.rows, next_power_of_2(max_group))
    line = LINE_BYTES // k_cache_PNBH.element_size()
    _decode_kernel[(num_seqs, num_kv_heads, programs)](
        q_SQH, k_cache_PNBH, v_cache_PNBH, block_tables_SB, context_lens_S, q_start_N, q_count_N, out_SQH, partial, stats,
        scale * math.log2(math.e), max_tiles, q_SQH.stride(0), q_SQH.stride(1), out_SQH.stride(0), out_SQH.stride(1),
        block_tables_SB.stride(0), *k_cache_PNBH.stride()[:3], block_size, head_dim, head_dim_padded, rows, max_group, TILE,
        whole, cdiv(head_dim_padded, line) if overlap and cut.fetches else 0, line, overlap,
        num_warps=rows // 16, num_stages=cut.num_stages if head_dim <= 128 else 2, enable_fp_fusion=False,
        **early_launch(overlap),
    )  # fmt: skip
    if not whole:
        _combine_kernel[(num_seqs, num_kv_heads, max_group)](
            context_lens_S, q_start_N, q_count_N, partial, stats, out_SQH, max_tiles, out_SQH.stride(0), out_SQH.stride(1),
            head_dim, head_dim_padded, max_group, TILE, cut.together, overlap, num_warps=1, enable_fp_fusion=False,
            **early_launch(overlap),
        )  # fmt: skip

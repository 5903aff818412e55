"""Decode attention: one query token per sequence against its keys in the paged cache, in parts and then put together.

The keys of all sequences, tile after tile, are one long row, and each program of a KV head takes an equal stretch of it: a
part of a sequence, or the end of one, some whole ones and the start of another. The stretches follow from the lengths on the
device, so that a captured graph adapts to them from step to step. There are as many programs as run at once: all begin and
end together. Each key is read once, for all query heads of its KV head together. What several programs have of one sequence
a second launch combines, in the order of the keys.

The cut is that of stream-K (Osama et al., 2023) for matrix products, the combination that of FlashDecoding (Dao, Haziza,
Massa and Sizov, 2023) on the online softmax of Milakov and Gimelshein (2018); FlashInfer (Ye et al., 2025) balances decode
attention with a plan that the host makes.
"""

import math

import torch

from engine.kernels.attention_torch import paged_attention_torch
from engine.kernels.common import cdiv, check_kernel_inputs, next_power_of_2, rows_adjacent, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs
from engine.kernels.store_kv import check_caches

# Shape suffixes: S = sequences, Q = query heads on this rank, N = KV heads on this rank, H = head dim,
# P = cache blocks, B = slots in a block, W = programs of a KV head, G = query heads of a KV head

_NUM_SMS = 132  # of an H200; a guess elsewhere costs speed, not correctness
_REGISTERS_PER_SM = 65536
_PROGRAMS_PER_SM = 4
_COMBINED_PIECES = 32  # of a sequence, held at once by the program that combines them
_COMBINED_ELEMENTS = 4096  # of these pieces, at most


@triton.jit
def _tiles_of(contexts, seqs, num_seqs, TILE: tl.constexpr):
    """Tiles of each sequence's keys. A padding sequence has one too, without keys: its result is zeros."""
    return tl.where(seqs < num_seqs, tl.maximum(tl.cdiv(contexts, TILE), 1), 0)


@triton.jit
def _pieces_of(seq_start, seq_stop, stretch):
    """The first program that works on the tiles ``seq_start : seq_stop``, and how many do."""
    first_program = seq_start // stretch
    return first_program, (seq_stop - 1) // stretch - first_program + 1


@triton.jit
def _attend_keys(
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
@triton.jit(do_not_specialize=["num_seqs", "table_stride"],
            do_not_specialize_on_alignment=["block_tables", "context_lens"])  # fmt: skip
def _decode_kernel(
    q, k_cache, v_cache, block_tables, context_lens, q_start, q_count, out, partial, lse, scale_log2,
    num_seqs, q_stride_s, q_stride_h, out_stride_s, out_stride_h, table_stride,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, SEQS_PAD: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (n, w) of (N, W) takes stretch w of KV head n. It leaves at most two pieces for others to combine."""
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    seqs = tl.arange(0, SEQS_PAD)
    contexts = tl.load(context_lens + seqs, mask=seqs < num_seqs, other=0)
    tiles = _tiles_of(contexts, seqs, num_seqs, TILE)
    stops = tl.cumsum(tiles, axis=0)
    num_tiles = tl.sum(tiles, axis=0)
    stretch = tl.cdiv(num_tiles, tl.num_programs(1))
    start = program * stretch
    stop = tl.minimum(start + stretch, num_tiles)
    first_seq = tl.sum((stops <= start).to(tl.int32), axis=0)
    last_seq = tl.sum((stops < stop).to(tl.int32), axis=0)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, H_PAD)
    num_rows = tl.load(q_count + kv_head)
    first_head = tl.load(q_start + kv_head)
    keep_rows = (rows < num_rows)[:, None] & (dims < H)[None, :]
    # The lengths are a step's inputs, written before its first kernel: only queries and cache are waited for.
    wait_for_inputs(OVERLAP)
    for seq in range(first_seq, last_seq + 1):
        context = tl.load(context_lens + seq)
        row = tl.cast(seq, tl.int64)
        seq_stop = tl.sum(tl.where(seqs == seq, stops, 0), axis=0)
        seq_start = seq_stop - tl.maximum(tl.cdiv(context, TILE), 1)
        begin = (tl.maximum(start, seq_start) - seq_start) * TILE
        end = tl.minimum((tl.minimum(stop, seq_stop) - seq_start) * TILE, context)
        q_seq = q + row * q_stride_s + first_head * q_stride_h
        acc, total, top = _attend_keys(
            tl.load(q_seq + rows[:, None] * q_stride_h + dims[None, :], mask=keep_rows, other=0.0),
            k_cache + kv_head.to(tl.int64) * STRIDE_N, v_cache + kv_head.to(tl.int64) * STRIDE_N,
            block_tables + row * table_stride, begin, end, scale_log2,
            STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, ROWS, TILE, "ieee",
        )  # fmt: skip
        total = tl.where(total > 0, total, 1.0)
        acc = acc / total[:, None]
        out_seq = out + row * out_stride_s + first_head * out_stride_h
        _, num_pieces = _pieces_of(seq_start, seq_stop, stretch)
        if num_pieces == 1:
            out_at = out_seq + rows[:, None] * out_stride_h + dims[None, :]
            tl.store(out_at, acc.to(out.dtype.element_ty), mask=keep_rows)
        else:
            # A program's first sequence and its last one may be shared with others: a row for each.
            at = (2 * (kv_head * tl.num_programs(1) + program) + (seq > first_seq).to(tl.int32)) * GROUP + rows
            tl.store(lse + at, top + tl.log2(total), mask=rows < num_rows)
            tl.store(partial + at[:, None] * H + dims[None, :], acc, mask=keep_rows)


@triton.jit(do_not_specialize=["num_seqs", "num_programs"], do_not_specialize_on_alignment=["context_lens"])
def _combine_kernel(
    context_lens, q_start, q_count, partial, lse, out, num_seqs, num_programs, out_stride_s, out_stride_h,
    H: tl.constexpr, H_PAD: tl.constexpr, GROUP: tl.constexpr, SEQS_PAD: tl.constexpr, TILE: tl.constexpr,
    COMBINED: tl.constexpr, PER_SEQ: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (i, n, g): query head g of KV head n, the weighted mean of a sequence's pieces, COMBINED of them at a time.

    With PER_SEQ that is sequence i; else the one that begins in stretch i and does not end there, if there is one.
    """
    index = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    seqs = tl.arange(0, SEQS_PAD)
    tiles = _tiles_of(tl.load(context_lens + seqs, mask=seqs < num_seqs, other=0), seqs, num_seqs, TILE)
    stretch = tl.cdiv(tl.sum(tiles, axis=0), num_programs)
    seq = index
    if not PER_SEQ:
        seq = tl.sum((tl.cumsum(tiles, axis=0) < (index + 1) * stretch).to(tl.int32), axis=0)
    seq_start = tl.sum(tl.where(seqs < seq, tiles, 0), axis=0)
    seq_stop = seq_start + tl.sum(tl.where(seqs == seq, tiles, 0), axis=0)
    first_program, num_pieces = _pieces_of(seq_start, seq_stop, stretch)
    if not PER_SEQ:
        num_pieces = tl.where(first_program == index, num_pieces, 0)
    # In its first program's stretch the sequence may come after another one.
    comes_after = (seq_start > first_program * stretch).to(tl.int32)
    first_row = 2 * (kv_head * num_programs + first_program)
    num_rows = tl.load(q_count + kv_head)
    head = tl.load(q_start + kv_head) + row
    wait_for_inputs(OVERLAP)
    if (num_pieces > 1) & (row < num_rows):
        dims = tl.arange(0, H_PAD)
        top = float("-inf")
        total = 0.0
        acc = tl.zeros([H_PAD], tl.float32)
        for start in range(0, num_pieces, COMBINED):
            pieces = start + tl.arange(0, COMBINED)
            keep = pieces < num_pieces
            at = (first_row + 2 * pieces + tl.where(pieces == 0, comes_after, 0)) * GROUP + row
            logs = tl.load(lse + at, mask=keep, other=float("-inf"))
            values = tl.load(partial + at[:, None] * H + dims[None, :], mask=keep[:, None] & (dims < H)[None, :], other=0.0)
            new_top = tl.maximum(top, tl.max(logs, axis=0))
            weights = tl.exp2(logs - new_top)
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(weights, axis=0)
            acc = acc * decay + tl.sum(weights[:, None] * values, axis=0)
            top = new_top
        out_at = out + seq.to(tl.int64) * out_stride_s + head * out_stride_h + dims
        tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=dims < H)


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
    tile: int | None = None,
    programs_per_sm: int = _PROGRAMS_PER_SM,
    num_programs: int | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    overlap: bool | None = None,
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
    max_context      a bound on ``context_lens``, default ``max_blocks * B``; no more programs than its tiles
    max_group        a bound on ``q_count``; the default holds for any but may pad more rows than needed
    tile             keys per inner step
    programs_per_sm  how many programs a multiprocessor runs at once: they get an equal part of its registers
    num_programs     of each KV head, instead of as many as run at once
    num_warps, num_stages, overlap   Triton's launch parameters, and whether to start before the kernel ahead is done
                     (default: where the device can); lengths and tables are older than any kernel ahead

    Scores, softmax and sums are float32; the probabilities are rounded to the cache's dtype before they meet
    the values (not in float32), and the result ``[S, Q, H]`` once more.
    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32 and for caches laid out differently.
    """
    check_kernel_inputs(q=q_SQH)
    check_caches(k_cache_PNBH, v_cache_PNBH)
    block_tables, context_lens_S = rows_adjacent(block_tables), context_lens_S.contiguous()
    num_seqs, num_q_heads, head_dim = q_SQH.shape
    num_kv_heads, block_size = k_cache_PNBH.shape[1], k_cache_PNBH.shape[2]
    if out_SQH is None:
        out_SQH = torch.empty((num_seqs, num_q_heads, head_dim), dtype=q_SQH.dtype, device=q_SQH.device)
    if num_seqs == 0:
        return out_SQH
    if max_context is None:
        max_context = block_tables.shape[1] * block_size
    head_dim_padded = max(16, next_power_of_2(head_dim))
    if tile is None:
        tile = _default_tile(head_dim_padded, q_SQH.element_size())
    most_tiles = num_seqs * max(1, cdiv(max_context, tile))
    combined = min(_COMBINED_PIECES, _COMBINED_ELEMENTS // head_dim_padded)
    # Rounded down: a program too many would begin when the others end. And few sequences are not cut smaller than they are
    # put together at once.
    num_programs = min(num_programs or max(1, min(programs_per_sm * _NUM_SMS // num_kv_heads, num_seqs * combined)), most_tiles)
    # Every other KV head serves at least one query head.
    group = num_q_heads - num_kv_heads + 1 if max_group is None else max_group
    seqs_padded = 32 if num_seqs <= 32 else max(256, next_power_of_2(num_seqs))
    partial_NWGH = torch.empty((num_kv_heads, num_programs, 2, group, head_dim), dtype=torch.float32, device=q_SQH.device)
    lse_NWG = torch.empty((num_kv_heads, num_programs, 2, group), dtype=torch.float32, device=q_SQH.device)
    q_start_N, q_count_N = q_start_N.contiguous(), q_count_N.contiguous()
    overlap = may_overlap(q_SQH, overlap)
    stride_p, stride_n, stride_b, _ = k_cache_PNBH.stride()
    _decode_kernel[(num_kv_heads, num_programs)](
        q_SQH, k_cache_PNBH, v_cache_PNBH, block_tables, context_lens_S,
        q_start_N, q_count_N, out_SQH, partial_NWGH, lse_NWG, scale * math.log2(math.e),
        num_seqs, q_SQH.stride(0), q_SQH.stride(1), out_SQH.stride(0), out_SQH.stride(1), block_tables.stride(0),
        stride_p, stride_n, stride_b, block_size, head_dim, head_dim_padded,
        max(16, next_power_of_2(max(1, group))), group, seqs_padded, tile, overlap,
        num_warps=num_warps, num_stages=num_stages,
        maxnreg=min(255, _REGISTERS_PER_SM // (32 * num_warps * programs_per_sm) // 8 * 8), **early_launch(overlap),
    )  # fmt: skip
    if num_programs > 1:
        _combine_kernel[(min(num_seqs, num_programs), num_kv_heads, group)](
            context_lens_S, q_start_N, q_count_N, partial_NWGH, lse_NWG, out_SQH,
            num_seqs, num_programs, out_SQH.stride(0), out_SQH.stride(1),
            head_dim, head_dim_padded, group, seqs_padded, tile, combined, num_seqs <= num_programs, overlap,
            num_warps=1, **early_launch(overlap),
        )  # fmt: skip
    return out_SQH


def _default_tile(head_dim_padded: int, element_size: int) -> int:
    """Measured best on an H200: 64 keys, within 16 KiB of them."""
    if element_size == 4:  # exact float32 products run on the ordinary cores: registers are the limit
        return max(16, min(64, 2048 // head_dim_padded))
    return min(64, 16384 // head_dim_padded)


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
    tile: int | None = None,
    programs_per_sm: int = _PROGRAMS_PER_SM,
    num_programs: int | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    overlap: bool | None = None,
) -> torch.Tensor:
    """Plain-torch twin of :func:`paged_decode`; how the kernel is launched means nothing here."""
    del max_context, max_group, tile, programs_per_sm, num_programs, num_warps, num_stages, overlap
    kv_of_q = [0] * q_SQH.shape[1]
    for kv_head, (start, count) in enumerate(zip(q_start_N.tolist(), q_count_N.tolist(), strict=True)):
        kv_of_q[start : start + count] = [kv_head] * count
    cu_seqlens = range(q_SQH.shape[0] + 1)
    out = paged_attention_torch(q_SQH, k_cache_PNBH, v_cache_PNBH, block_tables, cu_seqlens, context_lens_S, kv_of_q, scale)
    return out if out_SQH is None else out_SQH.copy_(out)

"""Prefill attention: ragged chunks of queries against their sequences' keys in the paged cache.

FlashAttention-2's order of work (Dao, 2023): a program holds a tile of one head's queries and walks over the
keys, first those that all its queries see, unmasked, then the diagonal.
"""

import math

import torch

from engine.kernels.attention_torch import paged_attention_torch
from engine.kernels.common import check_kernel_inputs, next_power_of_2, rows_adjacent, tl, triton
from engine.kernels.store_kv import check_caches

# Shape suffixes: T = tokens, Q = query heads on this rank, N = KV heads on this rank, H = head dim,
# P = cache blocks, B = slots in a block, S = sequences


@triton.jit
def _attend_tile(
    acc, total, top, q_rows, q_positions, start, context, k_head, v_head, table, scale_log2,
    STRIDE_P: tl.constexpr, STRIDE_B: tl.constexpr, BLOCK_SIZE: tl.constexpr, H: tl.constexpr,
    H_PAD: tl.constexpr, TILE: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step over TILE keys from ``start``; on the DIAGONAL some queries do not see some of them."""
    dims = tl.arange(0, H_PAD)
    tile = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        at = ((start % BLOCK_SIZE + tile) * STRIDE_B)[:, None] + dims[None, :]
        k_at = k_head + block * STRIDE_P + at
        v_at = v_head + block * STRIDE_P + at
    else:
        keep = start + tile < context
        blocks = tl.load(table + (start + tile) // BLOCK_SIZE, mask=keep, other=0).to(tl.int64)
        at = (blocks * STRIDE_P + (start + tile) % BLOCK_SIZE * STRIDE_B)[:, None] + dims[None, :]
        k_at = k_head + at
        v_at = v_head + at
    if DIAGONAL:
        # Free slots hold anything, NaN included: they must come in as zeros, not only be masked out later.
        keep_kv = (start + tile < context)[:, None] & (dims < H)[None, :]
        k = tl.load(k_at, mask=keep_kv, other=0.0)
        v = tl.load(v_at, mask=keep_kv, other=0.0)
    elif H == H_PAD:
        k = tl.load(k_at)
        v = tl.load(v_at)
    else:
        keep_kv = (dims < H)[None, :]
        k = tl.load(k_at, mask=keep_kv, other=0.0)
        v = tl.load(v_at, mask=keep_kv, other=0.0)
    scores = tl.dot(q_rows, tl.trans(k), input_precision=PRECISION)
    if DIAGONAL:
        seen = (start + tile)[None, :] <= q_positions[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def sequence_of_tile(cu_seqlens_q, q_tile, num_seqs, num_tokens, TILE_Q: tl.constexpr):
    """Of a tile of queries its sequence, its first query there, and the sequence's range of tokens.

    Sequence s owns the tiles from cu_seqlens_q[s] // TILE_Q + s on. That is room for all its tiles and needs no table from the
    host. "Sequence" num_seqs is the padding after the last one.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens_q + middle) // TILE_Q + middle <= q_tile:
            low = middle
        else:
            high = middle - 1
    q_begin = tl.load(cu_seqlens_q + low)
    q_end = tl.load(cu_seqlens_q + low + 1, mask=low < num_seqs, other=0)
    q_end = tl.where(low < num_seqs, q_end, num_tokens)
    return low, (q_tile - q_begin // TILE_Q - low) * TILE_Q, q_begin, q_end


# What changes from step to step must not compile a new kernel: each variant would stall a step for a second.
@triton.jit(do_not_specialize=["num_seqs", "num_tokens", "table_stride"],
            do_not_specialize_on_alignment=["block_tables", "cu_seqlens", "context_lens"])  # fmt: skip
def _prefill_kernel(
    q, k_cache, v_cache, block_tables, cu_seqlens_q, context_lens, kv_of_q, out,
    scale_log2, num_seqs, num_tokens,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h, table_stride,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr, H_PAD: tl.constexpr, TILE_Q: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (query head, tile of queries)."""
    head = tl.program_id(0)
    # Backwards: a sequence's last tile sees the most keys, and long work is best begun first.
    q_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq, first, q_begin, q_end = sequence_of_tile(cu_seqlens_q, q_tile, num_seqs, num_tokens, TILE_Q)
    if first >= q_end - q_begin:
        return

    rows = first + tl.arange(0, TILE_Q)
    dims = tl.arange(0, H_PAD)
    keep_q = (rows < q_end - q_begin)[:, None] & (dims < H)[None, :]
    tokens = (q_begin + rows).to(tl.int64)
    q_at = q + tokens[:, None] * q_stride_t + head * q_stride_h + dims[None, :]
    q_rows = tl.load(q_at, mask=keep_q, other=0.0)
    context = tl.load(context_lens + seq, mask=seq < num_seqs, other=0)
    offset = context - (q_end - q_begin)  # absolute position of the sequence's first query
    q_positions = offset + rows
    # Keys that all queries of the tile see, in whole tiles; keys that any of them sees. Padding sees none.
    common = tl.maximum(offset + first + 1, 0) // TILE * TILE
    common = tl.where(context > 0, common, 0)
    end = tl.minimum(offset + first + TILE_Q, context)

    table = block_tables + tl.cast(seq, tl.int64) * table_stride
    kv_head = tl.load(kv_of_q + head).to(tl.int64)
    k_head = k_cache + kv_head * STRIDE_N
    v_head = v_cache + kv_head * STRIDE_N
    top = tl.full([TILE_Q], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, H_PAD], tl.float32)
    for start in range(0, common, TILE):
        start = tl.multiple_of(start, TILE)
        acc, total, top = _attend_tile(
            acc, total, top, q_rows, q_positions, start, context, k_head, v_head, table, scale_log2,
            STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, TILE, False, PRECISION,
        )  # fmt: skip
    for start in range(common, end, TILE):
        start = tl.multiple_of(start, TILE)
        acc, total, top = _attend_tile(
            acc, total, top, q_rows, q_positions, start, context, k_head, v_head, table, scale_log2,
            STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, TILE, True, PRECISION,
        )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_at = out + tokens[:, None] * out_stride_t + head * out_stride_h + dims[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=keep_q)


def paged_prefill(
    q_TQH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    kv_of_q_Q: torch.Tensor,
    scale: float,
    *,
    out_TQH: torch.Tensor | None = None,
    tile_q: int | None = None,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor:
    """Causal attention of ragged queries to their cached keys: a cached prefix and the chunk itself.

    q_TQH            ``[T, Q, H]``, strided views allowed
    caches           ``[P, N, B, H]``, both laid out alike; this step's keys and values are already stored
    block_tables     ``[S, max_blocks]`` int32; entries past a sequence's length are never read
    cu_seqlens_q     ``[S + 1]`` int32, starts at 0; sequence ``s`` owns the query rows ``cu[s] : cu[s + 1]``
    context_lens_S   ``[S]`` int32: keys of each sequence, the chunk's included; 0 marks padding
    kv_of_q_Q        ``[Q]`` int32: local KV head of each local query head
    scale            factor on the scores, positive, usually ``H ** -0.5``
    out_TQH          where to write (last dimension contiguous); allocated if None
    tile_q, tile, num_warps, num_stages   queries and keys per inner step, and Triton's launch parameters

    Query ``i`` of a sequence with ``n`` queries sits at position ``context_len - n + i`` and sees the keys up
    to itself. Padding sequences and rows from ``cu_seqlens_q[S]`` on come out as zeros. Rows of one query
    (decode) are served too, at the price of a whole tile each. The grid depends on shapes alone.

    Precision as in ``paged_decode``. Raises ``ValueError`` for dtypes other than bfloat16, float16, float32,
    for caches laid out differently and for a scale that is not positive.
    """
    check_kernel_inputs(q=q_TQH)
    check_caches(k_cache_PNBH, v_cache_PNBH)
    block_tables = rows_adjacent(block_tables)
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive: the running maximum is taken before scaling")
    num_tokens, num_q_heads, head_dim = q_TQH.shape
    num_seqs, block_size = block_tables.shape[0], k_cache_PNBH.shape[2]
    if out_TQH is None:
        out_TQH = torch.empty((num_tokens, num_q_heads, head_dim), dtype=q_TQH.dtype, device=q_TQH.device)
    if num_tokens == 0:
        return out_TQH
    head_dim_padded = max(16, next_power_of_2(head_dim))
    launch = _default_launch(head_dim_padded, q_TQH.element_size())
    tile_q, tile = tile_q or launch[0], tile or launch[1]
    stride_p, stride_n, stride_b, _ = k_cache_PNBH.stride()
    # One more tile than T // tile_q for each sequence's ragged end, and one for the padding's.
    _prefill_kernel[(num_q_heads, num_tokens // tile_q + num_seqs + 1)](
        q_TQH, k_cache_PNBH, v_cache_PNBH, block_tables,
        cu_seqlens_q.contiguous(), context_lens_S.contiguous(), kv_of_q_Q.contiguous(), out_TQH,
        scale * math.log2(math.e), num_seqs, num_tokens,
        q_TQH.stride(0), q_TQH.stride(1), out_TQH.stride(0), out_TQH.stride(1), block_tables.stride(0),
        stride_p, stride_n, stride_b, block_size, head_dim, head_dim_padded, tile_q, tile, "ieee",
        num_warps=num_warps or launch[2], num_stages=num_stages or launch[3],
    )  # fmt: skip
    return out_TQH


def _default_launch(head_dim_padded: int, element_size: int) -> tuple[int, int, int, int]:
    """``(tile_q, tile, num_warps, num_stages)`` that fit an SM's shared memory (227 KiB on Hopper)."""
    if element_size == 4:  # exact float32 products run on the ordinary cores: registers are the limit
        return 32, 32, 4, 1
    if head_dim_padded <= 64:
        return 128, 64, 4, 3
    if head_dim_padded <= 128:
        return 64, 64, 4, 3  # the bits of 128 queries by 8 warps, in 84 to 93 % of the time
    return 128, 64, 8, 2


def paged_prefill_torch(
    q_TQH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    kv_of_q_Q: torch.Tensor,
    scale: float,
    *,
    out_TQH: torch.Tensor | None = None,
    tile_q: int | None = None,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> torch.Tensor:
    """Plain-torch twin of :func:`paged_prefill`; how the kernel is launched means nothing here."""
    del tile_q, tile, num_warps, num_stages
    out = paged_attention_torch(q_TQH, k_cache_PNBH, v_cache_PNBH, block_tables, cu_seqlens_q, context_lens_S, kv_of_q_Q, scale)
    return out if out_TQH is None else out_TQH.copy_(out)

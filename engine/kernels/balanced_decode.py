"""Decode attention in one launch, its work cut into pieces of like size: the way to go for sequences of unlike lengths.

All keys of the step are cut into items of so many tokens, and the programs of a KV head take them in turn: sequence after
sequence, whatever the lengths. How long an item is follows from the lengths on the device, so that a captured graph adapts
to them from step to step. An item is attended as in :mod:`engine.kernels.paged_decode`; of a sequence's items, the program
that finishes last combines the results, in the order of the keys. Which program that is changes from run to run; the bits
do not.

FlashInfer (Ye et al., 2025) balances decode attention like this, with a plan that the host makes.
"""

import math

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, next_power_of_2, rows_adjacent, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs
from engine.kernels.paged_decode import attend_keys, default_tile
from engine.kernels.store_kv import check_caches

# Shape suffixes: S = sequences, Q = query heads on this rank, N = KV heads on this rank, H = head dim,
# P = cache blocks, B = slots in a block, I = items of a KV head, G = query heads of a KV head

_NUM_SMS = 132  # of an H200; a guess elsewhere costs speed, not correctness
_PROGRAMS_PER_SM = 8
_ITEMS_PER_PROGRAM = 2
_MAX_REGISTERS = 128  # four programs a multiprocessor
_COMBINED_ELEMENTS = 4096  # of the partial results that a program holds at once


# What changes from step to step must not compile a new kernel: each variant would stall a step for a second.
@triton.jit(do_not_specialize=["num_seqs", "split_len", "wanted_items", "max_items", "table_stride"],
            do_not_specialize_on_alignment=["block_tables", "context_lens"])  # fmt: skip
def _balanced_kernel(
    q, k_cache, v_cache, block_tables, context_lens, q_start, q_count, out, partial, lse, tickets, scale_log2,
    num_seqs, split_len, wanted_items, max_items,
    q_stride_s, q_stride_h, out_stride_s, out_stride_h, table_stride,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, SEQS_PAD: tl.constexpr,
    TILE: tl.constexpr, COMBINED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (n, w) of (N, W) takes the items w, w + W, ... of KV head n."""
    wait_for_inputs(OVERLAP)
    kv_head = tl.program_id(0)
    seqs = tl.arange(0, SEQS_PAD)
    contexts = tl.load(context_lens + seqs, mask=seqs < num_seqs, other=0)
    even = tl.cdiv(tl.cdiv(tl.sum(contexts, axis=0), wanted_items), TILE) * TILE
    tokens = tl.where(split_len > 0, split_len, tl.maximum(even, TILE))
    # A padding sequence has one item too, without keys: its result is zeros.
    counts = tl.where(seqs < num_seqs, tl.maximum(tl.cdiv(contexts, tokens), 1), 0)
    ends = tl.cumsum(counts, axis=0)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, H_PAD)
    num_rows = tl.load(q_count + kv_head)
    first_head = tl.load(q_start + kv_head)
    keep_rows = (rows < num_rows)[:, None] & (dims < H)[None, :]
    for item in range(tl.program_id(1), tl.sum(counts, axis=0), tl.num_programs(1)):
        seq = tl.sum((ends <= item).to(tl.int32), axis=0)
        count = tl.sum(tl.where(seqs == seq, counts, 0), axis=0)
        first_item = tl.sum(tl.where(seqs == seq, ends, 0), axis=0) - count
        begin = (item - first_item) * tokens
        end = tl.minimum(begin + tokens, tl.sum(tl.where(seqs == seq, contexts, 0), axis=0))
        q_seq = q + seq.to(tl.int64) * q_stride_s + first_head * q_stride_h
        acc, total, top = attend_keys(
            tl.load(q_seq + rows[:, None] * q_stride_h + dims[None, :], mask=keep_rows, other=0.0),
            k_cache + kv_head.to(tl.int64) * STRIDE_N, v_cache + kv_head.to(tl.int64) * STRIDE_N,
            block_tables + seq.to(tl.int64) * table_stride, begin, end, scale_log2,
            STRIDE_P, STRIDE_B, BLOCK_SIZE, H, H_PAD, ROWS, TILE, "ieee",
        )  # fmt: skip
        total = tl.where(total > 0, total, 1.0)
        acc = acc / total[:, None]
        out_seq = out + seq.to(tl.int64) * out_stride_s + first_head * out_stride_h
        if count == 1:
            out_at = out_seq + rows[:, None] * out_stride_h + dims[None, :]
            tl.store(out_at, acc.to(out.dtype.element_ty), mask=keep_rows)
        else:
            first_row = (kv_head * max_items + first_item).to(tl.int64) * GROUP
            at = first_row + (item - first_item) * GROUP + rows
            tl.store(lse + at, top + tl.log2(total), mask=rows < num_rows)
            tl.store(partial + at[:, None] * H + dims[None, :], acc, mask=keep_rows)
            # All threads have stored before one of them says so to the programs of the other items.
            tl.debug_barrier()
            ticket_at = tickets + seq * tl.num_programs(0) + kv_head
            if tl.atomic_add(ticket_at, 1, sem="acq_rel") == count - 1:
                tl.store(ticket_at, 0)  # for the next launch
                _combine(
                    partial + first_row * H, lse + first_row, out_seq, out_stride_h, num_rows, count,
                    H, H_PAD, GROUP, GROUP_PAD, COMBINED,
                )  # fmt: skip


@triton.jit
def _combine(
    partial, lse, out, out_stride_h, num_rows, count,
    H: tl.constexpr, H_PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, COMBINED: tl.constexpr,
):  # fmt: skip
    """The weighted mean of one sequence's ``count`` partial results ``[count, GROUP, H]``, COMBINED of them at a time."""
    group = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, H_PAD)
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, H_PAD], tl.float32)
    for start in range(0, count, COMBINED):
        items = start + tl.arange(0, COMBINED)
        at = items[:, None] * GROUP + group[None, :]
        keep = (items < count)[:, None] & (group < num_rows)[None, :]
        # What other programs wrote is in the L2 cache; an L1 cache could hold something older.
        logs = tl.load(lse + at, mask=keep, other=float("-inf"), cache_modifier=".cg")
        logs = tl.where((group < num_rows)[None, :], logs, 0.0)
        values = tl.load(
            partial + at[:, :, None] * H + dims[None, None, :],
            mask=keep[:, :, None] & (dims < H)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logs, axis=0))
        weights = tl.exp2(logs - new_top[None, :])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * values, axis=0)
        top = new_top
    acc = acc / total[:, None]
    keep_out = (group < num_rows)[:, None] & (dims < H)[None, :]
    tl.store(out + group[:, None] * out_stride_h + dims[None, :], acc.to(out.dtype.element_ty), mask=keep_out)


def balanced_decode(
    q_SQH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens_S: torch.Tensor,
    q_start_N: torch.Tensor,
    q_count_N: torch.Tensor,
    scale: float,
    tickets: torch.Tensor,
    *,
    out_SQH: torch.Tensor | None = None,
    max_context: int | None = None,
    max_group: int | None = None,
    split_len: int | None = None,
    tile: int | None = None,
    num_programs: int | None = None,
    items_per_program: int = _ITEMS_PER_PROGRAM,
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int = _MAX_REGISTERS,
    overlap: bool | None = None,
) -> torch.Tensor:
    """Attention of one query token per sequence to that sequence's ``context_len`` cached keys, ``[S, Q, H]``.

    The arguments that both have mean what they mean to :func:`engine.kernels.paged_decode.paged_decode`, whose twin,
    ``paged_decode_torch``, is this function's twin too. The others:

    tickets          at least ``S * N`` int32, zeros, contiguous; zeros again when the launch is done. They count the finished
                     items of each sequence and KV head: two launches that may run at once must not share them
    split_len        items of so many tokens, a multiple of the tile: the result's bits then do not depend on the batch,
                     nor on ``max_context``. By default the longer, the more tokens the step attends to
    num_programs     of each KV head, at most; by default so many that the multiprocessors have eight each
    items_per_program   how many items each program would have, were all sequences cut evenly; with split_len, no matter
    max_registers    of a thread, so that enough programs run at once; 0 sets no limit

    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32, for caches laid out differently, and for tickets
    or splits that do not fit.
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
    if tickets.dtype != torch.int32 or tickets.numel() < num_seqs * num_kv_heads or not tickets.is_contiguous():
        raise ValueError(
            f"tickets {tuple(tickets.shape)} {tickets.dtype} must be at least num_seqs * num_kv_heads="
            f"{num_seqs * num_kv_heads} contiguous int32: allocate zeros once, for the largest batch"
        )
    if max_context is None:
        max_context = block_tables.shape[1] * block_size
    head_dim_padded = max(16, next_power_of_2(head_dim))
    if tile is None:
        tile = default_tile(False, head_dim_padded, q_SQH.element_size())
    if split_len is not None and (split_len <= 0 or split_len % tile):
        raise ValueError(f"split_len={split_len} must be a positive multiple of tile={tile}: change either")
    num_programs = num_programs or cdiv(_PROGRAMS_PER_SM * _NUM_SMS, num_kv_heads)
    wanted_items = num_programs * items_per_program
    # Cut evenly there are wanted_items, and of each sequence one more at most; no item is shorter than a tile.
    most_items = num_seqs * max(1, cdiv(max_context, split_len or tile))
    max_items = most_items if split_len is not None else min(most_items, num_seqs + wanted_items)
    # Every other KV head serves at least one query head.
    group = num_q_heads - num_kv_heads + 1 if max_group is None else max_group
    group_padded = next_power_of_2(max(1, group))
    partial_NIGH = torch.empty((num_kv_heads, max_items, group, head_dim), dtype=torch.float32, device=q_SQH.device)
    lse_NIG = torch.empty((num_kv_heads, max_items, group), dtype=torch.float32, device=q_SQH.device)
    overlap = may_overlap(q_SQH, overlap)
    stride_p, stride_n, stride_b, _ = k_cache_PNBH.stride()
    _balanced_kernel[(num_kv_heads, min(num_programs, max_items))](
        q_SQH, k_cache_PNBH, v_cache_PNBH, block_tables, context_lens_S,
        q_start_N.contiguous(), q_count_N.contiguous(), out_SQH, partial_NIGH, lse_NIG, tickets, scale * math.log2(math.e),
        num_seqs, split_len or 0, wanted_items, max_items,
        q_SQH.stride(0), q_SQH.stride(1), out_SQH.stride(0), out_SQH.stride(1), block_tables.stride(0),
        stride_p, stride_n, stride_b, block_size, head_dim, head_dim_padded,
        max(16, group_padded), group, group_padded, 32 if num_seqs <= 32 else max(256, next_power_of_2(num_seqs)),
        tile, max(1, min(16, _COMBINED_ELEMENTS // (group_padded * head_dim_padded))), overlap,
        num_warps=num_warps, num_stages=num_stages, maxnreg=max_registers or None, **early_launch(overlap),
    )  # fmt: skip
    return out_SQH

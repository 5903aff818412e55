"""What a decode step derives from its sequences' lengths and block tables: tokens, positions, slots, in one launch."""

import torch

from engine.kernels.common import cdiv, next_power_of_2, rows_adjacent, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

# Shape suffixes: S = sequences, B = blocks of the longest sequence, M = rows of the device's state

_MAX_SEQS = 128  # of one program


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def _decode_inputs_kernel(
    token, row, context, tables, last_token, token_out, position_out, slot_out, length_out, num_seqs, table_stride,
    BLOCK_SIZE: tl.constexpr, SEQS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    seqs = tl.program_id(0) * SEQS + tl.arange(0, SEQS)
    keep = seqs < num_seqs
    length = tl.load(context + seqs, mask=keep, other=0).to(tl.int64)
    position = tl.maximum(length - 1, 0)
    block = tl.load(tables + seqs * table_stride + position // BLOCK_SIZE, mask=keep & (length > 0), other=0).to(tl.int64)
    slot = tl.where(length > 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    known = tl.load(token + seqs, mask=keep, other=0)
    drawn = tl.load(last_token + tl.load(row + seqs, mask=keep, other=0), mask=keep, other=0)
    tl.store(token_out + seqs, tl.where(known < 0, tl.maximum(drawn, 0), known), mask=keep)
    tl.store(position_out + seqs, position, mask=keep)
    tl.store(slot_out + seqs, slot, mask=keep)
    tl.store(length_out + seqs, length, mask=keep)


def decode_inputs(
    token_S: torch.Tensor,
    row_S: torch.Tensor,
    context_S: torch.Tensor,
    tables_SB: torch.Tensor,
    last_token_M: torch.Tensor,
    block_size: int,
    *,
    overlap: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(token, position, slot, length)``, each ``[S]`` int64, of sequences that run one token each.

    token_S        ``[S]`` int64: the token to run; below 0 it is the last one drawn, ``last_token_M[row]``
    row_S          ``[S]`` int64, each within ``[0, M)``
    context_S      ``[S]`` int32: tokens up to and with this one; 0 marks padding, whose position is 0 and whose slot is -1
    tables_SB      ``[S, B]`` int32; entries past a sequence's length are never read
    last_token_M   ``[M]`` int64; one below 0, where none could be drawn, runs as token 0, for nobody
    overlap        whether to launch as :mod:`engine.kernels.overlap` describes; by default, where the device can
    """
    num_seqs = token_S.shape[0]
    tables_SB = rows_adjacent(tables_SB)
    token, position, slot, length = torch.empty((4, num_seqs), dtype=torch.int64, device=token_S.device)
    if num_seqs:
        overlap = may_overlap(token_S, overlap)
        seqs = min(_MAX_SEQS, next_power_of_2(num_seqs))
        _decode_inputs_kernel[(cdiv(num_seqs, seqs),)](
            token_S.contiguous(), row_S.contiguous(), context_S.contiguous(), tables_SB, last_token_M,
            token, position, slot, length, num_seqs, tables_SB.stride(0), block_size, seqs, overlap,
            num_warps=max(1, seqs // 32), **early_launch(overlap),
        )  # fmt: skip
    return token, position, slot, length


def decode_inputs_torch(
    token_S: torch.Tensor,
    row_S: torch.Tensor,
    context_S: torch.Tensor,
    tables_SB: torch.Tensor,
    last_token_M: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain-torch twin of :func:`decode_inputs`."""
    length_S = context_S.long()
    position_S = (length_S - 1).clamp(min=0)
    block_S = tables_SB.gather(1, (position_S // block_size)[:, None])[:, 0].long()
    slot_S = torch.where(length_S > 0, block_S * block_size + position_S % block_size, -1)
    return torch.where(token_S < 0, last_token_M[row_S].clamp(min=0), token_S), position_S, slot_S, length_S

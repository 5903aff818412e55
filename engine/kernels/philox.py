"""Counter-based random numbers (Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2,
3", SC11) and Gumbel-max sampling on them.

A draw is a pure function of (seed, position, column): it does not depend on the batch, on the rank or on how the
vocabulary is sharded, and no generator state exists that ranks could disagree on.
"""

from __future__ import annotations

import torch

from engine.kernels.common import cdiv, compute_dtype, tl, triton

# Shape suffixes: R = rows (requests), V = columns (this rank's part of the vocabulary), C = counters

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32: four words out for each counter of four words and key of two.

    All words are 32-bit values held in int64 tensors, whose shapes broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 x 32-bit product, in two parts of 48 bits that an int64 holds."""
    low_part, high_part = a * (b & 0xFFFF), a * (b >> 16)
    high_part = high_part + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox_uniform(
    seed_R: torch.Tensor, position_R: torch.Tensor, num: int, start: int = 0, stream: int = 0
) -> torch.Tensor:
    """Uniform float32 ``[R, num]`` in the open interval (0, 1), for the columns ``start : start + num``.

    Column ``v`` is word ``v % 4`` of Philox with counter ``(v // 4, position low, position high, stream)`` and the
    64-bit seed as key (low word first). ``seed_R`` and ``position_R`` are int64; negative ones count as their two's
    complement. The upper 23 bits ``n`` of a word give ``(2 n + 1) / 2^24``: exact in float32, never 0 and never 1.
    """
    first = start // 4
    c0_1C = torch.arange(first, cdiv(start + num, 4), device=seed_R.device, dtype=torch.int64)[None]
    seed_R1, position_R1 = seed_R.long()[:, None], position_R.long()[:, None]
    words = philox_4x32(
        (c0_1C, position_R1 & _MASK, (position_R1 >> 32) & _MASK, torch.full_like(position_R1, stream)),
        (seed_R1 & _MASK, (seed_R1 >> 32) & _MASK),
    )
    words_RV = torch.stack(words, dim=-1).flatten(1)[:, start - 4 * first :][:, :num]
    return ((words_RV >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


def gumbel_argmax_torch(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    seed_R: torch.Tensor,
    position_R: torch.Tensor,
    vocab_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch twin of :func:`gumbel_argmax`; float64 logits are perturbed and compared in float64."""
    dtype = compute_dtype(logits_RV)
    scores_RV = logits_RV.to(dtype)
    sampled = (temperature_R > 0).nonzero().squeeze(1)
    if len(sampled):
        uniform = philox_uniform(seed_R[sampled], position_R[sampled], logits_RV.shape[1], start=vocab_start)
        noise = -torch.log(-torch.log(uniform.to(dtype)))
        perturbed = scores_RV[sampled] / temperature_R[sampled, None].to(dtype) + noise
        scores_RV = scores_RV.index_copy(0, sampled, perturbed)
    # torch.max names any index of a tie; the lowest is asked for.
    value_R = scores_RV.amax(dim=1)
    columns = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    index_R = torch.where(scores_RV == value_R[:, None], columns, scores_RV.shape[1]).amin(dim=1)
    return value_R, index_R + vocab_start

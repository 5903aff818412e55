"""Counter-based random numbers and Gumbel-max sampling on them.

Philox4x32-10 is from Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11). A
draw is a pure function of (seed, position, column): it does not depend on the batch, on the rank or on how
the vocabulary is sharded, and there is no generator state that ranks could disagree on.
"""

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton

# Shape suffixes: R = rows (requests), V = columns (this rank's part of the vocabulary), C = counters

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_COUNTERS = 512  # counters of one program of the kernels, four columns each


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
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


def philox_uniform(seed_R: torch.Tensor, position_R: torch.Tensor, num: int, start: int = 0, stream: int = 0) -> torch.Tensor:
    """Uniform float32 ``[R, num]`` in the open interval (0, 1), for the columns ``start : start + num``.

    Column ``v`` is word ``v % 4`` of Philox with counter ``(v // 4, position low, position high, stream)``
    and the 64-bit seed as key (low word first). ``seed_R`` and ``position_R`` are int64; negative ones count
    as their two's complement. The upper 23 bits ``n`` of a word give ``(2 n + 1) / 2^24``: exact in float32.

    Plain torch, on any device; :func:`philox_uniform_triton` gives the same bits.
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


@triton.jit
def _uniform_tile(seed, position, counters, STREAM: tl.constexpr, COUNTERS: tl.constexpr):
    """Uniform numbers ``[COUNTERS, 4]``: those of the columns ``4 * counter + (0, 1, 2, 3)``."""
    zeros = tl.zeros([COUNTERS], tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed,
        counters.to(tl.uint32),
        zeros + (position & 0xFFFFFFFF).to(tl.uint32),
        zeros + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zeros + STREAM,
    )
    lane = tl.arange(0, 4)[None, :]
    words = tl.where(lane == 0, word0[:, None], word1[:, None])
    words = tl.where(lane == 2, word2[:, None], words)
    words = tl.where(lane == 3, word3[:, None], words)
    return ((words >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _uniform_kernel(seed, position, out, start, num, STREAM: tl.constexpr, COUNTERS: tl.constexpr):
    """One program per row and COUNTERS counters."""
    row = tl.program_id(0).to(tl.int64)
    counters = start // 4 + tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS)
    uniform = _uniform_tile(tl.load(seed + row), tl.load(position + row), counters, STREAM, COUNTERS)
    at = counters[:, None] * 4 + tl.arange(0, 4)[None, :] - start
    tl.store(out + row * num + at, uniform, mask=(at >= 0) & (at < num))


def philox_uniform_triton(
    seed_R: torch.Tensor, position_R: torch.Tensor, num: int, start: int = 0, stream: int = 0
) -> torch.Tensor:
    """:func:`philox_uniform` as the sampling kernel computes it: same arguments, same bits."""
    num_rows = seed_R.shape[0]
    out_RV = torch.empty((num_rows, num), dtype=torch.float32, device=seed_R.device)
    if out_RV.numel():
        grid = (num_rows, cdiv(start % 4 + num, 4 * _COUNTERS))
        _uniform_kernel[grid](seed_R.contiguous(), position_R.contiguous(), out_RV, start, num, stream, _COUNTERS)
    return out_RV


@triton.jit
def _gumbel_chunk_kernel(
    logits, temperature, seed, position, values, indices, row_stride, num_columns, vocab_start,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    """One program per row and chunk of 4 * COUNTERS columns, aligned to the full vocabulary's counters."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    counters = vocab_start // 4 + chunk * COUNTERS + tl.arange(0, COUNTERS)
    columns = counters[:, None] * 4 + tl.arange(0, 4)[None, :] - vocab_start
    keep = (columns >= 0) & (columns < num_columns)
    scores = tl.load(logits + row * row_stride + columns, mask=keep, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    if heat > 0:
        uniform = _uniform_tile(tl.load(seed + row), tl.load(position + row), counters, 0, COUNTERS)
        scores = scores / heat - tl.log(-tl.log(uniform))
    scores = tl.where(scores == scores, scores, float("inf"))
    best = tl.max(tl.max(scores, axis=1), axis=0)
    # The lowest column that holds the maximum, never one outside the row.
    index = tl.min(tl.min(tl.where(keep & (scores == best), columns, num_columns), axis=1), axis=0)
    at = row * tl.num_programs(1) + chunk
    tl.store(values + at, best)
    tl.store(indices + at, index)


@triton.jit
def _gumbel_row_kernel(chunk_values, chunk_indices, values, indices, num_chunks, vocab_start, CHUNKS_PAD: tl.constexpr):
    """One program per row: the best of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS_PAD)
    keep = chunks < num_chunks
    best_values = tl.load(chunk_values + row * num_chunks + chunks, mask=keep, other=float("-inf"))
    columns = tl.load(chunk_indices + row * num_chunks + chunks, mask=keep, other=2147483647)
    best = tl.max(best_values, axis=0)
    index = tl.min(tl.where(best_values == best, columns, 2147483647), axis=0)
    tl.store(values + row, best)
    tl.store(indices + row, index.to(tl.int64) + vocab_start)


def gumbel_argmax(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    seed_R: torch.Tensor,
    position_R: torch.Tensor,
    vocab_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample of ``softmax(logits / temperature)`` per row, by the Gumbel-max trick; 0 is greedy.

    logits_RV       ``[R, V]``: this rank's part of the vocabulary, from ``vocab_start``; -inf masks padding
    temperature_R   ``[R]`` float32; 0 takes the largest logit itself
    seed_R, position_R   ``[R]`` int64: the request's seed and the sampled token's position

    Returns ``(value [R] float32, index [R] int64)``: the largest ``logit / temperature + noise`` (the largest
    logit in greedy rows) and its index in the whole vocabulary; of equal values, the lowest index. The noise
    of a column depends on seed, position and its index in the whole vocabulary alone, hence the best of all
    ranks' pairs is what one rank would have found. A NaN counts as +inf, so that it is seen and its index is
    a valid one.

    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32 and for rows without columns.
    """
    check_kernel_inputs(logits=logits_RV)
    num_rows, num_columns = logits_RV.shape
    if num_columns == 0:
        raise ValueError(f"logits {num_rows}x0: nothing to choose from; give every rank a vocabulary shard")
    device = logits_RV.device
    values = torch.empty(num_rows, dtype=torch.float32, device=device)
    indices = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return values, indices
    num_chunks = cdiv(vocab_start % 4 + num_columns, 4 * _COUNTERS)
    chunk_values = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    chunk_indices = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    _gumbel_chunk_kernel[(num_rows, num_chunks)](
        logits_RV, temperature_R.contiguous(), seed_R.contiguous(), position_R.contiguous(),
        chunk_values, chunk_indices,
        logits_RV.stride(0), num_columns, vocab_start, _COUNTERS,
    )  # fmt: skip
    _gumbel_row_kernel[(num_rows,)](
        chunk_values, chunk_indices, values, indices, num_chunks, vocab_start, next_power_of_2(num_chunks)
    )
    return values, indices


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
    scores_RV = scores_RV.masked_fill(scores_RV.isnan(), float("inf"))
    # torch.max may name any index of a tie; the lowest is asked for.
    value_R = scores_RV.amax(dim=1)
    columns = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    index_R = torch.where(scores_RV == value_R[:, None], columns, scores_RV.shape[1]).amin(dim=1)
    return value_R, index_R + vocab_start

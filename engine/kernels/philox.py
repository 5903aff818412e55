"""Counter-based random numbers and Gumbel-max sampling on them.

Philox4x32-10 is from Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11). A
draw is a pure function of (seed, position, column): it does not depend on the batch, on the rank or on how
the vocabulary is sharded, and there is no generator state that ranks could disagree on.
"""

import os
from collections.abc import Callable

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

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
def _wide_product(a, b: tl.constexpr):
    """High and low word of a 32 x 32-bit product, by the one instruction that gives both."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _words(seed, position, counters, STREAM: tl.constexpr, COUNTERS: tl.constexpr):
    """Random words ``[4 * COUNTERS]``: those of the columns from ``4 * counters[0]`` on."""
    zeros = tl.zeros([COUNTERS], tl.uint32)
    c0 = counters.to(tl.uint32)
    c1 = zeros + (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = zeros + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = zeros + STREAM
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _wide_product(c0, 0xD2511F53)
        high1, low1 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def _uniform(words):
    """Each word's upper 23 bits ``n`` as ``(2 n + 1) / 2^24``, exactly: ``n`` is the fraction of a number from 1 to 2."""
    one_to_two = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return (one_to_two - 1.0) + 1.0 / 16777216.0


@triton.jit
def _log2(x, HARDWARE: tl.constexpr):
    """With HARDWARE the instruction itself: its error is 2^-22, absolute from 0.5 to 2 and relative elsewhere (PTX ISA)."""
    if HARDWARE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _gumbel(uniform, HARDWARE_LOG: tl.constexpr):
    """``-log(-log(uniform))``, off by less than 1e-5.

    What wins is close to 1, where the absolute error of a logarithm would be all of it: a series takes over there.
    """
    ln2: tl.constexpr = 0.6931471805599453
    rest = 1.0 - uniform  # exact
    series = rest * (1.0 + rest * (1 / 2 + rest * (1 / 3 + rest * (1 / 4 + rest * (1 / 5)))))
    exponential = tl.where(rest < 1 / 16, series, _log2(uniform, HARDWARE_LOG) * -ln2)
    return _log2(exponential, HARDWARE_LOG) * -ln2


@triton.jit
def _uniform_kernel(seed, position, out, start, num, STREAM: tl.constexpr, COUNTERS: tl.constexpr):
    """One program per row and COUNTERS counters."""
    row = tl.program_id(0).to(tl.int64)
    counters = start // 4 + tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS)
    words = _words(tl.load(seed + row), tl.load(position + row), counters, STREAM, COUNTERS)
    at = (start // 4 + tl.program_id(1) * COUNTERS) * 4 - start + tl.arange(0, 4 * COUNTERS)
    tl.store(out + row * num + at, _uniform(words), mask=(at >= 0) & (at < num))


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
def _best_of_chunk(
    logits_row, columns, counters, num_columns, heat, seed, position,
    COUNTERS: tl.constexpr, EDGE: tl.constexpr, HARDWARE_LOG: tl.constexpr,
):  # fmt: skip
    """The largest score of these columns and the lowest column that has it; with EDGE, some are outside the row."""
    if EDGE:
        keep = (columns >= 0) & (columns < num_columns)
        scores = tl.load(logits_row + columns, mask=keep, other=float("-inf")).to(tl.float32)
    else:
        scores = tl.load(logits_row + columns).to(tl.float32)
    if heat > 0:
        noise = _gumbel(_uniform(_words(seed, position, counters, 0, COUNTERS)), HARDWARE_LOG)
        scores = scores * (1.0 / heat) + noise
    scores = tl.minimum(scores, float("inf"))  # the smaller of a NaN and a number is the number
    best = tl.max(scores, axis=0)
    is_best = scores == best
    if EDGE:
        is_best = is_best & keep
    return best, tl.min(tl.where(is_best, columns, 2147483647), axis=0)


@triton.jit
def _gumbel_chunk_kernel(
    logits, temperature, seed, position, values, indices, row_stride, num_columns, vocab_start,
    COUNTERS: tl.constexpr, HARDWARE_LOG: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row and chunk of 4 * COUNTERS columns, aligned to the full vocabulary's counters."""
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    first = vocab_start // 4 + chunk * COUNTERS
    counters = first + tl.arange(0, COUNTERS)
    begin = first * 4 - vocab_start
    columns = begin + tl.arange(0, 4 * COUNTERS)
    logits_row = logits + row * row_stride
    heat, row_seed, row_position = tl.load(temperature + row), tl.load(seed + row), tl.load(position + row)
    if (begin >= 0) & (begin + 4 * COUNTERS <= num_columns):
        best, index = _best_of_chunk(
            logits_row, columns, counters, num_columns, heat, row_seed, row_position, COUNTERS, False, HARDWARE_LOG
        )
    else:
        best, index = _best_of_chunk(
            logits_row, columns, counters, num_columns, heat, row_seed, row_position, COUNTERS, True, HARDWARE_LOG
        )
    at = row * tl.num_programs(1) + chunk
    tl.store(values + at, best)
    tl.store(indices + at, index)


@triton.jit
def _gumbel_row_kernel(
    chunk_values, chunk_indices, values, indices, num_chunks, vocab_start, CHUNKS_PAD: tl.constexpr, OVERLAP: tl.constexpr
):
    """One program per row: the best of its chunks, and -1 for its index where it is not finite."""
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS_PAD)
    keep = chunks < num_chunks
    best_values = tl.load(chunk_values + row * num_chunks + chunks, mask=keep, other=float("-inf"))
    columns = tl.load(chunk_indices + row * num_chunks + chunks, mask=keep, other=2147483647)
    best = tl.max(best_values, axis=0)
    index = tl.min(tl.where(best_values == best, columns, 2147483647), axis=0)
    tl.store(values + row, best)
    is_finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(indices + row, tl.where(is_finite, index.to(tl.int64) + vocab_start, -1))


def gumbel_argmax(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    seed_R: torch.Tensor,
    position_R: torch.Tensor,
    vocab_start: int = 0,
    *,
    counters: int = _COUNTERS,
    num_warps: int = 4,
    overlap: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample of ``softmax(logits / temperature)`` per row, by the Gumbel-max trick; 0 is greedy.

    logits_RV       ``[R, V]``: this rank's part of the vocabulary, from ``vocab_start``; -inf masks padding
    temperature_R   ``[R]`` float32; 0 takes the largest logit itself
    seed_R, position_R   ``[R]`` int64: the request's seed and the sampled token's position
    counters, num_warps, overlap   a quarter of a program's columns, and Triton's launch parameters (as in
                    :mod:`engine.kernels.overlap`, by default where the device can)

    Returns ``(value [R] float32, index [R] int64)``: the largest ``logit / temperature + noise`` (the largest
    logit in greedy rows) and its index in the whole vocabulary; of equal values, the lowest index. The noise
    of a column depends on seed, position and its index in the whole vocabulary alone, hence the best of all
    ranks' pairs is what one rank would have found. A NaN counts as +inf, and where the largest value is infinite
    there is nothing to draw: the index is -1. The uniform numbers are the twin's bit for bit; the noise made of them
    is within 1e-5 of exact, so that only scores as close as that may be ranked otherwise than the twin does.

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
    overlap = may_overlap(logits_RV, overlap)
    # Interpreted, and on other makers' devices, there is no such instruction.
    hardware_log = os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None
    num_chunks = cdiv(vocab_start % 4 + num_columns, 4 * counters)
    chunk_values = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    chunk_indices = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    _gumbel_chunk_kernel[(num_rows, num_chunks)](
        logits_RV, temperature_R.contiguous(), seed_R.contiguous(), position_R.contiguous(),
        chunk_values, chunk_indices,
        logits_RV.stride(0), num_columns, vocab_start, counters, hardware_log, overlap,
        num_warps=num_warps, **early_launch(overlap),
    )  # fmt: skip
    _gumbel_row_kernel[(num_rows,)](
        chunk_values, chunk_indices, values, indices, num_chunks, vocab_start, next_power_of_2(num_chunks), overlap,
        **early_launch(overlap),
    )  # fmt: skip
    return values, indices


def gumbel_argmax_torch(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    seed_R: torch.Tensor,
    position_R: torch.Tensor,
    vocab_start: int = 0,
    *,
    log: Callable[[torch.Tensor], torch.Tensor] = torch.log,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch twin of :func:`gumbel_argmax`; float64 logits are perturbed and compared in float64."""
    dtype = compute_dtype(logits_RV)
    scores_RV = logits_RV.to(dtype)
    sampled = (temperature_R > 0).nonzero().squeeze(1)
    if len(sampled):
        uniform = philox_uniform(seed_R[sampled], position_R[sampled], logits_RV.shape[1], start=vocab_start)
        noise = -log(-log(uniform.to(dtype)))
        perturbed = scores_RV[sampled] / temperature_R[sampled, None].to(dtype) + noise
        scores_RV = scores_RV.index_copy(0, sampled, perturbed)
    scores_RV = scores_RV.masked_fill(scores_RV.isnan(), float("inf"))
    # torch.max may name any index of a tie; the lowest is asked for.
    value_R = scores_RV.amax(dim=1)
    columns = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    index_R = torch.where(scores_RV == value_R[:, None], columns, scores_RV.shape[1]).amin(dim=1)
    return value_R, torch.where(value_R.isfinite(), index_R + vocab_start, -1)

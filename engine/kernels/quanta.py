"""Quanta: what the float32 sum of a leaf becomes in TP invariance on a GPU, an integer that is added in any order.

A leaf's sum is rounded to whole quanta. The quantum is a power of two for each element, of the largest magnitude in the row of
``x`` (a maximum, over all ranks: the same in any order) and of the weight's row, the sum of whose magnitudes bounds each leaf by
2^22 quanta. So no sum of leaves is outside int32, for any input. (Pre-rounding: Demmel and Nguyen 2013; the rounding by a large
number added, as there.)

Shape suffixes: T = tokens, I = input features on this rank, O = output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.common import cdiv, next_power_of_2, tl, triton
from engine.kernels.ieee import exponent_of, tree_sum
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

_LEAF_BITS = 22  # of a leaf in quanta: what float32 holds beside the large number that rounds
MAX_LEAVES = 256
_ROWS_AT_ONCE = 1024  # of a weight whose magnitudes are summed: bounds memory
_TILE_COLUMNS = 1024
_LONGEST_TILE = 4096


@triton.jit
def quanta_scale(exponent):
    """``2 ** exponent``, of a normal number."""
    return ((tl.minimum(tl.maximum(exponent, -126), 126) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quanta_exponents(peaks):
    """The least ``e`` of ``peak < 2 ** e``; 129 for infinity and NaN."""
    return (peaks >> 23) - 126


@triton.jit
def quanta_rounder(exponents):
    """1.5 * 2^23 quanta of ``x``: a number added to it is rounded to whole quanta, which are the lower bits of the sum."""
    return (((tl.minimum(exponents, 100) + 150) << 23) | 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def whole_quanta(sums, scales, rounder):
    """Sums of leaves, times ``scales`` and rounded to integers by one fused multiply-add."""
    rounded = tl.fma(sums, scales, rounder)
    return rounded.to(tl.int32, bitcast=True) - rounder.to(tl.int32, bitcast=True)


@triton.jit
def quanta_value(totals, exponents, units, bias):
    """What sums of quanta stand for; NaN where ``x`` is not finite, or so large that sums might not be."""
    values = totals.to(tl.float32) * quanta_scale(-units) * quanta_scale(tl.minimum(exponents, 100)) + bias
    return tl.where((exponents <= 100) & (exponents - units <= 96), values, float("nan"))


@triton.jit
def _peak_kernel(
    x, peaks, sums, num_columns, num_outputs, x_stride, TILE: tl.constexpr, ZERO: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """One program per row. A float32's magnitude, as an integer, is in the order of the magnitudes, NaN above all."""
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.int32)
    for start in range(0, num_columns, TILE):
        keep = start + columns < num_columns
        values = tl.load(x + row * x_stride + start + columns, mask=keep, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(peaks + row, tl.max(largest, axis=0))
    if ZERO:
        for start in range(0, num_outputs, TILE):
            keep = start + columns < num_outputs
            tl.store(sums + row * num_outputs + start + columns, tl.zeros([TILE], tl.int32), mask=keep)


def row_peaks(x_TI: Tensor, zeroed_TO: Tensor | None = None) -> Tensor:
    """The largest magnitude of each row, ``[T]``, as the bits of a float32: int32 whose maximum over ranks is that of whole rows.

    NaN is larger than infinity, and that than numbers.

    zeroed_TO   int32 to set to zeros on the way
    """
    peak_T = torch.empty(x_TI.shape[0], dtype=torch.int32, device=x_TI.device)
    if peak_T.numel():
        overlap, zero = may_overlap(x_TI), zeroed_TO is not None
        tile = min(_LONGEST_TILE, next_power_of_2(x_TI.shape[1]))
        _peak_kernel[(x_TI.shape[0],)](
            x_TI, peak_T, peak_T if zeroed_TO is None else zeroed_TO,
            x_TI.shape[1], 0 if zeroed_TO is None else zeroed_TO.shape[1], x_TI.stride(0), tile, zero, overlap,
            num_warps=max(1, tile // 512), **early_launch(overlap),
        )  # fmt: skip
    return peak_T


def unit_exponents(weight_OI: Tensor, leaf: int) -> Tensor:
    """Of a whole weight: the exponent of two, int32 ``[O]``, by which each output's quantum is smaller than its row's peak.

    A leaf is bounded by the sum of the magnitudes in its part of the weight's row, times the peak; that is 2^22 quanta at most,
    with a thousandth left for what a chain of float32 sums may be off. From the whole tensor and its leaves alone.
    """
    num_leaves = cdiv(weight_OI.shape[1], leaf)
    if num_leaves > MAX_LEAVES:
        raise ValueError(f"in_features={weight_OI.shape[1]} are {num_leaves} leaves of {leaf}, more than {MAX_LEAVES}, of which "
                         "tp_invariant=True promises the sum")
    padded_OI = torch.nn.functional.pad(weight_OI, (0, num_leaves * leaf - weight_OI.shape[1]))
    largest_O = torch.cat([tree_sum(part.float().abs().unflatten(1, (num_leaves, leaf))).amax(1)
                           for part in padded_OI.split(_ROWS_AT_ONCE)])
    return (_LEAF_BITS - exponent_of(largest_O.double() * 1.001)).clamp(max=126).to(torch.int32)


@triton.jit
def _value_kernel(sums, peaks, units, bias, out, num_outputs, TILE: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr):
    """One program per row and tile of outputs."""
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0)
    outputs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = outputs < num_outputs
    at = row.to(tl.int64) * num_outputs + outputs
    biases = 0.0
    if BIAS:
        biases = tl.load(bias + outputs, mask=keep, other=0.0).to(tl.float32)
    totals = tl.load(sums + at, mask=keep, other=0)
    values = quanta_value(totals, quanta_exponents(tl.load(peaks + row)), tl.load(units + outputs, mask=keep, other=0), biases)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=keep)


def value_of_sums(sums_TO: Tensor, peak_T: Tensor, unit_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the summed quanta of all ranks stand for, plus bias, rounded once; NaN where ``x`` is not finite."""
    num_rows, num_outputs = sums_TO.shape
    out_TO = torch.empty(sums_TO.shape, dtype=dtype, device=sums_TO.device)
    if out_TO.numel():
        overlap = may_overlap(sums_TO)
        _value_kernel[(num_rows, cdiv(num_outputs, _TILE_COLUMNS))](
            sums_TO, peak_T, unit_O, unit_O if bias_O is None else bias_O, out_TO, num_outputs, _TILE_COLUMNS, bias_O is not None,
            overlap, enable_fp_fusion=False, **early_launch(overlap),
        )  # fmt: skip
    return out_TO

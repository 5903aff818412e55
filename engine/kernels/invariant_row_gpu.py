"""Products of one row in TP invariance on a GPU: the bits that ``invariant_matmul_gpu.py`` gives the row, in less time.

One row leaves most of a tile empty, and its time is that of reading the weight. So a program has all of K for a few outputs, by
the tensor cores' older instruction, which takes 16 rows and fewer outputs than the newer one's 64, and has its first part of a
settled weight in registers before the row is there. The row stands for all 16; what the others give is not stored.

Shape suffixes: T = tokens, of which there is one, I = input features on this rank, O = output features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.kernels.common import cdiv, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs
from engine.kernels.quanta import quanta_exponents, quanta_rounder, quanta_scale, whole_quanta

_ROWS = 16  # what the instruction takes at least
LARGE_OUTPUTS = 16384
"""Of a head, or of the MLP of a large model."""


class RowCut(NamedTuple):
    """How a product of one row is cut into programs: for speed alone."""

    outputs: int
    inputs: int
    """At a time."""
    num_warps: int = 4
    num_stages: int = 2


def chain_cut_of(num_outputs: int, num_inputs: int) -> RowCut:
    """The fastest on an H200 of one chain over K."""
    if num_outputs >= LARGE_OUTPUTS:
        return RowCut(32, 256, 4, 3) if num_inputs <= 1024 else RowCut(32, 512)
    if num_inputs > 1024:
        return RowCut(32, 256, 4, 4)
    return RowCut(16, 1024, 2 if num_outputs <= 4096 else 4)


def leaves_cut_of(num_rows: int, num_outputs: int, num_inputs: int, leaf: int) -> RowCut | None:
    """The fastest on an H200 of a chain for each leaf; None where the kernels for any number of rows are to take them."""
    if num_rows != 1 or leaf < 128 or leaf & (leaf - 1):  # many small leaves take long to compile; and powers of two alone do
        return None
    if num_inputs <= 2048:
        return RowCut(8, 2048, 4, 1)
    return RowCut(8, 4096, 8, 1) if num_inputs <= 4096 and num_outputs < 2048 else RowCut(8, 1024)


@triton.jit
def _row_kernel(
    x, weight, bias, out, num_outputs, num_inputs, weight_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr, MORE: tl.constexpr, BIAS: tl.constexpr,
    SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chain over K for OUTPUTS outputs; INPUTS of K at a time, which with MORE are not all of them."""
    rows = tl.zeros([ROWS, 1], tl.int32)  # all of them are the one
    is_first = (tl.arange(0, ROWS) == 0)[:, None]
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    weight_at = weight + (outputs % num_outputs).to(tl.int64)[:, None] * weight_stride + inputs[None, :]
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    if EVEN:
        weights = tl.load(weight_at)
    else:
        weights = tl.load(weight_at, mask=(inputs < num_inputs)[None, :], other=0.0)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    values = tl.broadcast_to(tl.load(x + inputs, mask=inputs < num_inputs, other=0.0)[None, :], [ROWS, INPUTS])
    acc = tl.dot(values, tl.trans(weights))
    if MORE:
        x_at = x + rows + inputs[None, :]
        for start in range(INPUTS, num_inputs, INPUTS):
            # As a tile, which is copied ahead of its use; a row that is made one in registers is not.
            keep = (start + inputs < num_inputs)[None, :]
            if EVEN:
                weights = tl.load(weight_at + start)
                values = tl.load(x_at + start, mask=is_first, other=0.0)
            else:
                weights = tl.load(weight_at + start, mask=keep, other=0.0)
                values = tl.load(x_at + start, mask=is_first & keep, other=0.0)
            acc = tl.dot(values, tl.trans(weights), acc)
    biases = 0.0
    if BIAS:
        biases = tl.load(bias + outputs % num_outputs).to(tl.float32)[None, :]
    tl.store(out + rows + outputs[None, :], (acc + biases).to(out.dtype.element_ty),
             mask=is_first & (outputs < num_outputs)[None, :])


@triton.jit
def _row_leaves_kernel(
    x, weight, peaks, units, sums, num_outputs, num_inputs, weight_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, LEAVES: tl.constexpr, LEAF: tl.constexpr, EVEN: tl.constexpr, MORE: tl.constexpr,
    PEAK: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum of all leaves for OUTPUTS outputs; LEAVES leaves at a time, which with MORE are not all.

    With PEAK, every program looks for the row's largest magnitude, which the first leaves in ``peaks``.
    """
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, LEAVES)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    weight_at = weight + (outputs % num_outputs).to(tl.int64)[None, :, None] * weight_stride + inputs[:, None, :]
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    if EVEN:
        weights = tl.load(weight_at)
    else:
        weights = tl.load(weight_at, mask=(inputs < num_inputs)[:, None, :], other=0.0)
    unit = tl.load(units + outputs % num_outputs)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    row = tl.load(x + inputs, mask=inputs < num_inputs, other=0.0)
    values = tl.broadcast_to(row[:, None, :], [LEAVES, ROWS, LEAF])
    if PEAK:
        bits = row.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if MORE:
            for start in range(LEAVES * LEAF, num_inputs, LEAVES * LEAF):
                others = tl.load(x + start + inputs, mask=start + inputs < num_inputs, other=0.0)
                bits = tl.maximum(bits, others.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        peak = tl.max(tl.max(bits, axis=1), axis=0)
        if tl.program_id(0) == 0:
            tl.store(peaks, peak)
    else:
        peak = tl.load(peaks)
    scales = tl.broadcast_to(quanta_scale(unit)[None, None, :], [LEAVES, ROWS, OUTPUTS])
    rounder = tl.broadcast_to(quanta_rounder(quanta_exponents(peak)), [LEAVES, ROWS, OUTPUTS])
    totals = whole_quanta(tl.dot(values, tl.permute(weights, (0, 2, 1))), scales, rounder)
    if MORE:
        for start in range(LEAVES * LEAF, num_inputs, LEAVES * LEAF):
            if EVEN:
                weights = tl.load(weight_at + start)
            else:
                weights = tl.load(weight_at + start, mask=(start + inputs < num_inputs)[:, None, :], other=0.0)
            row = tl.load(x + start + inputs, mask=start + inputs < num_inputs, other=0.0)
            values = tl.broadcast_to(row[:, None, :], [LEAVES, ROWS, LEAF])
            totals += whole_quanta(tl.dot(values, tl.permute(weights, (0, 2, 1))), scales, rounder)
    rows = tl.zeros([ROWS, 1], tl.int32)
    is_first = (tl.arange(0, ROWS) == 0)[:, None]
    tl.store(sums + rows + outputs[None, :], tl.sum(totals, axis=0), mask=is_first & (outputs < num_outputs)[None, :])


def row_in_order(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, cut: RowCut | None = None) -> Tensor:
    """``linear_in_order`` of one row: the same bits."""
    num_outputs, num_inputs = weight_OI.shape
    cut = cut or chain_cut_of(num_outputs, num_inputs)
    out_TO = torch.empty((1, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    overlap = may_overlap(x_TI)
    _row_kernel[(cdiv(num_outputs, cut.outputs),)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO, num_outputs, num_inputs, weight_OI.stride(0),
        _ROWS, cut.outputs, cut.inputs, num_inputs % cut.inputs == 0, num_inputs > cut.inputs, bias_O is not None,
        isinstance(weight_OI, nn.Parameter), overlap,
        num_warps=cut.num_warps, num_stages=cut.num_stages, enable_fp_fusion=False, **early_launch(overlap),
    )  # fmt: skip
    return out_TO


def sums_of_row(x_TI: Tensor, weight_OI: Tensor, unit_O: Tensor, cut: RowCut, *, leaf: int,
                peak_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``add_leaves`` of one row, the same integers ``[1, O]``, and the row's peak: that of ``x`` where none is given."""
    num_outputs, num_inputs = weight_OI.shape
    sums_TO = torch.empty((1, num_outputs), dtype=torch.int32, device=x_TI.device)
    finds = peak_T is None
    if peak_T is None:
        peak_T = torch.empty(1, dtype=torch.int32, device=x_TI.device)
    overlap = may_overlap(x_TI)
    _row_leaves_kernel[(cdiv(num_outputs, cut.outputs),)](
        x_TI, weight_OI, peak_T, unit_O, sums_TO, num_outputs, num_inputs, weight_OI.stride(0),
        _ROWS, cut.outputs, cut.inputs // leaf, leaf, num_inputs % cut.inputs == 0, num_inputs > cut.inputs, finds,
        isinstance(weight_OI, nn.Parameter), overlap,
        num_warps=cut.num_warps, num_stages=cut.num_stages, enable_fp_fusion=False, **early_launch(overlap),
    )  # fmt: skip
    return sums_TO, peak_T

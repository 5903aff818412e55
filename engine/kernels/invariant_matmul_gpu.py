"""The matmuls of TP invariance on a GPU's tensor cores: bits that depend neither on the rows and columns beside, nor on ranks.

A tensor-core instruction multiplies 16 elements of K and adds them to a float32 accumulator. An element's bits are fixed by the
chain of these instructions that its row and column go through, each 16 further along K, and by nothing else in them: every
shape of tile gives the same (``tests/gpu/test_invariance.py`` compares them all), so tiles are chosen for speed.

*Column-parallel*: no rank cuts K, one chain is the element.

*Row-parallel*: one chain for each leaf of K, at absolute borders between which ranks are cut. A leaf's float32 is rounded to
whole *quanta* and from then on added as an integer, so that any split over ranks, programs or steps of a ring gives the same
bits. The quantum is a power of two for each element, of the largest magnitude in the row of ``x`` (a maximum, over all ranks:
the same in any order) and of the weight's row, the sum of whose magnitudes bounds each leaf by 2^22 quanta. So no sum of leaves
is outside int32, for any input. (Pre-rounding: Demmel and Nguyen 2013; the rounding by a large number added, as there.)

Shape suffixes: T = tokens, I = input features on this rank, O = output features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.kernels.common import cdiv, next_power_of_2, tl, triton
from engine.kernels.ieee import exponent_of, tree_sum
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

_LEAF_BITS = 22  # of a leaf in quanta: what float32 holds beside the large number that rounds
MAX_LEAVES = 256
_ROWS_AT_ONCE = 1024  # of a weight whose magnitudes are summed: bounds memory
_TILE_COLUMNS = 1024
_LONGEST_TILE = 4096
_FEW_ROWS = 16  # what the instruction takes at least
_LINES_AHEAD = 16  # of a row of the weight, 128 bytes each
_LARGE_OUTPUTS = 16384  # of a head, or of the MLP of a large model
_NUM_SMS = 132  # of an H200; a guess elsewhere costs speed, not bits


class Launch(NamedTuple):
    """How a product is cut into tiles: for speed alone."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    weight_first: bool = False
    """The instruction takes 64 rows or more of its first operand: of the weight, where there are few of ``x``."""
    bulk: bool = False
    """Tiles come by the bulk copy engine, where the layout allows it."""
    persistent: bool = False
    """As many programs as multiprocessors, each of which takes tile after tile."""
    ahead: int = 0
    """Lines of each row of the weight that come to the cache while the kernels ahead still work on ``x``."""


class FewRows(NamedTuple):
    """A product of at most 16 rows, of which each program has all of K: a settled weight's first tile is in registers early."""

    outputs: int
    inputs: int
    num_warps: int = 4
    num_stages: int = 2


@triton.jit
def _power_of_two(exponent):
    return ((tl.minimum(tl.maximum(exponent, -126), 126) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quanta_exponents(peaks):
    """The least ``e`` of ``peak < 2 ** e``; 129 for infinity and NaN."""
    return (peaks >> 23) - 126


@triton.jit
def _rounder(exponents):
    """1.5 * 2^23 quanta of ``x``: a number added to it is rounded to whole quanta, which are the lower bits of the sum."""
    return (((tl.minimum(exponents, 100) + 150) << 23) | 0x400000).to(tl.float32, bitcast=True)


@triton.jit
def quanta_value(totals, exponents, units, bias):
    """What sums of quanta stand for; NaN where ``x`` is not finite, or so large that sums might not be."""
    values = totals.to(tl.float32) * _power_of_two(-units) * _power_of_two(tl.minimum(exponents, 100)) + bias
    return tl.where((exponents <= 100) & (exponents - units <= 96), values, float("nan"))


@triton.jit(do_not_specialize=["num_rows", "leaves_each"])
def _product_kernel(
    x, weight, peaks, units, bias, out, num_rows, num_outputs, num_inputs, x_stride, weight_stride, leaves_each,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr, LEAF: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, BULK: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile of ``x @ weight.T``, or one after the other. GROUP tiles of rows take turns, for the cache.

    LEAF 0 is one chain over all of K. Else program (p, w) takes the leaves ``w * leaves_each`` on; an int32 ``out`` takes their
    sum, by ADD what is added to it, any other ``out`` what the sum stands for. With BULK, ``x`` and ``weight`` are descriptors.
    With AHEAD, the first AHEAD lines of the weight's rows come to the cache while the kernels ahead still work on ``x``.
    """
    if AHEAD > 0:
        lines = tl.arange(0, AHEAD) * 64 + tl.program_id(1) * leaves_each * LEAF
        ahead = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        ahead_at = weight + (ahead % num_outputs).to(tl.int64)[:, None] * weight_stride
        ahead_at += tl.minimum(lines, num_inputs - 1)[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ahead_at.to(tl.int64)], dtype=tl.int32,
                                  is_pure=False, pack=1)
    wait_for_inputs(OVERLAP)
    output_tiles = tl.cdiv(num_outputs, OUTPUTS)
    row_tiles = tl.cdiv(num_rows, ROWS)
    inputs = tl.arange(0, INPUTS)
    for tile in range(tl.program_id(0), row_tiles * output_tiles, tl.num_programs(0)):
        first = tile // (GROUP * output_tiles) * GROUP
        size = tl.minimum(row_tiles - first, GROUP)
        row_start = (first + tile % (GROUP * output_tiles) % size) * ROWS
        output_start = tile % (GROUP * output_tiles) // size * OUTPUTS
        rows = row_start + tl.arange(0, ROWS)
        outputs = output_start + tl.arange(0, OUTPUTS)
        if not BULK:
            # Beyond the last row or output comes another one, which is not stored.
            x_at = x + (rows % num_rows).to(tl.int64)[:, None] * x_stride
            weight_at = weight + (outputs % num_outputs).to(tl.int64)[:, None] * weight_stride
        if WEIGHT_FIRST:
            rows = rows[None, :]
            outputs = outputs[:, None]
            acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
        else:
            rows = rows[:, None]
            outputs = outputs[None, :]
            acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
        begin = 0
        end = tl.cdiv(num_inputs, INPUTS)
        if LEAF > 0:
            STEPS: tl.constexpr = (LEAF + INPUTS - 1) // INPUTS
            begin = tl.program_id(1) * leaves_each * STEPS
            end = tl.minimum(begin + leaves_each * STEPS, tl.cdiv(num_inputs, LEAF) * STEPS)
            exponents = quanta_exponents(tl.load(peaks + rows % num_rows))
            unit = tl.load(units + outputs % num_outputs)
            scales = tl.broadcast_to(_power_of_two(unit), acc.shape)
            rounder = tl.broadcast_to(_rounder(exponents), acc.shape)
            totals = tl.zeros(acc.shape, tl.int32)
        for step in range(begin, end):
            start = step * INPUTS
            in_leaf = 0
            if LEAF > 0:
                in_leaf = step % STEPS * INPUTS
                start = step // STEPS * LEAF + in_leaf
            if BULK:
                values, weights = x.load([row_start, start]), weight.load([output_start, start])
            elif EVEN:
                values, weights = tl.load(x_at + (start + inputs)[None, :]), tl.load(weight_at + (start + inputs)[None, :])
            else:
                keep = (start + inputs < num_inputs)[None, :]
                if LEAF > 0:
                    keep = keep & (in_leaf + inputs < LEAF)[None, :]
                values = tl.load(x_at + (start + inputs)[None, :], mask=keep, other=0.0)
                weights = tl.load(weight_at + (start + inputs)[None, :], mask=keep, other=0.0)
            if WEIGHT_FIRST:
                acc = tl.dot(weights, tl.trans(values), acc)
            else:
                acc = tl.dot(values, tl.trans(weights), acc)
            if LEAF > 0:  # noqa: SIM102 -- only what is compiled away may name STEPS
                if STEPS == 1 or step % STEPS == STEPS - 1:
                    rounded = tl.fma(acc, scales, rounder)
                    totals += rounded.to(tl.int32, bitcast=True) - rounder.to(tl.int32, bitcast=True)
                    acc = tl.zeros(acc.shape, tl.float32)
        keep = (rows < num_rows) & (outputs < num_outputs)
        at = out + rows.to(tl.int64) * num_outputs + outputs
        biases = 0.0
        if BIAS:
            biases = tl.load(bias + outputs % num_outputs).to(tl.float32)
        if ADD:
            tl.atomic_add(at, totals, mask=keep, sem="relaxed")
        elif out.dtype.element_ty == tl.int32:
            tl.store(at, totals, mask=keep)
        elif LEAF > 0:
            tl.store(at, quanta_value(totals, exponents, unit, biases).to(out.dtype.element_ty), mask=keep)
        else:
            tl.store(at, (acc + biases).to(out.dtype.element_ty), mask=keep)


def few_rows_of(num_rows: int, num_outputs: int, num_inputs: int, leaf: int) -> FewRows | None:
    """The fastest cut on an H200 of one row, of one chain (leaf 0) or of leaves; None where :func:`launch_of` knows better."""
    if num_rows != 1:
        return None
    if leaf:
        if leaf < 128 or leaf & (leaf - 1):  # many small leaves take long to compile, and the compiler wants powers of two
            return None
        if num_inputs <= 2048:
            return FewRows(8, 2048, 4, 1)
        return FewRows(8, 4096, 8, 1) if num_inputs <= 4096 and num_outputs < 2048 else FewRows(8, 1024)
    if num_outputs >= _LARGE_OUTPUTS:
        return FewRows(32, 256, 4, 3) if num_inputs <= 1024 else FewRows(32, 512)
    if num_inputs > 1024:
        return FewRows(32, 256, 4, 4)
    return FewRows(16, 1024, 2 if num_outputs <= 4096 else 4)


def launch_of(num_rows: int, num_outputs: int, num_inputs: int, leaves: bool) -> Launch:
    """The fastest on an H200 of those that were measured."""
    if num_rows <= 16:
        if leaves:
            is_small = num_outputs < 2048
            return Launch(16, 64, 128, 4, 3 if is_small else 5, weight_first=True, ahead=4 if is_small else 0)
        return (Launch(16, 64, 256, 4, 3, weight_first=True, ahead=_LINES_AHEAD) if num_inputs <= 1024
                else Launch(16, 64, 128, 4, 6, weight_first=True))
    if num_rows <= 32:
        return Launch(32, 64, 128, 4, 4, weight_first=True, ahead=_LINES_AHEAD)
    if num_rows <= 64:
        if leaves:
            return Launch(64, 32, 128, 4, 4, bulk=True)
        return Launch(64, 64, 128, 4, 4, bulk=True) if num_outputs < _LARGE_OUTPUTS else Launch(64, 128, 64, 4, 4, bulk=True)
    tiles = cdiv(num_rows, 128) * cdiv(num_outputs, 128)
    if tiles < (_NUM_SMS if leaves else _NUM_SMS // 2):
        return Launch(64, 64, 128, 4, 3, bulk=True)
    if leaves:
        return Launch(128, 128, 128, 8, 3, bulk=True, persistent=tiles >= 4 * _NUM_SMS)
    if tiles < 4 * _NUM_SMS:
        return Launch(128, 128, 64, 8, 4, bulk=True, persistent=tiles > _NUM_SMS)
    if num_rows <= 256:
        return Launch(256, 128, 64, 8, 4, bulk=True)
    # One chain and its tile are as many registers as there are.
    return Launch(128, 256, 64, 8, 3, bulk=True, persistent=True)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x, weight, bias, out, num_rows, num_outputs, num_inputs, x_stride, weight_stride,
    ROWS: tl.constexpr, ONE: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr, MORE: tl.constexpr,
    BIAS: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chain over K for OUTPUTS outputs of at most ROWS rows; INPUTS of K at a time, which with MORE are not all of them.

    With ONE there is one row, which stands for all of them: it is read once, and what the others give is not stored.
    """
    rows = tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    weight_at = weight + (outputs % num_outputs).to(tl.int64)[:, None] * weight_stride + inputs[None, :]
    x_at = x + rows[:, None] * x_stride + inputs[None, :]
    keep_rows = (rows < num_rows)[:, None]
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    if EVEN:
        weights = tl.load(weight_at)
    else:
        weights = tl.load(weight_at, mask=(inputs < num_inputs)[None, :], other=0.0)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    if ONE:
        values = tl.broadcast_to(tl.load(x + inputs, mask=inputs < num_inputs, other=0.0)[None, :], [ROWS, INPUTS])
    else:
        values = tl.load(x_at, mask=keep_rows & (inputs < num_inputs)[None, :], other=0.0)
    acc = tl.dot(values, tl.trans(weights))
    if MORE:
        for start in range(INPUTS, num_inputs, INPUTS):
            keep = (start + inputs < num_inputs)[None, :]
            if EVEN:
                weights = tl.load(weight_at + start)
                values = tl.load(x_at + start, mask=keep_rows, other=0.0)
            else:
                weights = tl.load(weight_at + start, mask=keep, other=0.0)
                values = tl.load(x_at + start, mask=keep_rows & keep, other=0.0)
            acc = tl.dot(values, tl.trans(weights), acc)
    biases = 0.0
    if BIAS:
        biases = tl.load(bias + outputs % num_outputs).to(tl.float32)[None, :]
    keep_out = keep_rows & (outputs < num_outputs)[None, :]
    tl.store(out + rows[:, None] * num_outputs + outputs[None, :], (acc + biases).to(out.dtype.element_ty), mask=keep_out)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_leaves_kernel(
    x, weight, peaks, units, sums, num_rows, num_outputs, num_inputs, x_stride, weight_stride,
    ROWS: tl.constexpr, ONE: tl.constexpr, OUTPUTS: tl.constexpr, LEAVES: tl.constexpr, LEAF: tl.constexpr,
    EVEN: tl.constexpr, MORE: tl.constexpr, PEAK: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum of all leaves for OUTPUTS outputs of at most ROWS rows; LEAVES leaves at a time, which with MORE are not all.

    With PEAK, every program looks for the rows' largest magnitudes, of which the first leaves them in ``peaks``.
    """
    rows = tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, LEAVES)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    weight_at = weight + (outputs % num_outputs).to(tl.int64)[None, :, None] * weight_stride + inputs[:, None, :]
    x_at = x + rows[None, :, None] * x_stride + inputs[:, None, :]
    keep_rows = (rows < num_rows)[None, :, None]
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    if EVEN:
        weights = tl.load(weight_at)
    else:
        weights = tl.load(weight_at, mask=(inputs < num_inputs)[:, None, :], other=0.0)
    unit = tl.load(units + outputs % num_outputs)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    if ONE:
        row = tl.load(x + inputs, mask=inputs < num_inputs, other=0.0)
        values = tl.broadcast_to(row[:, None, :], [LEAVES, ROWS, LEAF])
    else:
        row = tl.load(x_at, mask=keep_rows & (inputs < num_inputs)[:, None, :], other=0.0)
        values = row
    if PEAK:
        bits = row.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if MORE:
            for start in range(LEAVES * LEAF, num_inputs, LEAVES * LEAF):
                if ONE:
                    others = tl.load(x + start + inputs, mask=start + inputs < num_inputs, other=0.0)
                else:
                    others = tl.load(x_at + start, mask=keep_rows & (start + inputs < num_inputs)[:, None, :], other=0.0)
                bits = tl.maximum(bits, others.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if ONE:
            peak = tl.max(tl.max(bits, axis=1), axis=0) + tl.zeros([ROWS], tl.int32)
        else:
            peak = tl.max(tl.max(bits, axis=2), axis=0)
        if tl.program_id(0) == 0:
            tl.store(peaks + rows, peak, mask=rows < num_rows)
    else:
        peak = tl.load(peaks + rows, mask=rows < num_rows, other=0)
    scales = tl.broadcast_to(_power_of_two(unit)[None, None, :], [LEAVES, ROWS, OUTPUTS])
    rounder = tl.broadcast_to(_rounder(quanta_exponents(peak))[None, :, None], [LEAVES, ROWS, OUTPUTS])
    rounded = tl.fma(tl.dot(values, tl.permute(weights, (0, 2, 1))), scales, rounder)
    totals = rounded.to(tl.int32, bitcast=True) - rounder.to(tl.int32, bitcast=True)
    if MORE:
        for start in range(LEAVES * LEAF, num_inputs, LEAVES * LEAF):
            keep = (start + inputs < num_inputs)[:, None, :]
            if EVEN:
                weights = tl.load(weight_at + start)
            else:
                weights = tl.load(weight_at + start, mask=keep, other=0.0)
            if ONE:
                row = tl.load(x + start + inputs, mask=start + inputs < num_inputs, other=0.0)
                values = tl.broadcast_to(row[:, None, :], [LEAVES, ROWS, LEAF])
            else:
                values = tl.load(x_at + start, mask=keep_rows & keep, other=0.0)
            rounded = tl.fma(tl.dot(values, tl.permute(weights, (0, 2, 1))), scales, rounder)
            totals += rounded.to(tl.int32, bitcast=True) - rounder.to(tl.int32, bitcast=True)
    keep_out = (rows < num_rows)[:, None] & (outputs < num_outputs)[None, :]
    tl.store(sums + rows[:, None] * num_outputs + outputs[None, :], tl.sum(totals, axis=0), mask=keep_out)


def linear_in_order(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, summed in float32 in one order over I, rounded once. bfloat16; rows may be strided."""
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    out_TO = torch.empty((num_rows, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    cut = few_rows_of(num_rows, num_outputs, num_inputs, 0)
    if cut is None:
        _launch(x_TI, weight_OI, None, None, bias_O, out_TO, 0, 1)
        return out_TO
    overlap = may_overlap(x_TI)
    _few_rows_kernel[(cdiv(num_outputs, cut.outputs),)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO, num_rows, num_outputs, num_inputs,
        x_TI.stride(0), weight_OI.stride(0), _FEW_ROWS, num_rows == 1, cut.outputs, cut.inputs, num_inputs % cut.inputs == 0,
        num_inputs > cut.inputs, bias_O is not None, isinstance(weight_OI, nn.Parameter), overlap,
        num_warps=cut.num_warps, num_stages=cut.num_stages, enable_fp_fusion=False, **early_launch(overlap),
    )  # fmt: skip
    return out_TO


def sums_of_few_rows(x_TI: Tensor, weight_OI: Tensor, unit_O: Tensor, cut: FewRows, *, leaf: int,
                     peak_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`add_leaves` in one launch, and the rows' peaks: those of ``x`` where none are given."""
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    sums_TO = torch.empty((num_rows, num_outputs), dtype=torch.int32, device=x_TI.device)
    finds = peak_T is None
    if peak_T is None:
        peak_T = torch.empty(num_rows, dtype=torch.int32, device=x_TI.device)
    overlap = may_overlap(x_TI)
    _few_rows_leaves_kernel[(cdiv(num_outputs, cut.outputs),)](
        x_TI, weight_OI, peak_T, unit_O, sums_TO, num_rows, num_outputs, num_inputs, x_TI.stride(0), weight_OI.stride(0),
        _FEW_ROWS, num_rows == 1, cut.outputs, cut.inputs // leaf, leaf, num_inputs % cut.inputs == 0, num_inputs > cut.inputs,
        finds, isinstance(weight_OI, nn.Parameter), overlap,
        num_warps=cut.num_warps, num_stages=cut.num_stages, enable_fp_fusion=False, **early_launch(overlap),
    )  # fmt: skip
    return sums_TO, peak_T


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


def shares_leaves(num_rows: int, num_outputs: int, num_leaves: int) -> int:
    """How many programs share the leaves of an element: as many as keep the device busy. Integers are added in any order."""
    launch = launch_of(num_rows, num_outputs, 0, True)
    tiles = cdiv(num_rows, launch.rows) * cdiv(num_outputs, launch.outputs)
    return max(1, min(8 if launch.weight_first else 4, num_leaves, 2 * _NUM_SMS // tiles))


def add_leaves(x_TI: Tensor, weight_OI: Tensor, peak_T: Tensor, unit_O: Tensor, sums_TO: Tensor, *, leaf: int,
               shares: int) -> None:
    """This rank's leaves of ``x @ weight.T`` in quanta, into int32 ``[T, O]``: summed over the ranks, an element of any split.

    x_TI      starts at a leaf's border, as ``weight``
    peak_T    of whole rows of ``x``, over all ranks (:func:`row_peaks`)
    unit_O    of the whole weight (:func:`unit_exponents`)
    sums_TO   with more than one share, zeros
    leaf      its width
    shares    programs that share the leaves of an element
    """
    _launch(x_TI, weight_OI, peak_T, unit_O, None, sums_TO, leaf, shares)


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


def linear_in_leaves(x_TI: Tensor, weight_OI: Tensor, peak_T: Tensor, unit_O: Tensor, bias_O: Tensor | None, *,
                     leaf: int) -> Tensor:
    """:func:`value_of_sums` of :func:`add_leaves`, by a rank that has all of them."""
    out_TO = torch.empty((x_TI.shape[0], weight_OI.shape[0]), dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, weight_OI, peak_T, unit_O, bias_O, out_TO, leaf, 1)
    return out_TO


def _launch(x_TI: Tensor, weight_OI: Tensor, peak_T: Tensor | None, unit_O: Tensor | None, bias_O: Tensor | None, out_TO: Tensor,
            leaf: int, shares: int) -> None:
    if out_TO.numel() == 0:
        return
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    launch = launch_of(num_rows, num_outputs, num_inputs, leaf > 0)
    inputs, num_stages = launch.inputs, launch.num_stages
    # A leaf is some whole steps, or one step that is wider than it.
    if leaf % inputs:
        inputs = 64 if leaf % 64 == 0 else max(16, next_power_of_2(leaf))
        num_stages = 2
    bulk = launch.bulk and inputs == launch.inputs and _fits_bulk_copies(x_TI) and _fits_bulk_copies(weight_OI)
    x: Any = x_TI
    weight: Any = weight_OI
    if bulk:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x = TensorDescriptor(x_TI, list(x_TI.shape), list(x_TI.stride()), [launch.rows, inputs])
        weight = TensorDescriptor(weight_OI, list(weight_OI.shape), list(weight_OI.stride()), [launch.outputs, inputs])
    nothing = out_TO  # stands for arguments that a variant never reads
    tiles = cdiv(num_rows, launch.rows) * cdiv(num_outputs, launch.outputs)
    overlap = may_overlap(x_TI)
    _product_kernel[(min(tiles, _NUM_SMS) if launch.persistent else tiles, shares)](
        x, weight, nothing if peak_T is None else peak_T, nothing if unit_O is None else unit_O,
        nothing if bias_O is None else bias_O, out_TO,
        num_rows, num_outputs, num_inputs, x_TI.stride(0), weight_OI.stride(0),
        cdiv(cdiv(num_inputs, leaf), shares) if leaf else 0,
        launch.rows, launch.outputs, inputs, 8, leaf, launch.weight_first, bulk,
        num_inputs % (leaf or inputs) == 0 and (leaf or inputs) % inputs == 0, bias_O is not None, shares > 1,
        launch.ahead if overlap else 0, overlap,
        num_warps=launch.num_warps, num_stages=num_stages, enable_fp_fusion=False, **early_launch(overlap),
    )  # fmt: skip


def _fits_bulk_copies(x: Tensor) -> bool:
    """The copy engine takes rows that start at multiples of 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0

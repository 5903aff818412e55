"""The matmuls of TP invariance on a GPU's tensor cores: bits that depend neither on the rows and columns beside, nor on ranks.

A tensor-core instruction multiplies 16 elements of K and adds them to a float32 accumulator. An element's bits are fixed by the
chain of these instructions that its row and column go through, each 16 further along K, and by nothing else in them: every
shape of tile gives the same (``tests/gpu/test_invariance.py`` compares them all), so tiles are chosen for speed.

*Column-parallel*: no rank cuts K, one chain is the element.

*Row-parallel*: one chain for each leaf of K, at absolute borders between which ranks are cut. A leaf's float32 is rounded to
whole quanta (``quanta.py``) and from then on added as an integer, so that any split over ranks, programs or steps of a ring
gives the same bits.

Shape suffixes: T = tokens, I = input features on this rank, O = output features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.common import cdiv, next_power_of_2, tl, triton
from engine.kernels.invariant_row_gpu import LARGE_OUTPUTS, row_in_order
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs
from engine.kernels.quanta import quanta_exponents, quanta_rounder, quanta_scale, quanta_value, whole_quanta

_LINES_AHEAD = 16  # of a row of the weight, 128 bytes each
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
            scales = tl.broadcast_to(quanta_scale(unit), acc.shape)
            rounder = tl.broadcast_to(quanta_rounder(exponents), acc.shape)
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
                    totals += whole_quanta(acc, scales, rounder)
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
        return Launch(64, 64, 128, 4, 4, bulk=True) if num_outputs < LARGE_OUTPUTS else Launch(64, 128, 64, 4, 4, bulk=True)
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


def linear_in_order(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, summed in float32 in one order over I, rounded once. bfloat16; rows may be strided."""
    if x_TI.shape[0] == 1:
        return row_in_order(x_TI, weight_OI, bias_O)
    out_TO = torch.empty((x_TI.shape[0], weight_OI.shape[0]), dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, weight_OI, None, None, bias_O, out_TO, 0, 1)
    return out_TO


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

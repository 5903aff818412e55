"""``y = x @ W.T + b`` for one row of ``x``, a matrix-vector product: as fast as ``W`` can be read.

Every weight is used once, so time is what it takes to bring ``W`` from memory. Each program has some rows of ``W``, whole, and
keeps all of its loads in flight at once. Nothing is split over programs, so no sum depends on an order that is not fixed:
the same inputs give the same bits, run after run. The weights stay in registers, and ordinary cores multiply them.

What stands between two products of a decoder needs no launch of its own:

* ``silu(gate) * up``: a program has the gates and the ups of the same features, and multiplies them.
* A residual and its RMSNorm, ``(x + residual) / rms * weight``: the product that gives ``x`` adds the residual, multiplies by the
  norm's weight, and leaves the squares of its output features, summed. The product behind it divides its sums by the row's rms,
  which is one factor for all input features (:class:`HalfNormed`).
"""

from typing import NamedTuple

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs
from engine.kernels.silu_mul import silu_mul_16, silu_mul_torch

# Shape suffixes: T = tokens (rows of x), I = input features, O = output features

_LANE_BYTES = 16  # the widest load of a thread
_LONG_ROW = 4096  # input features
_NUM_SMS = 132  # of an H200; a guess elsewhere costs speed, not correctness


class HalfNormed(NamedTuple):
    """Rows of an RMSNorm that are multiplied by its weight, and not yet divided by their rms."""

    values_TI: torch.Tensor
    squares_TP: torch.Tensor
    """Float32; of what the norm is of, the sum of squares of each part of a row."""
    eps: float


@triton.jit(do_not_specialize=["num_parts"])
def _gemv_kernel(
    x, weight, bias, out, residual, norm_weight, normed, squares, num_inputs, num_outputs, num_parts, eps, weight_stride,
    ROWS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, MORE: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, SQUARES: tl.constexpr, ADD: tl.constexpr, SETTLED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per ROWS output features; PARTS * COLS input features at a time.

    With EVEN, that divides their number; with MORE, it is not all of them. With GATED, the ROWS are half gates and half ups. With
    SQUARES, ``squares`` has up to so many parts of x, whose rms the sums are divided by; with ADD, ``out`` is the new residual,
    and ``normed`` and ``squares`` are its :class:`HalfNormed`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if GATED:  # feature after feature, its gate and its up
        rows = rows // 2 + rows % 2 * (num_outputs // 2)
    cols = tl.arange(0, PARTS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    weight_at = weight + rows.to(tl.int64)[None, :, None] * weight_stride + cols[:, None, :]
    keep_rows = (rows < num_outputs)[None, :, None]
    # A settled weight comes in while the kernels ahead still work on x.
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    if EVEN:
        weights = tl.load(weight_at, mask=keep_rows, other=0.0)
    else:
        weights = tl.load(weight_at, mask=keep_rows & (cols < num_inputs)[:, None, :], other=0.0)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    if EVEN:
        values = tl.load(x + cols)
    else:
        values = tl.load(x + cols, mask=cols < num_inputs, other=0.0)
    # What is needed after the sums comes in beside them.
    if SQUARES:
        parts = tl.arange(0, SQUARES)
        of_parts = tl.load(squares + parts, mask=parts < num_parts, other=0.0)
    if ADD:
        added = tl.load(residual + rows, mask=rows < num_outputs, other=0.0)
        norm_weights = tl.load(norm_weight + rows, mask=rows < num_outputs, other=0.0)
    acc = tl.sum(weights.to(tl.float32) * values.to(tl.float32)[:, None, :], axis=0)
    if MORE:
        for start in range(PARTS * COLS, num_inputs, PARTS * COLS):
            if EVEN:
                weights = tl.load(weight_at + start, mask=keep_rows, other=0.0)
                values = tl.load(x + start + cols)
            else:
                keep = start + cols < num_inputs
                weights = tl.load(weight_at + start, mask=keep_rows & keep[:, None, :], other=0.0)
                values = tl.load(x + start + cols, mask=keep, other=0.0)
            acc += tl.sum(weights.to(tl.float32) * values.to(tl.float32)[:, None, :], axis=0)
    sums = tl.sum(acc, axis=1)
    if SQUARES:
        sums *= tl.rsqrt(tl.sum(of_parts, axis=0) / num_inputs + eps)
    if BIAS:
        sums += tl.load(bias + rows, mask=rows < num_outputs, other=0.0).to(tl.float32)
    product = sums.to(out.dtype.element_ty)
    if GATED:
        gate, up = tl.split(tl.reshape(product.to(tl.float32), [ROWS // 2, 2]))
        features = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        tl.store(out + features, silu_mul_16(gate, up).to(out.dtype.element_ty), mask=features < num_outputs // 2)
    elif ADD:
        new_residual = (product.to(tl.float32) + added.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + rows, new_residual, mask=rows < num_outputs)
        wide = new_residual.to(tl.float32)
        tl.store(normed + rows, (wide * norm_weights.to(tl.float32)).to(out.dtype.element_ty), mask=rows < num_outputs)
        tl.store(squares + tl.program_id(0), tl.sum(wide * wide, axis=0))  # features past the last are zeros
    else:
        tl.store(out + rows, product, mask=rows < num_outputs)


def gemv(
    x: torch.Tensor | HalfNormed,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    gated: bool = False,
    settled: bool = False,
    rows: int | None = None,
    parts: int | None = None,
    num_warps: int = 4,
    overlap: bool | None = None,
    out_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for one row, summed in float32 and rounded once.

    x, weight_OI      ``[1, I]`` and ``[O, I]`` of one dtype; rows may be strided
    bias_O            ``[O]`` of that dtype
    gated             output features are gates, then as many ups, of which ``silu(gate) * up`` is given, in 16 bits with those of
                      :func:`engine.kernels.silu_mul.silu_mul` on the product
    settled           the kernel launched just before this one does not write the weight, so it may be read early
    rows              output features of one program, a power of two
    parts             stretches of 256 * num_warps input features that are in flight together
    num_warps, overlap   Triton's launch parameter, and whether to start before the kernel ahead is done
                      (default: where the device can)
    out_TO            where to write, contiguous; allocated if None

    Returns ``[1, O]``, gated ``[1, O / 2]``, contiguous. Raises ``ValueError`` for dtypes other than bfloat16, float16, float32
    and for other numbers of rows.
    """
    return _launch(x, weight_OI, bias_O, settled, rows, parts, num_warps, overlap, gated=gated, out=out_TO)[0]


def gemv_add_norm(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    residual_TO: torch.Tensor,
    norm_weight_O: torch.Tensor,
    eps: float,
    *,
    settled: bool = False,
    overlap: bool | None = None,
) -> tuple[HalfNormed, torch.Tensor]:
    """``s = x @ weight.T + residual`` for one row, rounded before and after the addition, and its RMSNorm but for the division.

    residual_TO, norm_weight_O   ``[1, O]`` and ``[O]`` of the same dtype
    others                       as in :func:`gemv`; the norm's weight is read late, settled or not

    Returns the norm and ``s``, the new residual.
    """
    check_kernel_inputs(residual=residual_TO, norm_weight=norm_weight_O)
    out, normed, squares = _launch(x_TI, weight_OI, None, settled, None, None, 4, overlap, residual_TO=residual_TO,
                                   norm_weight_O=norm_weight_O)  # fmt: skip
    return HalfNormed(normed, squares, eps), out


def _launch(
    x: torch.Tensor | HalfNormed,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    settled: bool,
    rows: int | None,
    parts: int | None,
    num_warps: int,
    overlap: bool | None,
    *,
    gated: bool = False,
    residual_TO: torch.Tensor | None = None,
    norm_weight_O: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what the kernel calls out, normed and squares."""
    x_TI = x.values_TI if isinstance(x, HalfNormed) else x
    check_kernel_inputs(x=x_TI, weight=weight_OI)
    num_tokens, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    if num_tokens != 1 or weight_OI.dtype != x_TI.dtype or weight_OI.shape[1] != num_inputs:
        raise ValueError(
            f"x {tuple(x_TI.shape)} {x_TI.dtype} by weight {tuple(weight_OI.shape)} {weight_OI.dtype}: one dtype and "
            "number of input features is asked for, and one row of x; use torch's linear for others"
        )
    cols = 32 * num_warps * (_LANE_BYTES // x_TI.element_size())
    # Measured in captured decode steps: long rows are read best by many small programs, short ones by few large ones, which
    # have more on its way when the kernel ahead is done.
    parts = parts or (2 if num_inputs >= _LONG_ROW else min(4, next_power_of_2(cdiv(num_inputs, cols))))
    rows = rows or (2 if num_inputs >= _LONG_ROW else _rows_for(num_outputs, parts))
    if gated:
        rows = max(2, rows)  # a gate and its up
    num_programs = cdiv(num_outputs, rows)
    if out is None:
        out = torch.empty((num_tokens, num_outputs // 2 if gated else num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    # An argument that a variant never reads still needs a tensor in its place.
    residual = out if residual_TO is None else residual_TO.contiguous()
    norm_weight = out if norm_weight_O is None else norm_weight_O
    normed, squares = out, x.squares_TP if isinstance(x, HalfNormed) else out
    if residual_TO is not None:
        normed = torch.empty_like(out)
        squares = torch.empty((1, num_programs), dtype=torch.float32, device=x_TI.device)
    if out.numel() == 0:
        return out, normed, squares
    overlap = may_overlap(x_TI, overlap)
    _gemv_kernel[(num_programs,)](
        x_TI, weight_OI, out if bias_O is None else bias_O.contiguous(), out, residual, norm_weight, normed, squares,
        num_inputs, num_outputs, squares.shape[1], x.eps if isinstance(x, HalfNormed) else 0.0, weight_OI.stride(0),
        rows, parts, cols, num_inputs % (parts * cols) == 0, num_inputs > parts * cols,
        bias_O is not None, gated, next_power_of_2(squares.shape[1]) if isinstance(x, HalfNormed) else 0,
        residual_TO is not None, settled, overlap,
        num_warps=num_warps, **early_launch(overlap),
    )  # fmt: skip
    return out, normed, squares


def _rows_for(num_outputs: int, parts: int) -> int:
    """Rows of the weight for a program: as many as its registers hold, but enough programs for all multiprocessors."""
    rows = 8 if parts <= 2 else 4
    while rows > 1 and num_outputs < rows * 3 * _NUM_SMS // 2:
        rows //= 2
    return rows


def gemv_torch(
    x: torch.Tensor | HalfNormed,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """Plain-torch twin of :func:`gemv`, for any number of rows; float64 input is computed in float64."""
    x_TI = x.values_TI if isinstance(x, HalfNormed) else x
    dtype = compute_dtype(x_TI)
    y_TO = x_TI.to(dtype) @ weight_OI.to(dtype).T
    if isinstance(x, HalfNormed):
        y_TO *= torch.rsqrt(x.squares_TP.to(dtype).sum(dim=1, keepdim=True) / x_TI.shape[1] + x.eps)
    y_TO = (y_TO if bias_O is None else y_TO + bias_O.to(dtype)).to(x_TI.dtype)
    return silu_mul_torch(y_TO) if gated else y_TO


def gemv_add_norm_torch(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, residual_TO: torch.Tensor, norm_weight_O: torch.Tensor, eps: float
) -> tuple[HalfNormed, torch.Tensor]:
    """Plain-torch twin of :func:`gemv_add_norm`, likewise."""
    new_residual = gemv_torch(x_TI, weight_OI) + residual_TO
    wide = new_residual.to(compute_dtype(x_TI))
    values = (wide * norm_weight_O.to(wide.dtype)).to(x_TI.dtype)
    return HalfNormed(values, wide.square().sum(dim=1, keepdim=True), eps), new_residual

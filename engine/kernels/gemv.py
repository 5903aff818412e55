"""``y = x @ W.T + b`` for one row of ``x``, a matrix-vector product: as fast as ``W`` can be read.

Every weight is used once, so time is what it takes to bring ``W`` from memory. Each program has some rows of ``W``, whole, and
keeps all of its loads in flight at once. Nothing is split over programs, so no sum depends on an order that is not fixed:
the same inputs give the same bits, run after run. The weights stay in registers, and ordinary cores multiply them.
"""

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

# Shape suffixes: T = tokens (rows of x), I = input features, O = output features

_LANE_BYTES = 16  # the widest load of a thread
_LONG_ROW = 4096  # input features
_NUM_SMS = 132  # of an H200; a guess elsewhere costs speed, not correctness


@triton.jit
def _gemv_kernel(
    x, weight, bias, out, num_inputs, num_outputs, weight_stride,
    ROWS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, MORE: tl.constexpr,
    BIAS: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per ROWS output features; PARTS * COLS input features at a time.

    With EVEN, that divides their number; with MORE, it is not all of them.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
    if BIAS:
        sums += tl.load(bias + rows, mask=rows < num_outputs, other=0.0).to(tl.float32)
    tl.store(out + rows, sums.to(out.dtype.element_ty), mask=rows < num_outputs)


def gemv(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    settled: bool = False,
    rows: int | None = None,
    parts: int | None = None,
    num_warps: int = 4,
    overlap: bool | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for one row, summed in float32 and rounded once.

    x_TI, weight_OI   ``[1, I]`` and ``[O, I]`` of one dtype; rows may be strided
    bias_O            ``[O]`` of that dtype
    settled           the kernel launched just before this one does not write the weight, so it may be read early
    rows              output features of one program, a power of two
    parts             stretches of 256 * num_warps input features that are in flight together
    num_warps, overlap   Triton's launch parameter, and whether to start before the kernel ahead is done
                      (default: where the device can)

    Returns ``[1, O]``, contiguous. Raises ``ValueError`` for dtypes other than bfloat16, float16, float32 and for other
    numbers of rows.
    """
    check_kernel_inputs(x=x_TI, weight=weight_OI)
    num_tokens, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    if num_tokens != 1 or weight_OI.dtype != x_TI.dtype or weight_OI.shape[1] != num_inputs:
        raise ValueError(
            f"x {tuple(x_TI.shape)} {x_TI.dtype} by weight {tuple(weight_OI.shape)} {weight_OI.dtype}: one dtype and "
            "number of input features is asked for, and one row of x; use torch's linear for others"
        )
    out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    if out_TO.numel() == 0:
        return out_TO
    overlap = may_overlap(x_TI, overlap)
    # An argument that a variant never reads still needs a tensor in its place.
    bias = out_TO if bias_O is None else bias_O.contiguous()
    cols = 32 * num_warps * (_LANE_BYTES // x_TI.element_size())
    # Measured in captured decode steps: long rows are read best by many small programs, short ones by few large ones, which
    # have more on its way when the kernel ahead is done.
    parts = parts or (2 if num_inputs >= _LONG_ROW else min(4, next_power_of_2(cdiv(num_inputs, cols))))
    rows = rows or (2 if num_inputs >= _LONG_ROW else _rows_for(num_outputs, parts))
    _gemv_kernel[(cdiv(num_outputs, rows),)](
        x_TI, weight_OI, bias, out_TO, num_inputs, num_outputs, weight_OI.stride(0),
        rows, parts, cols, num_inputs % (parts * cols) == 0, num_inputs > parts * cols,
        bias_O is not None, settled, overlap,
        num_warps=num_warps, **early_launch(overlap),
    )  # fmt: skip
    return out_TO


def _rows_for(num_outputs: int, parts: int) -> int:
    """Rows of the weight for a program: as many as its registers hold, but enough programs for all multiprocessors."""
    rows = 8 if parts <= 2 else 4
    while rows > 1 and num_outputs < rows * 3 * _NUM_SMS // 2:
        rows //= 2
    return rows


def gemv_torch(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain-torch twin of :func:`gemv`, for any number of rows; float64 input is computed in float64."""
    dtype = compute_dtype(x_TI)
    y_TO = x_TI.to(dtype) @ weight_OI.to(dtype).T
    return (y_TO if bias_O is None else y_TO + bias_O.to(dtype)).to(x_TI.dtype)

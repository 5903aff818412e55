"""``y = x @ W.T + b`` for a few rows of ``x``: as fast as ``W`` can be read.

With so few rows every weight is used once or a few times, so time is what it takes to bring ``W`` from memory. Both kernels
give each program some rows of ``W``, whole, and keep all of their warps' loads in flight at once. Nothing is split over
programs, so no sum depends on an order that is not fixed: the same inputs give the same bits, run after run.

One row is multiplied by ordinary cores, the weights in registers. Two rows to sixteen go to the tensor cores: each warp
takes every fourth stretch of the input features, and the warps' sums are added at the end.
"""

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

# Shape suffixes: T = tokens (rows of x), I = input features, O = output features

MAX_ROWS = 16
"""Rows of ``x`` that these kernels take: one tile of the tensor cores."""

_LANE_BYTES = 16  # the widest load of a thread
_LONG_ROW = 4096  # input features
_NUM_SMS = 132  # of an H200; a guess elsewhere costs speed, not correctness


@triton.jit
def _one_row_kernel(
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


@triton.jit(do_not_specialize=["num_tokens"])
def _few_rows_kernel(
    x, weight, bias, out, num_tokens, num_inputs, num_outputs, x_stride, weight_stride,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per ROWS output features; each of its WARPS takes COLS input features at a time."""
    wait_for_inputs(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    cols = tl.arange(0, WARPS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    weight_at = weight + rows.to(tl.int64)[None, :, None] * weight_stride + cols[:, None, :]
    x_at = x + tokens[None, :, None] * x_stride + cols[:, None, :]
    keep_rows = (rows < num_outputs)[None, :, None]
    keep_tokens = (tokens < num_tokens)[None, :, None]
    # The leading dimension is a batch to tl.dot, of which each warp takes one.
    acc = tl.zeros([WARPS, TOKENS, ROWS], tl.float32)
    for start in tl.range(0, num_inputs, WARPS * COLS, num_stages=STAGES):
        if EVEN:
            weights = tl.load(weight_at + start, mask=keep_rows, other=0.0)
            values = tl.load(x_at + start, mask=keep_tokens, other=0.0)
        else:
            keep = (start + cols < num_inputs)[:, None, :]
            weights = tl.load(weight_at + start, mask=keep_rows & keep, other=0.0)
            values = tl.load(x_at + start, mask=keep_tokens & keep, other=0.0)
        acc = tl.dot(values, tl.permute(weights, (0, 2, 1)), acc, input_precision="ieee")
    sums = tl.sum(acc, axis=0)
    keep = (rows < num_outputs)[None, :]
    if BIAS:
        sums += tl.load(bias + rows[None, :], mask=keep, other=0.0).to(tl.float32)
    out_at = out + tokens[:, None] * num_outputs + rows[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=(tokens < num_tokens)[:, None] & keep)


def skinny_matmul(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    settled: bool = False,
    rows: int | None = None,
    parts: int | None = None,
    num_warps: int = 4,
    num_stages: int = 4,
    overlap: bool | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for at most :data:`MAX_ROWS` rows, summed in float32 and rounded once.

    x_TI, weight_OI   ``[T, I]`` and ``[O, I]`` of one dtype; rows may be strided
    bias_O            ``[O]`` of that dtype
    settled           the kernel launched just before this one does not write the weight, so it may be read early
    rows              output features of one program, a power of two
    parts             one row of x: stretches of 256 * num_warps input features that are in flight together
    num_warps, num_stages, overlap   Triton's launch parameters, and whether to start before the kernel ahead is done
                      (default: where the device can)

    Returns ``[T, O]``, contiguous. Raises ``ValueError`` for dtypes other than bfloat16, float16, float32 and for more rows.
    """
    check_kernel_inputs(x=x_TI, weight=weight_OI)
    num_tokens, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    if num_tokens > MAX_ROWS or weight_OI.dtype != x_TI.dtype or weight_OI.shape[1] != num_inputs:
        raise ValueError(
            f"x {tuple(x_TI.shape)} {x_TI.dtype} by weight {tuple(weight_OI.shape)} {weight_OI.dtype}: one dtype and "
            f"number of input features is asked for, and at most {MAX_ROWS} rows of x; use torch's linear for others"
        )
    out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    if out_TO.numel() == 0:
        return out_TO
    overlap = may_overlap(x_TI, overlap)
    # An argument that a variant never reads still needs a tensor in its place.
    bias = out_TO if bias_O is None else bias_O.contiguous()
    if num_tokens == 1:
        cols = 32 * num_warps * (_LANE_BYTES // x_TI.element_size())
        # Measured in captured decode steps: long rows are read best by many small programs, short ones by few large ones,
        # which have more on its way when the kernel ahead is done.
        parts = parts or (2 if num_inputs >= _LONG_ROW else min(4, next_power_of_2(cdiv(num_inputs, cols))))
        rows = rows or (2 if num_inputs >= _LONG_ROW else _rows_for_one(num_outputs, parts))
        _one_row_kernel[(cdiv(num_outputs, rows),)](
            x_TI, weight_OI, bias, out_TO, num_inputs, num_outputs, weight_OI.stride(0),
            rows, parts, cols, num_inputs % (parts * cols) == 0, num_inputs > parts * cols,
            bias_O is not None, settled, overlap,
            num_warps=num_warps, **early_launch(overlap),
        )  # fmt: skip
    else:
        rows = rows or (16 if num_outputs < 64 * _NUM_SMS else 32)
        cols = 128 // x_TI.element_size()
        _few_rows_kernel[(cdiv(num_outputs, rows),)](
            x_TI, weight_OI, bias, out_TO, num_tokens, num_inputs, num_outputs, x_TI.stride(0), weight_OI.stride(0),
            MAX_ROWS, rows, num_warps, cols, num_stages, num_inputs % (num_warps * cols) == 0, bias_O is not None, overlap,
            num_warps=num_warps, **early_launch(overlap),
        )  # fmt: skip
    return out_TO


def _rows_for_one(num_outputs: int, parts: int) -> int:
    """Rows of the weight for a program: as many as its registers hold, but enough programs for all multiprocessors."""
    rows = 8 if parts <= 2 else 4
    while rows > 1 and num_outputs < rows * 3 * _NUM_SMS // 2:
        rows //= 2
    return rows


def skinny_matmul_torch(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain-torch twin of :func:`skinny_matmul`, for any number of rows; float64 input is computed in float64."""
    dtype = compute_dtype(x_TI)
    y_TO = x_TI.to(dtype) @ weight_OI.to(dtype).T
    return (y_TO if bias_O is None else y_TO + bias_O.to(dtype)).to(x_TI.dtype)

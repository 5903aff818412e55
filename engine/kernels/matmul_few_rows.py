"""``y = x @ W.T + b`` for 2 to 256 rows of ``x``: launched early, with its weights on the way before it waits.

Such a product takes a few microseconds, most of which are what it takes to bring ``W`` from memory. A kernel that is launched
as :mod:`engine.kernels.overlap` describes has nothing to do until its inputs are there, but a settled weight can come to the
L2 cache meanwhile: each program asks for its part of it, or for the beginning, and waits then.

Each program has some output features and some rows, and sums over all input features. Nothing is split over programs, so the
same inputs give the same bits, run after run. A program may have the gates and the ups of the same features, and multiply them:
``silu(gate) * up`` then needs no launch of its own.
"""

from typing import NamedTuple

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, next_power_of_2, tl, triton
from engine.kernels.gemv import gemv_torch as matmul_few_rows_torch
from engine.kernels.overlap import LINE_BYTES, early_launch, fetch_lines, may_overlap, wait_for_inputs
from engine.kernels.silu_mul import silu_mul_16

__all__ = ["MAX_ROWS", "Tiles", "matmul_few_rows", "matmul_few_rows_torch", "tiles_for"]

# Shape suffixes: T = tokens (rows of x), I = input features, O = output features


class Tiles(NamedTuple):
    """How the product is cut: rows, output features and input features of a step, and Triton's launch parameters."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int = 4
    num_stages: int = 4
    weight_first: bool = True
    """Output features are the rows of what the tensor cores compute: those take 64 rows at a time, and 8 columns."""
    fetch: int = 512
    """Input features of a settled weight, at most, that are asked for before the inputs are there."""


_ALL = 2**14
_TILES: dict[int, dict[int, Tiles]] = {
    16: {3072: Tiles(16, 64, 256, num_stages=3, fetch=_ALL), 6144: Tiles(16, 64, 256, num_stages=3)},
    32: {1024: Tiles(16, 64, 256, num_stages=3, fetch=_ALL), 3072: Tiles(32, 64, 256, num_stages=3, fetch=_ALL),
         6144: Tiles(32, 64, 256, num_stages=3)},
    64: {2048: Tiles(64, 16, 256, num_stages=3, weight_first=False, fetch=_ALL), 4096: Tiles(64, 32, 128, weight_first=False),
         6144: Tiles(64, 64, 128, fetch=0)},
    128: {1024: Tiles(64, 16, 256, num_stages=3, weight_first=False), 2048: Tiles(64, 32, 128, weight_first=False, fetch=0),
          4096: Tiles(64, 64, 128, fetch=0)},
    256: {1024: Tiles(64, 32, 256, num_stages=3, weight_first=False), 2048: Tiles(64, 64, 128, fetch=0)},
}
"""For up to so many rows, and up to so many output features."""
_GATED_TILES: dict[int, Tiles] = {
    16: Tiles(16, 64, 256, num_stages=3), 32: Tiles(32, 64, 128), 64: Tiles(64, 32, 128, weight_first=False),
    128: Tiles(128, 64, 128, num_warps=8, num_stages=3, weight_first=False, fetch=0),
    256: Tiles(128, 128, 64, num_warps=8, fetch=0),
}
"""For up to so many rows, of the one shape that was looked at and what is little smaller."""
_MIN_GATED_OUTPUTS = 4097
_MAX_INPUTS, _MAX_WEIGHTS = 3072, 6144 * 1024
MAX_ROWS = max(_TILES)


def tiles_for(num_rows: int, num_outputs: int, num_inputs: int, *, gated: bool = False) -> Tiles | None:
    """Tiles with which the product is faster than cuBLAS's in captured decode steps of an H200; None where there are none.

    gated   with ``silu(gate) * up`` behind it
    """
    if num_inputs > _MAX_INPUTS or num_outputs * num_inputs > _MAX_WEIGHTS:
        return None
    if gated:
        fitting = (tiles for most, tiles in _GATED_TILES.items() if num_rows <= most and num_outputs >= _MIN_GATED_OUTPUTS)
        return next(fitting, None)
    by_outputs = next((of for most, of in _TILES.items() if num_rows <= most), {})
    return next((tiles for most, tiles in by_outputs.items() if num_outputs <= most), None)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x, weight, bias, out, num_rows, num_inputs, num_outputs, x_stride, weight_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, FETCH: tl.constexpr, LINE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per (OUTPUTS output features, ROWS rows); INPUTS input features at a time. With EVEN, that divides them.

    With GATED, the OUTPUTS are half gates and half ups.
    """
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    if GATED:  # feature after feature, its gate and its up
        outputs = outputs // 2 + outputs % 2 * (num_outputs // 2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, INPUTS)
    weight_at = weight + outputs.to(tl.int64)[:, None] * weight_stride
    keep_outputs, keep_rows = (outputs < num_outputs)[:, None], (rows < num_rows)[:, None]
    if FETCH:
        fetch_lines(weight_at, keep_outputs, num_inputs, FETCH, LINE)
    wait_for_inputs(OVERLAP)
    weight_at += cols[None, :]
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + cols[None, :]
    if WEIGHT_FIRST:
        acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, num_inputs, INPUTS):
        # Rows past the last are not read: were it the last one instead, all programs would ask one place for it again and again.
        if EVEN:
            weights = tl.load(weight_at + start, mask=keep_outputs, other=0.0)
            values = tl.load(x_at + start, mask=keep_rows, other=0.0)
        else:
            keep = (start + cols < num_inputs)[None, :]
            weights = tl.load(weight_at + start, mask=keep & keep_outputs, other=0.0)
            values = tl.load(x_at + start, mask=keep & keep_rows, other=0.0)
        if WEIGHT_FIRST:
            acc = tl.dot(weights, tl.trans(values), acc)
        else:
            acc = tl.dot(values, tl.trans(weights), acc)
    if WEIGHT_FIRST:
        acc = tl.trans(acc)
    if BIAS:
        acc += tl.load(bias + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[None, :]
    product = acc.to(out.dtype.element_ty)
    if GATED:
        gate, up = tl.split(tl.reshape(product.to(tl.float32), [ROWS, OUTPUTS // 2, 2]))
        values = silu_mul_16(gate, up)
        features = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * (num_outputs // 2) + features, values.to(out.dtype.element_ty),
                 mask=keep_rows & (features < num_outputs // 2))  # fmt: skip
    else:
        keep = keep_rows & (outputs < num_outputs)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :], product, mask=keep)


def matmul_few_rows(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    tiles: Tiles,
    gated: bool = False,
    settled: bool = False,
    overlap: bool | None = None,
    out_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once.

    x_TI, weight_OI   ``[T, I]`` and ``[O, I]``, both bfloat16 or both float16; rows may be strided
    bias_O            ``[O]`` of that dtype
    tiles             powers of two from 16 on
    gated             output features are gates, then as many ups, of which ``silu(gate) * up`` is given, with the bits of
                      :func:`engine.kernels.silu_mul.silu_mul` on the product
    settled           the kernel launched just before this one does not write the weight, so it may be read early
    overlap           whether to start before the kernel ahead is done (default: where the device can)
    out_TO            where to write, contiguous; allocated if None

    Returns ``[T, O]``, gated ``[T, O / 2]``, contiguous. Raises ``ValueError`` for other dtypes and for shapes that do not fit.
    """
    check_kernel_inputs(x=x_TI, weight=weight_OI)
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    if x_TI.dtype is torch.float32 or weight_OI.dtype != x_TI.dtype or weight_OI.shape[1] != num_inputs:
        raise ValueError(
            f"x {tuple(x_TI.shape)} {x_TI.dtype} by weight {tuple(weight_OI.shape)} {weight_OI.dtype}: one 16-bit dtype and "
            "one number of input features is asked for; use torch's linear for others"
        )
    if out_TO is None:
        out_TO = torch.empty((num_rows, num_outputs // 2 if gated else num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    if out_TO.numel() == 0:
        return out_TO
    overlap = may_overlap(x_TI, overlap)
    line = LINE_BYTES // x_TI.element_size()
    fetch = next_power_of_2(cdiv(min(num_inputs, tiles.fetch), line)) if settled and overlap and tiles.fetch else 0
    # An argument that a variant never reads still needs a tensor in its place.
    bias = out_TO if bias_O is None else bias_O.contiguous()
    _few_rows_kernel[(cdiv(num_outputs, tiles.outputs), cdiv(num_rows, tiles.rows))](
        x_TI, weight_OI, bias, out_TO, num_rows, num_inputs, num_outputs, x_TI.stride(0), weight_OI.stride(0),
        tiles.rows, tiles.outputs, tiles.inputs, num_inputs % tiles.inputs == 0, tiles.weight_first,
        bias_O is not None, gated, fetch, line, overlap,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **early_launch(overlap),
    )  # fmt: skip
    return out_TO

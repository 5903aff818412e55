"""Log-softmax of a row in an order that the row's length alone fixes: torch's depends on where in memory the row starts."""

import torch

from engine.kernels.common import check_kernel_inputs, compute_dtype, tl, triton

# Shape suffixes: L = rows, V = vocabulary

_TILE = 4096


@triton.jit
def _log_softmax_kernel(x, out, num_columns, TILE: tl.constexpr):
    """One program per row: its largest element, the sum of exponentials lane by lane and then over the lanes, the result."""
    row = tl.program_id(0).to(tl.int64) * num_columns
    columns = tl.arange(0, TILE)
    tops = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, num_columns, TILE):
        values = tl.load(x + row + start + columns, mask=start + columns < num_columns, other=float("-inf"))
        tops = tl.maximum(tops, values.to(tl.float32))
    top = tl.max(tops, axis=0)
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, num_columns, TILE):
        values = tl.load(x + row + start + columns, mask=start + columns < num_columns, other=float("-inf"))
        sums += tl.exp(values.to(tl.float32) - top)
    log_sum = tl.log(tl.sum(sums, axis=0))
    for start in range(0, num_columns, TILE):
        keep = start + columns < num_columns
        values = tl.load(x + row + start + columns, mask=keep, other=0.0)
        tl.store(out + row + start + columns, values.to(tl.float32) - top - log_sum, mask=keep)


def log_softmax(x_LV: torch.Tensor) -> torch.Tensor:
    """``log_softmax`` over the last dimension, ``[L, V]``, in float32.

    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32.
    """
    check_kernel_inputs(x=x_LV)
    x_LV = x_LV.contiguous()
    out_LV = torch.empty(x_LV.shape, dtype=torch.float32, device=x_LV.device)
    if out_LV.numel():
        _log_softmax_kernel[(x_LV.shape[0],)](x_LV, out_LV, x_LV.shape[1], _TILE, num_warps=8, enable_fp_fusion=False)
    return out_LV


def log_softmax_torch(x_LV: torch.Tensor) -> torch.Tensor:
    """Plain-torch twin of :func:`log_softmax`; float64 input is computed in float64."""
    return x_LV.to(compute_dtype(x_LV)).log_softmax(dim=-1)

"""The gate of a SwiGLU MLP (Shazeer, 2020): ``silu(gate) * up``."""

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

# Shape suffixes: T = tokens, I = intermediate features on this rank, G = 2 * I

_MAX_TILE = 1024


@triton.jit
def _one_plus_exp(x):
    """``1 + e ** x`` in float32 within 6 units of roundoff, for any x.

    ``tl.exp(x)`` is the hardware's ``2 ** (x * log2(e))``, good to 2 ulp; but the rounded product, as an exponent, makes a
    relative error that grows with ``|x|`` ((2 + 1.2 |x|) ulp, says CUDA's table for its twin ``__expf``). So what the product
    lost, and what the constant lost, is multiplied in again: ``2 ** lost = 1 + lost * ln(2)``, as ``lost`` is below 1e-5.
    """
    x = tl.minimum(tl.maximum(x, -110.0), 110.0)  # where the power is 0 and infinite; an infinite x would leave inf - inf
    product = x * 1.4426950216293335  # log2(e), the float32 nearest to it
    lost = tl.fma(x, 1.4426950216293335, -product) + x * 1.925963033500981e-08
    return tl.fma(tl.exp2(product), tl.fma(lost, 0.6931471805599453, 1.0), 1.0)


@triton.jit
def silu_mul_16(gate, up):
    """``silu(gate) * up`` of float32, to be rounded to 16 bits: that hides the error of the fast exponential."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_mul_kernel(gate_up, out, row_stride, INTERMEDIATE: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    """One program per row and tile of columns."""
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = cols < INTERMEDIATE
    gate = tl.load(gate_up + row * row_stride + cols, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + INTERMEDIATE + cols, mask=keep, other=0.0).to(tl.float32)
    if out.dtype.element_ty == tl.float32:
        values = tl.div_rn(gate, _one_plus_exp(-gate)) * up
    else:
        values = silu_mul_16(gate, up)
    tl.store(out + row * INTERMEDIATE + cols, values.to(out.dtype.element_ty), mask=keep)


def silu_mul(gate_up_TG: torch.Tensor, *, overlap: bool | None = None) -> torch.Tensor:
    """``silu(gate) * up`` in float32, rounded once: ``[T, 2 * I]`` (gate first, then up) to ``[T, I]``.

    overlap   whether to launch as :mod:`engine.kernels.overlap` describes; by default, where the device can

    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32.
    """
    check_kernel_inputs(gate_up=gate_up_TG)
    num_tokens, intermediate = gate_up_TG.shape[0], gate_up_TG.shape[1] // 2
    out_TI = torch.empty((num_tokens, intermediate), dtype=gate_up_TG.dtype, device=gate_up_TG.device)
    if out_TI.numel():
        overlap = may_overlap(gate_up_TG, overlap)
        tile = min(_MAX_TILE, next_power_of_2(intermediate))
        _silu_mul_kernel[(num_tokens, cdiv(intermediate, tile))](
            gate_up_TG, out_TI, gate_up_TG.stride(0), intermediate, tile, overlap,
            num_warps=max(1, tile // 256), **early_launch(overlap),
        )  # fmt: skip
    return out_TI


def silu_mul_torch(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """Plain-torch twin of :func:`silu_mul`; float64 input is computed in float64."""
    gate, up = gate_up_TG.to(compute_dtype(gate_up_TG)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_TG.dtype)

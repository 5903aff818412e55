"""The gate of a SwiGLU MLP (Shazeer, 2020): ``silu(gate) * up``."""

import torch

from engine.kernels.common import cdiv, check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton

# Shape suffixes: T = tokens, I = intermediate features on this rank, G = 2 * I

_MAX_TILE = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, row_stride, INTERMEDIATE: tl.constexpr, TILE: tl.constexpr):
    """One program per row and tile of columns."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = cols < INTERMEDIATE
    gate = tl.load(gate_up + row * row_stride + cols, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + INTERMEDIATE + cols, mask=keep, other=0.0).to(tl.float32)
    values = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * INTERMEDIATE + cols, values.to(out.dtype.element_ty), mask=keep)


def silu_mul(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in float32, rounded once: ``[T, 2 * I]`` (gate first, then up) to ``[T, I]``.

    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32.
    """
    check_kernel_inputs(gate_up=gate_up_TG)
    num_tokens, intermediate = gate_up_TG.shape[0], gate_up_TG.shape[1] // 2
    out_TI = torch.empty((num_tokens, intermediate), dtype=gate_up_TG.dtype, device=gate_up_TG.device)
    if out_TI.numel():
        tile = min(_MAX_TILE, next_power_of_2(intermediate))
        _silu_mul_kernel[(num_tokens, cdiv(intermediate, tile))](
            gate_up_TG, out_TI, gate_up_TG.stride(0), intermediate, tile, num_warps=max(1, tile // 256)
        )
    return out_TI


def silu_mul_torch(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """Plain-torch twin of :func:`silu_mul`; float64 input is computed in float64."""
    gate, up = gate_up_TG.to(compute_dtype(gate_up_TG)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_TG.dtype)

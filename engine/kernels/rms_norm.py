"""RMSNorm (Zhang and Sennrich, 2019), alone and fused with the residual addition before it."""

from __future__ import annotations

import torch

from engine.kernels.common import compute_dtype, next_power_of_2, tl, triton


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Plain-torch twin of :func:`rms_norm`; float64 input is computed in float64 throughout."""
    x_wide = x.to(compute_dtype(x))
    inverse_rms = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    return (x_wide * inverse_rms * weight.to(x_wide.dtype)).to(x.dtype)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch twin of :func:`add_rms_norm`; float64 input is computed in float64 throughout."""
    # Adding two tensors of one dtype is float32 addition with one rounding for the 16-bit types: what the kernel does.
    new_residual = x + residual
    return rms_norm_torch(new_residual, weight, eps), new_residual

"""The gate of a SwiGLU MLP (Shazeer, 2020): ``silu(gate) * up``."""

from __future__ import annotations

import torch

from engine.kernels.common import cdiv, compute_dtype, tl, triton


def silu_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """Plain-torch twin of :func:`silu_mul`; float64 input is computed in float64."""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

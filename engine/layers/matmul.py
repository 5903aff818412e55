"""The one place that chooses a matmul kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels.common import HAVE_TRITON
from engine.kernels.skinny_matmul import skinny_matmul

MOST_ROWS = 1
"""With more, cuBLAS was faster on an H200: a decode step of 8 sequences took 1.58 ms against 1.83."""


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, ``[T, I]`` by ``[O, I]`` to ``[T, O]``, in the operands' dtype.

    A parameter may be read before the kernels ahead of this one are done: who writes into one must not launch this next.
    """
    if is_skinny(x_TI, weight_OI):
        return skinny_matmul(x_TI, weight_OI, bias_O, settled=isinstance(weight_OI, nn.Parameter))
    return F.linear(x_TI, weight_OI, bias_O)


def is_skinny(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether time is what it takes to read the weight, and whether our kernel reads it well."""
    return (
        HAVE_TRITON and x_TI.is_cuda and 0 < x_TI.shape[0] <= MOST_ROWS
        and x_TI.dtype in (torch.bfloat16, torch.float16) and x_TI.dtype == weight_OI.dtype
        # Rows that start on no 16 bytes are read element by element.
        and weight_OI.stride() == (weight_OI.shape[1], 1) and weight_OI.shape[1] % 16 == 0
        and x_TI.stride(1) == 1 and x_TI.stride(0) % 16 == 0 and x_TI.data_ptr() % 16 == 0
    )

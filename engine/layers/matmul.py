"""The one place that chooses a matmul kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, ``[T, I]`` by ``[O, I]`` to ``[T, O]``, in the operands' dtype."""
    return F.linear(x_TI, weight_OI, bias_O)

"""Kernel or twin: decided here, by where a tensor lives.

Every Triton kernel has a plain-torch twin with the same arguments. The kernels compute in float32, so float64 stays with
the twins everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])


def pick(x: Tensor, kernel: Function, twin: Function) -> Function:
    """The function to call on ``x``."""
    return kernel if x.is_cuda and x.dtype is not torch.float64 else twin

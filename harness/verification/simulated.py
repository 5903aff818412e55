"""Rounding errors put into an exact computation: how far off any correct model of a dtype may be (Monte Carlo arithmetic).

Each matrix product of a float64 model gets an error of the size that rounding gives it in the dtype, in any order of summation
(``budgets.sum_variance``), and so does each sum and product of two tensors element by element, drawn from a normal
distribution (Parker 1997). What that makes of the model's outputs shows which tokens magnify rounding, whatever the machine; a
real model of that dtype is one such draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.verification.budgets import UNIT_ROUNDOFF, sum_variance
from reference.modes import DispatchMode

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)
_ELEMENTWISE = (_aten.add.Tensor, _aten.mul.Tensor, _aten.silu.default)
_MADE_OF_PRODUCTS = (_aten.linear.default, _aten.matmul.default)


class EveryProduct(DispatchMode):
    """Within it, in this thread, each matrix product of one of ``dtypes`` is ``product``'s."""

    dtypes: tuple[torch.dtype, ...]

    def product(self, func: Any, a: Tensor, b: Tensor, addend: Tensor | None) -> Tensor:
        """``func`` is aten's mm, bmm or addmm; only the last one has an ``addend``, its first argument."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func in _PRODUCTS and not kwargs and args[-1].dtype in self.dtypes:
            *addend, a, b = args
            return self.product(func, a, b, *addend or (None,))
        if func in _MADE_OF_PRODUCTS:  # in inference mode they arrive whole
            with self:
                return func.decompose(*args, **kwargs or {})
        return func(*args, **kwargs or {})


class SimulatedRounding(EveryProduct):
    """Products and elementwise results of float64 come out with the error that ``dtype`` would give them."""

    dtypes = (torch.float64,)

    def __init__(self, dtype: str, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.seed = seed
        # How large an error is need not be known to more digits.
        self._work = torch.float64 if dtype == "float64" else torch.float32
        self._generators: dict[torch.device, torch.Generator] = {}

    def product(self, func: Any, a: Tensor, b: Tensor, addend: Tensor | None) -> Tensor:
        """Right but for rounding."""
        operands = (a, b) if addend is None else (addend, a, b)
        result: Tensor = func(*operands)
        squares = func(*(x.to(self._work).square_() if x.dtype is not self._work else x.square() for x in operands))
        variance = sum_variance(squares, result.to(self._work), self.dtype, addends=a.shape[-1] + len(operands) - 2)
        return result + variance.sqrt_().mul_(self._drawn(result))

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # Not where a number is added to a tensor, as the eps of a norm: that is computed in float32 at least.
        if func in _ELEMENTWISE and result.dtype in self.dtypes and all(isinstance(x, Tensor) for x in args):
            return result * (1 + self._drawn(result).double() * (UNIT_ROUNDOFF[self.dtype] / math.sqrt(3)))
        return result

    def _drawn(self, like: Tensor) -> Tensor:
        """Normal values of its shape."""
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(self.seed)
        return torch.randn(like.shape, generator=self._generators[like.device], dtype=self._work, device=like.device)

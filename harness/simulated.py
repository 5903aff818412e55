"""Rounding errors put into an exact computation: how far off any correct model of a dtype may be (Monte Carlo arithmetic).

Each matrix product of a float64 model gets an error of the size that rounding gives it in the dtype, in any order of summation
(``harness.budgets.sum_variance``), and so does each sum and product of two tensors element by element, drawn from a normal
distribution (Parker 1997). What that makes of the model's outputs shows which tokens magnify rounding, whatever the machine; a
real model of that dtype is one such draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.budgets import UNIT_ROUNDOFF, sum_variance

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)
_ELEMENTWISE = (_aten.add.Tensor, _aten.mul.Tensor, _aten.silu.default)
_MADE_OF_PRODUCTS = (_aten.linear.default, _aten.matmul.default)


class EveryProduct(TorchDispatchMode):
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
    """Products of float64 come out with the error that ``dtype`` would give them."""

    dtypes = (torch.float64,)

    def __init__(self, dtype: str, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def product(self, func: Any, a: Tensor, b: Tensor, addend: Tensor | None) -> Tensor:
        """Right but for rounding."""
        added = () if addend is None else (addend,)
        result: Tensor = func(*added, a, b)
        squares = func(*(x.square() for x in added), a.square(), b.square())
        return self._rounded(result, sum_variance(squares, result, self.dtype, addends=a.shape[-1] + len(added)))

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # Not where a number is added to a tensor, as the eps of a norm: that is computed in float32 at least.
        if func in _ELEMENTWISE and result.dtype in self.dtypes and all(isinstance(x, Tensor) for x in args):
            return self._rounded(result, (UNIT_ROUNDOFF[self.dtype] * result).square() / 3)
        return result

    def _rounded(self, result: Tensor, variance: Tensor) -> Tensor:
        if result.device not in self._generators:
            self._generators[result.device] = torch.Generator(result.device).manual_seed(self.seed)
        drawn = torch.randn(result.shape, generator=self._generators[result.device], dtype=result.dtype, device=result.device)
        # A mask's minus infinity stays what it is.
        return torch.where(result.isfinite(), result + variance.sqrt() * drawn, result)

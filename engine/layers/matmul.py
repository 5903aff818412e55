"""The one place that chooses a matmul kernel."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels.common import HAVE_TRITON
from engine.kernels.gemv import HalfNormed, gemv, gemv_add_norm
from engine.kernels.matmul_few_rows import MAX_ROWS, matmul_few_rows, tiles_for
from engine.kernels.overlap import may_overlap

_FEW_ROWS = 8  # on a CPU


def linear(x: Tensor | HalfNormed, weight_OI: Tensor, bias_O: Tensor | None = None, *, out_TO: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, ``[T, I]`` by ``[O, I]`` to ``[T, O]``, in the operands' dtype.

    A parameter may be read before the kernels ahead of this one are done: who writes into one must not launch this next.
    A row whose norm is half done is for layers that :func:`fuses_norm` names. ``out_TO``, contiguous, is where to write; there is
    no bias then.
    """
    settled = isinstance(weight_OI, nn.Parameter)
    if isinstance(x, HalfNormed):
        return gemv(x, weight_OI, bias_O, settled=settled)
    x_TI = x
    if is_ours(x_TI, weight_OI):
        if x_TI.shape[0] == 1:
            return gemv(x_TI, weight_OI, bias_O, settled=settled, out_TO=out_TO)
        # Launched in turn, as on older GPUs, it is no faster than cuBLAS.
        tiles = tiles_for(x_TI.shape[0], *weight_OI.shape) if may_overlap(x_TI) else None
        if tiles is not None:
            return matmul_few_rows(x_TI, weight_OI, bias_O, tiles=tiles, settled=settled, out_TO=out_TO)
    if out_TO is not None:
        assert bias_O is None, "a product that is written elsewhere is a part of a sum over the ranks"
        return torch.mm(x_TI, weight_OI.t(), out=out_TO)
    if (x_TI.device.type == "cpu" and x_TI.dtype is torch.float32 and 1 <= x_TI.shape[0] <= _FEW_ROWS
            and prefers_weight_first()):
        return _linear_of_few_rows(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


class Product(NamedTuple):
    """A product that its layer leaves to who takes it, for both to be one launch."""

    x: Tensor | HalfNormed
    weight_OI: Tensor
    bias_O: Tensor | None = None

    def whole(self) -> Tensor:
        """``[T, O]``, in a launch of its own."""
        return linear(*self)

    def silu_mul(self) -> Tensor:
        """``silu(gate) * up`` of a product that is gates, then as many ups. Where :func:`fuses_silu_mul` says so."""
        settled = isinstance(self.weight_OI, nn.Parameter)
        if isinstance(self.x, HalfNormed) or self.x.shape[0] == 1:
            return gemv(*self, gated=True, settled=settled)
        tiles = tiles_for(self.x.shape[0], *self.weight_OI.shape, gated=True)
        assert tiles is not None, "fuses_silu_mul says no"
        return matmul_few_rows(self.x, self.weight_OI, self.bias_O, gated=True, tiles=tiles, settled=settled)

    def add_norm(self, residual_TO: Tensor, norm_weight_O: Tensor, eps: float) -> tuple[HalfNormed, Tensor]:
        """``add_rms_norm`` of it but for the division by the row's rms, and the new residual; where :func:`fuses_norm` says."""
        assert isinstance(self.x, Tensor), "a norm stands ahead of this product"
        assert self.bias_O is None, "a row-parallel layer with a bias gives its whole output"
        return gemv_add_norm(self.x, self.weight_OI, residual_TO, norm_weight_O, eps,
                             settled=isinstance(self.weight_OI, nn.Parameter))


def fuses_silu_mul(x: Tensor | HalfNormed, weight_OI: Tensor) -> bool:
    """Whether ``silu(gate) * up`` behind ``linear(x, weight)`` is faster in its launch."""
    if isinstance(x, HalfNormed):
        return True
    return is_ours(x, weight_OI) and may_overlap(x) and (
        x.shape[0] == 1 or tiles_for(x.shape[0], *weight_OI.shape, gated=True) is not None)


def fuses_norm(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether half of a norm behind or ahead of ``linear(x, weight)`` is faster in its launch: of one row, if of any.

    Not divided, values may be too large for float16.
    """
    return x_TI.shape[0] == 1 and x_TI.dtype is torch.bfloat16 and is_ours(x_TI, weight_OI) and may_overlap(x_TI)


def is_ours(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether our kernels for one row and for few read these well."""
    return (
        HAVE_TRITON and x_TI.is_cuda and 1 <= x_TI.shape[0] <= MAX_ROWS
        and x_TI.dtype in (torch.bfloat16, torch.float16) and x_TI.dtype == weight_OI.dtype
        # Rows that start on no 16 bytes are read element by element.
        and weight_OI.stride() == (weight_OI.shape[1], 1) and weight_OI.shape[1] % 16 == 0
        and x_TI.stride(1) == 1 and x_TI.stride(0) % 16 == 0 and x_TI.data_ptr() % 16 == 0
    )


@cache
def prefers_weight_first() -> bool:
    """Whether this CPU multiplies few float32 rows faster with the weight first: those of AMD do, by MKL.

    Milliseconds a token of SmolLM2 at batch 1, 4 and 8: an Intel Xeon with AVX-512 takes 109, 110 and 112 so, 63, 92 and 117
    with the rows first; an AMD EPYC is 1.64, 1.73 and 1.25 times as fast so.
    """
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _linear_of_few_rows(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same with the weight first: so MKL reads it from memory up to three times as fast in float32. One row is put in twice.

    Rows and milliseconds on two cores of an EPYC, 425 MB of weights: 1: 22 for 37, 2: 22 for 65, 4: 27 for 49, 8: 34 for 43;
    from 12 on nothing is gained, nor in bfloat16. One row by a weight that is in the cache, as a model's never is, loses.
    """
    num_rows = x_TI.shape[0]
    wide_TI = x_TI.repeat(2, 1) if num_rows == 1 else x_TI
    y_TO = (weight_OI @ wide_TI.T)[:, :num_rows].T.contiguous()
    return y_TO if bias_O is None else y_TO + bias_O

"""RMSNorm (Zhang and Sennrich 2019), with the residual addition before it where a layer has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from engine.layers.dispatch import pick
from engine.layers.matmul import Product, fuses_norm
from engine.parallel.group import PartialSum
from engine.parallel.parameter import ShardParameter, replicated_loader


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in float32 (float64 for float64), rounded once.

    x, residual   [T, hidden]    whole on every rank
    weight        [hidden]       whole on every rank; no collective

    ``followed_by`` names the linear layer that takes the norm, where nothing else does: it may be left to do the rest.
    """

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.eps = eps
        self.followed_by: tuple[Any, ...] = ()
        self.weight = ShardParameter((hidden_size,), dtype=dtype, device=device, weight_loader=replicated_loader)

    def forward(self, x: Any, residual: Tensor | None = None) -> tuple[Any, Tensor]:
        """Returns the norm of ``x + residual`` and that sum, the residual of what follows.

        ``x`` is a tensor, a ``PartialSum``, which takes one all-reduce, or a ``Product``, whose norm may be a ``HalfNormed``.
        """
        if isinstance(x, Product):
            assert residual is not None, "a row-parallel layer stands behind a residual"
            if self._may_be_half_done(residual):
                return x.add_norm(residual, self.weight, self.eps)
            x = x.whole()
        if isinstance(x, PartialSum):
            assert residual is not None, "a row-parallel layer stands behind a residual"
            return x.add_norm(residual, self.weight, self.eps)
        if residual is None:
            return pick(x, rms_norm, rms_norm_torch)(x, self.weight, self.eps, settled=True), x
        return pick(x, add_rms_norm, add_rms_norm_torch)(x, residual, self.weight, self.eps, settled=True)

    def _may_be_half_done(self, residual: Tensor) -> bool:
        # Who looks by a hook is to see all of a norm.
        return not self._forward_hooks and any(
            not layer._forward_pre_hooks and not layer._forward_hooks and fuses_norm(residual, layer.weight)
            for layer in self.followed_by)

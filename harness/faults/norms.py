"""Faults in the constant that norms add to the mean square: nothing shows them where hidden states are near 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.layers.norm import RMSNorm
from engine.models.decoder import SelfAttention
from engine.parallel.group import TPGroup
from harness.faults.base import Patches, around, fault
from harness.faults.layers import BEFORE_O_PROJ

FIRST_NORM = "model.layers.0.input_layernorm"


def _with_eps(patch: Patches, eps_of: Callable[[float], float]) -> None:
    """``eps_of(the config's)`` in every norm."""

    @patch.around(RMSNorm, "__init__")
    def init(original: Any, self: RMSNorm, hidden_size: int, eps: float, **options: Any) -> None:
        original(self, hidden_size, eps_of(eps), **options)


@fault(checks=("logits",), module=FIRST_NORM)
def eps_a_tenth(patch: Patches, tp: TPGroup) -> None:
    """Every norm has a tenth of the config's eps."""
    _with_eps(patch, lambda eps: eps / 10)


@fault(layout="qwen2", checks=("logits",), module=FIRST_NORM)
def eps_by_default(patch: Patches, tp: TPGroup) -> None:
    """The config's eps is not read: every norm has the 1e-6 that is its class's default elsewhere."""
    _with_eps(patch, lambda eps: 1e-6)


@fault(layout="qwen3", checks=("logits",), module=BEFORE_O_PROJ)
@around(SelfAttention, "__init__")
def head_norms_with_another_eps(original: Any, self: SelfAttention, *arguments: Any, **options: Any) -> None:
    """The norms of queries and keys have a tenth of the config's eps, the others the whole of it."""
    original(self, *arguments, **options)
    for norm in (self.q_norm, self.k_norm):
        if norm is not None:
            norm.eps /= 10

"""What a decoder is built of: the one switch between ordinary layers and TP-invariant ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.kernels.silu_mul import silu_mul, silu_mul_torch
from engine.layers.attention import Attention
from engine.layers.attention_backends import select_backend
from engine.layers.attention_layout import AttentionBackend, AttentionLayout
from engine.layers.dispatch import pick
from engine.layers.matmul import Product
from engine.layers.norm import RMSNorm
from engine.parallel.embedding import ParallelLMHead
from engine.parallel.group import TPGroup
from engine.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Layers and functions that ``DecoderForCausalLM`` and its runner take.

    row        takes, beside ``RowParallelLinear``'s arguments, the width of the ``leaf`` between which ranks are cut
    features   (number of features, leaf, group) -> this rank's part of an MLP's features; None: its layers cut them
    backend    (name, layout) -> attention over the cache
    rope_options, drawing   further arguments of ``rope_tables``, and of the sampler's functions
    """

    merged: type[MergedColumnParallelLinear]
    qkv: type[QKVParallelLinear]
    row: Callable[..., RowParallelLinear]
    head: type[ParallelLMHead]
    norm: type[RMSNorm]
    attention: type[Attention]
    silu_mul: Callable[[Any], Tensor]
    features: Callable[[int, int, TPGroup], range | None]
    backend: Callable[[str, AttentionLayout], AttentionBackend]
    rope_options: Mapping[str, Any]
    drawing: Mapping[str, Any]


def _row(*sizes: int, leaf: int, **options: Any) -> RowParallelLinear:
    del leaf  # ranks are cut anywhere
    return RowParallelLinear(*sizes, **options)


def _silu_mul(gate_up_TG: Tensor | Product) -> Tensor:
    if isinstance(gate_up_TG, Product):
        return gate_up_TG.silu_mul()
    return pick(gate_up_TG, silu_mul, silu_mul_torch)(gate_up_TG)


ORDINARY = Parts(merged=MergedColumnParallelLinear, qkv=QKVParallelLinear, row=_row, head=ParallelLMHead, norm=RMSNorm,
                 attention=Attention, silu_mul=_silu_mul, features=lambda width, leaf, tp: None, backend=select_backend,
                 rope_options={}, drawing={})

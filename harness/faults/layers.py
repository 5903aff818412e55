"""Faults in what a layer computes: where the bias goes, how often a layer is reduced, which heads belong together."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import engine.kernels.rope as rope_module
from engine.layers.attention_backends import TorchBackend
from engine.layers.attention_layout import AttentionLayout
from engine.layers.matmul import linear
from engine.models.decoder import Decoder
from engine.parallel.group import TPGroup
from engine.parallel.linear import RowParallelLinear
from harness.faults.base import Patches, around, fault, instead
from harness.faults.loading import ATTENTION, MLP

BEFORE_O_PROJ = f"{ATTENTION} (attention, before o_proj)"


@fault(rows=(35, 36), checks=("layers", "logits"), module=f"{ATTENTION}.o_proj", effect="bias")
@instead(RowParallelLinear, "forward")
def row_bias_on_every_rank(self: RowParallelLinear, x_TI: Tensor) -> Tensor:
    """The bias of a row-parallel layer is added on each rank, before the all-reduce sums it."""
    return self.tp.all_reduce(linear(x_TI, self.weight, self.bias))


def _in_every_layer(patch: Patches, path: str, forward: Any, *, layers: slice = slice(None)) -> None:
    """``forward(self, original, x)`` for the module at ``path`` of these decoder layers: of one model, not of its class."""

    @patch.around(Decoder, "__init__")
    def init(original_init: Any, self: Decoder, *arguments: Any, **options: Any) -> None:
        original_init(self, *arguments, **options)
        for layer in list(self.layers)[layers]:
            module: nn.Module = layer.get_submodule(path)
            module.forward = MethodType(lambda self, x, original=module.forward: forward(self, original, x), module)


@fault(rows=(37,), checks=("logits",), module=f"{MLP}.down_proj", effect="bias")
def branch_bias_before_a_shared_reduce(patch: Patches, tp: TPGroup) -> None:
    """In one branch alone, the MLP, each rank adds the whole bias to its part."""

    def forward(self: RowParallelLinear, original: Any, x_TI: Tensor) -> Tensor:
        return self.tp.all_reduce(linear(x_TI, self.weight, self.bias))

    _in_every_layer(patch, "mlp.down_proj", forward)


@fault(rows=(40,), checks=("logits",), module=f"{MLP}.down_proj", effect="multiplied")
def reduced_twice(patch: Patches, tp: TPGroup) -> None:
    """A branch reduces its output, and who calls it reduces it again."""
    _in_every_layer(patch, "mlp.down_proj", lambda self, original, x_TI: self.tp.all_reduce(original(x_TI)))


@fault(rows=(42,), checks=("logits",), module=f"{ATTENTION}.o_proj", effect="lost")
def never_reduced(patch: Patches, tp: TPGroup) -> None:
    """One branch, the attention, is not reduced: every rank goes on with its own part."""
    _in_every_layer(patch, "self_attn.o_proj", lambda self, original, x_TI: linear(x_TI, self.weight, self.bias))


@fault(rows=(42,), layout="qwen2", checks=("logits",), module="model.layers.1.mlp.down_proj", effect="multiplied")
def branch_counts_for_one_rank(patch: Patches, tp: TPGroup) -> None:
    """One branch of the last layer contributes 1/tp_size of its value."""
    _in_every_layer(patch, "mlp.down_proj", lambda self, original, x_TI: original(x_TI) / tp.size, layers=slice(1, 2))


@fault(rows=(30, 31), layout="qwen3", checks=("logits",), module=BEFORE_O_PROJ)
@around(rope_module, "_norm_and_rotate_torch")
def norm_over_the_local_heads(original: Any, x_TNH: Tensor, cos: Tensor, sin: Tensor, weight_H: Tensor | None, eps: float) -> Any:
    """Queries and keys are normed over all heads of the rank together, so what counts depends on the cut."""
    if weight_H is not None:
        wide = x_TNH.float()
        x_TNH = (wide * torch.rsqrt(wide.square().mean((1, 2), keepdim=True) + eps) * weight_H.float()).to(x_TNH.dtype)
    return original(x_TNH, cos, sin, None, eps)


def _other_groups(patch: Patches, kv_of_q: Any) -> None:
    """``kv_of_q(heads)`` in place of the local query-to-KV map."""

    @patch.around(TorchBackend, "__init__")
    def init(original: Any, self: TorchBackend, layout: AttentionLayout) -> None:
        original(self, layout)
        self.kv_of_q = kv_of_q(layout.heads)


@fault(rows=(29,), layout="qwen2", checks=("attention", "logits"), module=BEFORE_O_PROJ)
def query_groups_by_default(patch: Patches, tp: TPGroup) -> None:
    """Query heads go to the local KV heads in turn, as if each were a group of its own."""
    _other_groups(patch, lambda heads: [head % heads.local_num_kv_heads for head in range(heads.local_num_q_heads)])


@fault(rows=(64, 65), layout="llama-cut-group", checks=("attention", "logits"), module=BEFORE_O_PROJ)
def heads_numbered_from_zero_on_every_rank(patch: Patches, tp: TPGroup) -> None:
    """What belongs to a head (the slopes of ALiBi in public, the KV group here) is looked up by its local number."""
    _other_groups(patch, lambda heads: [head // max(heads.q_counts) for head in range(heads.local_num_q_heads)])

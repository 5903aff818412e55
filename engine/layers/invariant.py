"""TP-invariant layers: the same bits at any tp_size and in any batch (docs/invariance.md says what is promised, and why).

Each is its ordinary layer with another arithmetic: ``engine.kernels.ieee`` and what is made of it. Weights are loaded and cut
as ever, but that MLPs are cut between leaves.

Shape suffixes: T = tokens, I / O = input / output features, E = hidden size, G = 2 * I, N = heads, H = head dim, R = rows,
V = vocabulary, L = this rank's vocabulary rows, P = positions, D = half of a head's rotated features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.kernels import ieee
from engine.kernels.invariant_attention import paged_attention_in_order_torch
from engine.kernels.invariant_matmul import leaf_sums_torch, linear_in_order_torch, quantum_exponent, value_of_sums_torch
from engine.kernels.philox import gumbel_argmax_torch
from engine.kernels.rope import apply_rope_torch
from engine.kernels.store_kv import store_kv_torch
from engine.layers.attention import Attention, RopeTables
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.layers.norm import RMSNorm
from engine.layers.sampler import Drawing, filter_top_k_top_p
from engine.models.parts import Parts
from engine.parallel.embedding import ParallelLMHead
from engine.parallel.group import TPGroup
from engine.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from engine.parallel.parameter import LoadedWeight, ShardParameter
from engine.parallel.sharding import leaf_range
from engine.scheduling.batch import StepBatch


class InvariantMergedColumnParallelLinear(MergedColumnParallelLinear):
    """No rank cuts K: an element is one sum in a fixed order, wherever it is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_in_order_torch(x, self.weight, self.bias)


class InvariantQKVParallelLinear(InvariantMergedColumnParallelLinear, QKVParallelLinear):
    """The same, split by heads."""


class InvariantLMHead(ParallelLMHead):
    """The same over the vocabulary's rows; what pads them stands in no sum."""

    def shard_logits(self, x_RE: Tensor) -> Tensor:
        return linear_in_order_torch(x_RE, self.weight, self.bias)


class InvariantRowParallelLinear(RowParallelLinear):
    """Leaves of fixed width, rounded to the weight's quantum and summed as integers, on this rank and over all of them.

    leaf   width; ranks are cut between leaves, and ``quantum`` comes from the whole checkpoint tensor: neither knows tp_size
    """

    quantum: int

    def __init__(self, input_size: int, output_size: int, *, leaf: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.leaf = leaf
        self.num_leaves = -(-input_size // leaf)
        owned = self.input_range
        cuts_none = owned.start % leaf == 0 and (owned.stop % leaf == 0 or owned.stop == input_size)
        assert cuts_none, f"input_range={owned} cuts a leaf of {leaf}"

    def weight_loader(self, param: ShardParameter, loaded_weight: LoadedWeight) -> None:
        super().weight_loader(param, loaded_weight)
        # Every rank reads the whole weight once. As the parameter holds it: a wider dtype may have another largest magnitude.
        self.quantum = quantum_exponent(loaded_weight[:].to(param.dtype))

    def forward(self, x_TI: Tensor) -> Tensor:
        sums_WTO = leaf_sums_torch(x_TI, self.weight, leaf=self.leaf, num_leaves=self.num_leaves, quantum=self.quantum)
        return value_of_sums_torch(self.tp.all_reduce(sums_WTO), self.quantum, self.bias, x_TI.dtype)


class InvariantRMSNorm(RMSNorm):
    """A row's squares are summed in the order of a tree, which its width fixes."""

    def forward(self, x: Any, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(x, Tensor), "an invariant layer gives whole sums"
        x = x if residual is None else x + residual
        return self.normed(x).to(x.dtype), x

    def normed(self, x: Tensor) -> Tensor:
        """In float64, for what rounds later."""
        wide = x.double()
        mean = ieee.tree_sum(wide * wide)[..., None] / x.shape[-1]
        return wide / (mean + self.eps).sqrt() * self.weight.double()


class InvariantAttention(Attention):
    """Norms of heads as above; a rotation is products and sums of two, which no shape changes."""

    def forward(self, qkv_TC: Tensor, cache: LayerCache, batch: StepBatch, rope: RopeTables,
                q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None) -> Tensor:
        num_kv, head_dim = cache.k_PNBH.shape[1], cache.k_PNBH.shape[3]
        heads_TNH = qkv_TC.unflatten(1, (-1, head_dim))
        q, k, v = heads_TNH.split([heads_TNH.shape[1] - 2 * num_kv, num_kv, num_kv], dim=1)
        q, k = (norm.normed(x) if isinstance(norm, InvariantRMSNorm) else x.double() for x, norm in ((q, q_norm), (k, k_norm)))
        q, k = (x.to(qkv_TC.dtype) for x in apply_rope_torch(q, k, batch.positions_T, *rope))
        store_kv_torch(k, v, cache.k_PNBH, cache.v_PNBH, batch.slots_T)
        return self.backend(q, cache, batch).flatten(1)


class InvariantBackend:
    """Attention over the cache in tiles at absolute positions."""

    name = "invariant"
    capturable = False

    def __init__(self, layout: AttentionLayout) -> None:
        self.scale = layout.head_dim**-0.5
        self.kv_of_q = layout.heads.kv_of_q

    def __call__(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        return paged_attention_in_order_torch(q_TQH, cache.k_PNBH, cache.v_PNBH, batch.block_tables_SB, batch.cu_seqlens_S1,
                                              batch.context_lens_S, self.kv_of_q, self.scale)


def _backend(name: str, layout: AttentionLayout) -> InvariantBackend:
    assert name == "auto", "EngineConfig.resolve refuses others"
    return InvariantBackend(layout)


def _silu_mul(gate_up_TG: Tensor) -> Tensor:
    gate, up = gate_up_TG.double().chunk(2, dim=-1)
    # Past 708 either way silu is 0 or the gate itself, to the last bit.
    return (gate / (1.0 + ieee.exp((-gate).clamp(max=708.0))) * up).to(gate_up_TG.dtype)


def features_in_leaves(width: int, leaf: int, tp: TPGroup) -> range:
    """This rank's part of an MLP's features, cut between leaves."""
    return leaf_range(width, leaf, tp_rank=tp.rank, tp_size=tp.size, what="intermediate_size")


def _log(x: Tensor) -> Tensor:
    return ieee.log(x.double()).to(x.dtype)


def _log_softmax(x_RV: Tensor) -> Tensor:
    return ieee.log_softmax(x_RV.double()).float()


def probability_in_units(scaled_RV: Tensor) -> Tensor:
    """The probability of all tokens before each, in units of 2^-40, whose sums are exact in any order."""
    units_RV = (ieee.exp(ieee.log_softmax(scaled_RV.double())) * 2.0**40).round().to(torch.int64)
    return ((units_RV.cumsum(dim=-1) - units_RV).double() * 2.0**-40).float()


def _argmax(logits_RV: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return gumbel_argmax_torch(logits_RV, *args, log=_log)


def best_of_sorted(x_LV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Of equals the lower token id, whatever the batch asks for beside."""
    values, indices = x_LV.sort(dim=-1, descending=True, stable=True)
    return values[:, :num], indices[:, :num]


INVARIANT = Parts(
    merged=InvariantMergedColumnParallelLinear, qkv=InvariantQKVParallelLinear, row=InvariantRowParallelLinear,
    head=InvariantLMHead, norm=InvariantRMSNorm, attention=InvariantAttention, silu_mul=_silu_mul, features=features_in_leaves,
    backend=_backend, rope_options={"by_position": True},
    drawing={"drawing": Drawing(filter=partial(filter_top_k_top_p, probability_before=probability_in_units), argmax=_argmax,
                                log_softmax=_log_softmax, best=best_of_sorted)})

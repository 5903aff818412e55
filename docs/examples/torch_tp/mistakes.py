"""The classic mistakes, each as a function for ``--subject torch:mistakes:NAME``; and what looks like one and is right."""

import torch
import torch.distributed as dist
from decoder import MLP, Attention, Decoder, RMSNormOfAllHeads, plan, sequence_parallel_plan
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel


def _variant(attention=Attention, mlp=MLP, edit=lambda plan, config, tp_size: plan, base=Decoder):
    def make(config, tp_rank, tp_size):
        made = type("Variant", (base,), {"attention": attention, "mlp": mlp})(config, tp_rank, tp_size)
        return made, edit(plan(config, tp_size), config, tp_size)

    return make


def _fused(old, new):
    """The plan with one projection in the place of several."""
    def edit(plan, config, tp_size):
        return {name: style for name, style in plan.items() if name.rpartition(".")[2] not in old} | {new: ColwiseParallel()}

    return edit


def _fusing(module, names, fused, arrange):
    """Let ``load_state_dict`` make one tensor of several."""
    def fuse(module, tensors, prefix, *_):
        for kind in ("weight", "bias"):
            if f"{prefix}{names[0]}.{kind}" in tensors:
                tensors[f"{prefix}{fused}.{kind}"] = arrange(*(tensors.pop(f"{prefix}{name}.{kind}") for name in names))

    module.register_load_state_dict_pre_hook(fuse)


QKV = _fused(("q_proj", "k_proj", "v_proj"), "model.layers.*.self_attn.qkv_proj")
GATE_UP = _fused(("gate_proj", "up_proj"), "model.layers.*.mlp.gate_up_proj")


class _FusedQKV(Attention):
    """[Q|K|V] in one tensor, which ColwiseParallel cuts as one: the first ranks get queries, the last ones keys and values."""

    def make_projections(self, hidden, bias):
        rows = (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(hidden, rows, bias=bias)
        _fusing(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj", self.arrange)

    def arrange(self, q, k, v):
        return torch.cat([q, k, v])

    def project(self, x):
        qkv = self.qkv_proj(x)
        own = qkv.shape[-1] // (self.num_q_heads + 2 * self.num_kv_heads)  # times a number of heads
        return qkv.split([num * own for num in (self.num_q_heads, self.num_kv_heads, self.num_kv_heads)], -1)


class _GroupedQKV(_FusedQKV):
    """Right: group by group, the queries of a KV head, its key, its value; so any cut between groups is whole groups."""

    def arrange(self, q, k, v):
        return torch.cat([x.unflatten(0, (self.num_kv_heads, -1)) for x in (q, k, v)], 1).flatten(0, 1)

    def project(self, x):
        per_kv = self.num_q_heads // self.num_kv_heads
        groups = self.qkv_proj(x).unflatten(-1, (-1, per_kv + 2, self.head_dim))
        return tuple(part.flatten(2) for part in groups.split([per_kv, 1, 1], -2))


class _FusedGateUp(MLP):
    """[gate|up] in one tensor that is cut as one: with two ranks one has all gates and the other all ups."""

    def make_projections(self, hidden, wide, bias):
        self.gate_up_proj = nn.Linear(hidden, 2 * wide, bias=bias)
        _fusing(self, ("gate_proj", "up_proj"), "gate_up_proj", self.arrange)

    def arrange(self, gate, up):
        return torch.cat([gate, up])

    def project(self, x):
        return self.gate_up_proj(x).chunk(2, -1)


class _InterleavedGateUp(_FusedGateUp):
    """Right: each gate beside its up."""

    def arrange(self, gate, up):
        return torch.stack([gate, up], 1).flatten(0, 1)

    def project(self, x):
        return self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)


class _LocalHeadRatio(Attention):
    """Where every rank has all KV heads: the rank's query heads are spread over them as if they were the model's."""

    def keys_of(self, k_1NTH, num_own_q):
        return k_1NTH.repeat_interleave(num_own_q // k_1NTH.shape[1], 1)


class _FixedHeadCount(Attention):
    """The whole model's number of heads in a ``view``."""

    def as_heads(self, x, num_heads):
        return x.view(*x.shape[:2], num_heads, self.head_dim)


class _NormOfOwnHeads(Attention):
    """The norm over all heads, by its formula, over those that this rank has."""

    class norm_of_all_heads(RMSNormOfAllHeads):  # noqa: N801
        def sum_of_squares(self, x):
            return x.float().pow(2).sum(-1, keepdim=True)

        def num_squares(self, x):
            return x.shape[-1]


class _OnlyRank0Loads(Decoder):
    """``parallelize_module`` sends out rank 0's shards; what is in no plan stays as each rank has it."""

    def __init__(self, config, tp_rank, tp_size):
        super().__init__(config, tp_rank, tp_size)
        self.register_load_state_dict_pre_hook(self.keep_own)

    def keep_own(self, module, tensors, *_):
        if dist.is_initialized() and dist.get_rank() > 0:
            tensors.update(self.state_dict())


class _OtherActivation(MLP):
    """Wrong on one rank too: no matter of tensor parallelism."""

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(nn.functional.gelu(gate) * up)


def _unmatched(plan, config, tp_size):
    return {name.replace("self_attn", "attention"): style for name, style in plan.items()}


def _embedding_by_rows(plan, config, tp_size):
    return plan | {"model.embed_tokens": RowwiseParallel()}


def _local_parts(plan, config, tp_size):
    return sequence_parallel_plan(config, tp_size, use_local_output=True)


fused_qkv = _variant(attention=_FusedQKV, edit=QKV)
fused_gate_up = _variant(mlp=_FusedGateUp, edit=GATE_UP)
local_head_ratio = _variant(attention=_LocalHeadRatio)
fixed_head_count = _variant(attention=_FixedHeadCount)
norm_of_own_heads = _variant(attention=_NormOfOwnHeads)
only_rank_0_loads = _variant(base=_OnlyRank0Loads)
embedding_without_input_layouts = _variant(edit=_embedding_by_rows)
plan_that_matches_nothing = _variant(edit=_unmatched)
sequence_parts_without_their_length = _variant(edit=_local_parts)
wrong_on_one_rank_too = _variant(mlp=_OtherActivation)

# Right:
grouped_qkv = _variant(attention=_GroupedQKV, edit=QKV)
interleaved_gate_up = _variant(mlp=_InterleavedGateUp, edit=GATE_UP)

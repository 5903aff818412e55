"""A small decoder of plain torch and its plan for ``parallelize_module``. One module for Llama, Qwen3 and OLMo2.

Check it with ``shardproof verify MODEL --subject torch:decoder:decoder``. Its modules are called as transformers calls them, so
that a wrong one can be named.

Query heads must split evenly over the ranks. KV heads are split where they do too; else every rank has all of them, and each of
its query heads finds its own.

Shape suffixes: T = tokens, F = features, Q = query heads of this rank, N = KV heads of this rank, H = head dim.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel


def decoder(config, tp_rank, tp_size):
    """What ``--subject torch:decoder:decoder`` calls on every rank."""
    return Decoder(config, tp_rank, tp_size), plan(config, tp_size)


def with_sequence_parallelism(config, tp_rank, tp_size):
    """The same with each sequence cut between the parallel layers: norms and residuals see a part of the tokens."""
    return Decoder(config, tp_rank, tp_size), sequence_parallel_plan(config, tp_size)


def plan(config, tp_size):
    """The plan of the whole model, by module."""
    kv = ("k_proj", "v_proj") if config["num_key_value_heads"] % tp_size == 0 else ()
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        **{f"model.layers.*.self_attn.{name}": ColwiseParallel() for name in ("q_proj", *kv)},
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def sequence_parallel_plan(config, tp_size, *, use_local_output=False):
    """The same for parts of a sequence. DTensors between the modules know the whole length, which tp_size need not divide."""
    cut = {"output_layouts": Shard(1), "use_local_output": use_local_output}
    whole = {"input_layouts": Shard(1), "desired_input_layouts": Replicate(), "use_local_output": True}
    attention = PrepareModuleInput(**{**whole, "input_layouts": (Shard(1), None, None),
                                      "desired_input_layouts": (Replicate(), None, None)})
    norms = [name for name in Layer.norms_of(config) if name in Layer.NORMS]
    return plan(config, tp_size) | {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **cut),
        **{f"model.layers.*.{name}": SequenceParallel(use_local_output=use_local_output) for name in norms},
        "model.layers.*.self_attn": attention,
        "model.layers.*.self_attn.o_proj": RowwiseParallel(**cut),
        "model.layers.*.mlp": PrepareModuleInput(**whole),
        "model.layers.*.mlp.down_proj": RowwiseParallel(**cut),
        "model.norm": SequenceParallel(use_local_output=use_local_output),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        square = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(square + self.eps)).to(x.dtype)


class RMSNormOfAllHeads(RMSNorm):
    """OLMo2's, over all heads: where a rank has a part of them, squares are summed over the ranks."""

    def __init__(self, size, eps, tp_rank, tp_size):
        super().__init__(size, eps)
        self.tp_rank, self.tp_size = tp_rank, tp_size

    def forward(self, x):
        width = x.shape[-1]
        if width == len(self.weight):
            return super().forward(x)
        square = self.sum_of_squares(x)
        own = self.weight[self.tp_rank * width : (self.tp_rank + 1) * width]
        return own * (x.float() * torch.rsqrt(square / self.num_squares(x) + self.eps)).to(x.dtype)

    def sum_of_squares(self, x):
        total = x.float().pow(2).sum(-1, keepdim=True)
        dist.all_reduce(total)
        return total

    def num_squares(self, x):
        return len(self.weight)


class Attention(nn.Module):
    """Causal attention of this rank's query heads."""

    def __init__(self, config, tp_rank, tp_size):
        super().__init__()
        hidden, num_q, num_kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        self.num_q_heads, self.num_kv_heads = num_q, num_kv
        self.head_dim = config.get("head_dim") or hidden // num_q
        bias = config.get("attention_bias", False)
        self.make_projections(hidden, bias)
        self.o_proj = nn.Linear(num_q * self.head_dim, hidden, bias=bias)
        eps = config["rms_norm_eps"]
        self.norms_heads = config["model_type"] == "qwen3"
        if self.norms_heads:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, eps), RMSNorm(self.head_dim, eps)
        elif config["model_type"] == "olmo2":
            self.q_norm, self.k_norm = (self.norm_of_all_heads(num * self.head_dim, eps, tp_rank, tp_size)
                                        for num in (num_q, num_kv))
        own_q = range(num_q // tp_size * tp_rank, num_q // tp_size * (tp_rank + 1))
        first_kv = num_kv // tp_size * tp_rank if num_kv % tp_size == 0 else 0
        self.kv_of_q = [head // (num_q // num_kv) - first_kv for head in own_q]

    norm_of_all_heads = RMSNormOfAllHeads

    def make_projections(self, hidden, bias):
        self.q_proj = nn.Linear(hidden, self.num_q_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)

    def project(self, x):
        """Queries, keys and values of this rank's heads, [1, T, heads * H] each."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def as_heads(self, x, num_heads):
        """[1, T, heads * H] -> [1, T, heads, H]; ``num_heads`` is the whole model's."""
        return x.unflatten(-1, (-1, self.head_dim))

    def keys_of(self, k_1NTH, num_own_q):
        """For each of this rank's query heads the KV head that it uses."""
        return k_1NTH[:, self.kv_of_q]

    def forward(self, x, cos, sin):
        q, k, v = self.project(x)
        if not self.norms_heads and hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.as_heads(q, self.num_q_heads), self.as_heads(k, self.num_kv_heads), self.as_heads(v, self.num_kv_heads)
        if self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, self.keys_of(k, q.shape[1]), self.keys_of(v, q.shape[1]), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config):
        super().__init__()
        hidden, wide, bias = config["hidden_size"], config["intermediate_size"], config.get("mlp_bias", False)
        self.make_projections(hidden, wide, bias)
        self.down_proj = nn.Linear(wide, hidden, bias=bias)

    def make_projections(self, hidden, wide, bias):
        self.gate_proj = nn.Linear(hidden, wide, bias=bias)
        self.up_proj = nn.Linear(hidden, wide, bias=bias)

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and MLP, each with its residual. OLMo2 norms what they give, the others what they take."""

    NORMS = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")

    def __init__(self, config, self_attn, mlp):
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        for name in self.norms_of(config):
            self.add_module(name, RMSNorm(config["hidden_size"], config["rms_norm_eps"]))

    @staticmethod
    def norms_of(config):
        return Layer.NORMS[1:] if config["model_type"] == "olmo2" else Layer.NORMS[:2]

    def forward(self, x, cos, sin):
        if hasattr(self, "input_layernorm"):
            x = x + self.self_attn(self.input_layernorm(x), cos, sin)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Decoder(nn.Module):
    """Token ids [1, T] -> logits [1, T, vocabulary]."""

    attention, mlp = Attention, MLP

    def __init__(self, config, tp_rank, tp_size):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config, self.attention(config, tp_rank, tp_size), self.mlp(config))
                                          for _ in range(config["num_hidden_layers"]))
        self.model.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        head_dim = self.model.layers[0].self_attn.head_dim
        theta = config["rope_parameters"]["rope_theta"]
        self.register_buffer("inv_freq", 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim), persistent=False)

    def forward(self, token_ids):
        angles = torch.arange(token_ids.shape[1], device=token_ids.device)[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        dtype = self.model.norm.weight.dtype
        x = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            x = layer(x, angles.cos().to(dtype), angles.sin().to(dtype))
        return self.lm_head(self.model.norm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, on pairs of features that are half a head apart."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

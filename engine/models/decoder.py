"""The decoder that Llama and its like share: they differ in biases, in norms of queries and keys, in what checkpoints hold fused.

Module names are Hugging Face's, so that activations can be compared by name; q/k/v and gate/up are fused.

Shape suffixes: T = tokens, E = hidden size, R = rows whose logits are asked for, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.layers.attention import RopeTables
from engine.layers.attention_layout import AttentionBackend, LayerCache
from engine.layers.rotary import rope_tables
from engine.models.parts import ORDINARY, Parts
from engine.models.table import ACTIVATION, ATTENTION, RESIDUAL, TOKEN_IDS, CausalLM, Module
from engine.parallel.embedding import VocabParallelEmbedding
from engine.parallel.group import PartialSum, TPGroup
from engine.parallel.sharding import leaf_width, scale_range
from engine.scheduling.batch import StepBatch

LAYER = "model.layers.*"
QKV, GATE_UP = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.gate_up_proj"
_NORMED, _NORMED_AGAIN = f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"

EMBEDDING = (Module(path="model.embed_tokens", kind="vocabulary", fed_by=TOKEN_IDS),)
PROJECTIONS = (
    Module(path=_NORMED, kind="replicated", fed_by=RESIDUAL),
    Module(path=f"{LAYER}.self_attn.q_proj", kind="column", fused=QKV, part="q", fed_by=_NORMED),
    Module(path=f"{LAYER}.self_attn.k_proj", kind="column", fused=QKV, part="k", fed_by=_NORMED),
    Module(path=f"{LAYER}.self_attn.v_proj", kind="column", fused=QKV, part="v", fed_by=_NORMED),
)
"""Of an attention."""
HEAD_NORMS = (
    Module(path=f"{LAYER}.self_attn.q_norm", kind="replicated", fed_by=f"{LAYER}.self_attn.q_proj", has_output=False),
    Module(path=f"{LAYER}.self_attn.k_norm", kind="replicated", fed_by=f"{LAYER}.self_attn.k_proj", has_output=False),
)
REST_OF_LAYER = (
    Module(path=f"{LAYER}.self_attn.o_proj", kind="row", fed_by=ATTENTION),
    Module(path=_NORMED_AGAIN, kind="replicated", fed_by=RESIDUAL),
    Module(path=f"{LAYER}.mlp.gate_proj", kind="column", fused=GATE_UP, part=0, fed_by=_NORMED_AGAIN),
    Module(path=f"{LAYER}.mlp.up_proj", kind="column", fused=GATE_UP, part=1, fed_by=_NORMED_AGAIN),
    Module(path=f"{LAYER}.mlp.down_proj", kind="row", fed_by=ACTIVATION),
)
HEAD = (
    Module(path="model.norm", kind="replicated", fed_by=RESIDUAL),
    Module(path="lm_head", kind="vocabulary", fed_by="model.norm"),
)
MODULES = (*EMBEDDING, *PROJECTIONS, *REST_OF_LAYER, *HEAD)
"""The module table of a Llama."""


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU, Shazeer 2020): one all-reduce, in ``down_proj``."""

    def __init__(self, config: ModelConfig, *, tp: TPGroup, dtype: torch.dtype, device: torch.device, parts: Parts) -> None:
        super().__init__()
        width, bias = config.intermediate_size, config.mlp_bias
        leaf = leaf_width(width, num_q_heads=config.num_q_heads)
        mine = parts.features(width, leaf, tp)
        self.gate_up_proj = parts.merged(config.hidden_size, (width, width), bias=bias, tp=tp, dtype=dtype, device=device,
                                         output_ranges=None if mine is None else (mine, mine), silu_mul_follows=True)
        self.silu_mul = parts.silu_mul
        self.down_proj = parts.row(width, config.hidden_size, leaf=leaf, bias=bias, tp=tp, dtype=dtype, device=device,
                                   input_range=mine, norm_follows=True)

    def forward(self, x_TE: Tensor) -> Tensor | PartialSum:
        y_TE: Tensor | PartialSum = self.down_proj(self.silu_mul(self.gate_up_proj(x_TE)))
        return y_TE


class SelfAttention(nn.Module):
    """Attention of this rank's heads: one all-reduce, in ``o_proj``."""

    def __init__(self, config: ModelConfig, *, tp: TPGroup, dtype: torch.dtype, device: torch.device,
                 backend: AttentionBackend, parts: Parts) -> None:
        super().__init__()
        head_dim = config.head_dim
        self.qkv_proj = parts.qkv(config.hidden_size, head_dim, config.num_q_heads, config.num_kv_heads, bias=config.qkv_bias,
                                  tp=tp, dtype=dtype, device=device)
        heads = self.qkv_proj.heads
        self.o_proj = parts.row(config.num_q_heads * head_dim, config.hidden_size, leaf=head_dim, bias=config.o_bias, tp=tp,
                                dtype=dtype, device=device, input_range=scale_range(heads.q_heads, head_dim),
                                norm_follows=True)
        self.q_norm = parts.norm(head_dim, config.rms_norm_eps, dtype=dtype, device=device) if config.qk_norm else None
        self.k_norm = parts.norm(head_dim, config.rms_norm_eps, dtype=dtype, device=device) if config.qk_norm else None
        self.attn = parts.attention(backend)

    def forward(self, x_TE: Tensor, cache: LayerCache, batch: StepBatch, rope: RopeTables) -> Tensor | PartialSum:
        y_TE: Tensor | PartialSum = self.o_proj(self.attn(self.qkv_proj(x_TE), cache, batch, rope, self.q_norm, self.k_norm))
        return y_TE


class DecoderLayer(nn.Module):
    """Norm, attention, norm, MLP. The residual travels beside ``x``: each norm adds it and hands the sum on.

    Where ``x`` is a partial sum, the norm that takes it does the all-reduce of the row-parallel layer that gave it.
    """

    def __init__(self, config: ModelConfig, *, tp: TPGroup, dtype: torch.dtype, device: torch.device,
                 backend: AttentionBackend, parts: Parts) -> None:
        super().__init__()
        self.input_layernorm = parts.norm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.self_attn = SelfAttention(config, tp=tp, dtype=dtype, device=device, backend=backend, parts=parts)
        self.post_attention_layernorm = parts.norm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.mlp = MLP(config, tp=tp, dtype=dtype, device=device, parts=parts)
        self.input_layernorm.followed_by = (self.self_attn.qkv_proj,)
        self.post_attention_layernorm.followed_by = (self.mlp.gate_up_proj,)

    def forward(self, x_TE: Tensor | PartialSum, residual_TE: Tensor | None, cache: LayerCache, batch: StepBatch,
                rope: RopeTables) -> tuple[Tensor | PartialSum, Tensor]:
        normed_TE, residual_TE = self.input_layernorm(x_TE, residual_TE)
        x_TE = self.self_attn(normed_TE, cache, batch, rope)
        normed_TE, residual_TE = self.post_attention_layernorm(x_TE, residual_TE)
        return self.mlp(normed_TE), residual_TE


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig, *, tp: TPGroup, dtype: torch.dtype, device: torch.device,
                 backend: AttentionBackend, parts: Parts) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, tp=tp, dtype=dtype, device=device, backend=backend, parts=parts)
            for _ in range(config.num_layers)
        )
        self.norm = parts.norm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(self, batch: StepBatch, caches: list[LayerCache], rope: RopeTables) -> Tensor:
        x_TE, residual_TE = self.embed_tokens(batch.token_ids_T), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TE, residual_TE = layer(x_TE, residual_TE, cache, batch, rope)
        normed_TE: Tensor = self.norm(x_TE, residual_TE)[0]
        return normed_TE


class DecoderForCausalLM(CausalLM):
    """A decoder with its LM head."""

    def __init__(self, config: ModelConfig, *, tp: TPGroup, dtype: torch.dtype, device: torch.device,
                 max_model_len: int, backend: AttentionBackend, parts: Parts = ORDINARY) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, tp=tp, dtype=dtype, device=device, backend=backend, parts=parts)
        self.lm_head = parts.head(config.vocab_size, config.hidden_size, tp=tp, dtype=dtype, device=device)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens)
        self.rope = rope_tables(config.hf_config, config.head_dim, max_model_len, device=device, **parts.rope_options)

    @property
    def tied(self) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def forward(self, batch: StepBatch, caches: list[LayerCache]) -> Tensor:
        """Hidden states ``[T, E]`` of the step's tokens, after the final norm."""
        hidden_TE: Tensor = self.model(batch, caches, self.rope)
        return hidden_TE

    def logits(self, hidden_RE: Tensor) -> Tensor:
        logits_RV: Tensor = self.lm_head(hidden_RE)
        return logits_RV

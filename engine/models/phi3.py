"""Phi-3, Phi-4-mini: checkpoints hold queries, keys and values in one tensor, gate and up in another; heads may turn in part."""

from __future__ import annotations

from typing import Any

from engine.config import usable_positions
from engine.models.decoder import EMBEDDING, GATE_UP, HEAD, LAYER, QKV, DecoderForCausalLM
from engine.models.table import ACTIVATION, ATTENTION, RESIDUAL, Family, Module


def fields(config: Any) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that Phi-3 reads its own way."""
    return {"max_position_embeddings": usable_positions(config.max_position_embeddings, config.rope_parameters,
                                                        config.sliding_window)}


MODULES = (
    *EMBEDDING,
    Module(path=f"{LAYER}.input_layernorm", kind="replicated", fed_by=RESIDUAL),
    Module(path=QKV, kind="column", fed_by=f"{LAYER}.input_layernorm"),
    Module(path=f"{LAYER}.self_attn.o_proj", kind="row", fed_by=ATTENTION),
    Module(path=f"{LAYER}.post_attention_layernorm", kind="replicated", fed_by=RESIDUAL),
    Module(path=GATE_UP, kind="column", fed_by=f"{LAYER}.post_attention_layernorm"),
    Module(path=f"{LAYER}.mlp.down_proj", kind="row", fed_by=ACTIVATION),
    *HEAD,
)

FAMILY = Family(model=DecoderForCausalLM, fields=fields, modules=MODULES, rope_types=("default", "longrope"), partial_rotary=True)

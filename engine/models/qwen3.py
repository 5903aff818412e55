"""Qwen3: an RMSNorm over each query and key head, and the attention's biases if the config asks for them."""

from __future__ import annotations

from typing import Any

from engine.models.decoder import EMBEDDING, HEAD, HEAD_NORMS, PROJECTIONS, REST_OF_LAYER, DecoderForCausalLM
from engine.models.table import Family


def fields(config: Any) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that Qwen3 reads its own way."""
    return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias, "qk_norm": True}


FAMILY = Family(model=DecoderForCausalLM, fields=fields,
                modules=(*EMBEDDING, *PROJECTIONS, *HEAD_NORMS, *REST_OF_LAYER, *HEAD))

"""Llama: biases where the config asks for them, in the attention and in the MLP."""

from __future__ import annotations

from typing import Any

from engine.models.decoder import MODULES, DecoderForCausalLM
from engine.models.table import Family


def fields(config: Any) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that Llama reads its own way."""
    return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(model=DecoderForCausalLM, fields=fields, modules=MODULES)

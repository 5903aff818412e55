"""Qwen2: queries, keys and values have biases, and nothing else has."""

from __future__ import annotations

from engine.models.decoder import MODULES, DecoderForCausalLM
from engine.models.table import Family

FAMILY = Family(model=DecoderForCausalLM, fields=lambda config: {"qkv_bias": True}, modules=MODULES)

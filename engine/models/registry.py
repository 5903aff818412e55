"""Which class runs which ``model_type``."""

from __future__ import annotations

from engine.config import SUPPORTED_MODEL_TYPES
from engine.models.decoder import DecoderForCausalLM

MODELS: dict[str, type[DecoderForCausalLM]] = dict.fromkeys(SUPPORTED_MODEL_TYPES, DecoderForCausalLM)

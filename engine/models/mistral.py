"""Mistral: a Llama without biases. Its sliding window ends a sequence: up to there it makes no difference."""

from __future__ import annotations

from typing import Any

from engine.config import usable_positions
from engine.models.decoder import MODULES, DecoderForCausalLM
from engine.models.table import Family


def fields(config: Any) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that Mistral reads its own way."""
    return {"max_position_embeddings": usable_positions(config.max_position_embeddings, config.rope_parameters,
                                                        config.sliding_window)}


FAMILY = Family(model=DecoderForCausalLM, fields=fields, modules=MODULES)

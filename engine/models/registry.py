"""Which file says what a ``model_type`` is. A file is imported when a model of its family is met."""

from __future__ import annotations

from importlib import import_module

from engine.models.table import Family

FAMILIES: dict[str, str] = {
    "llama": "engine.models.llama",
    "mistral": "engine.models.mistral",
    "phi3": "engine.models.phi3",
    "qwen2": "engine.models.qwen2",
    "qwen3": "engine.models.qwen3",
}
"""``model_type`` -> the module whose ``FAMILY`` it is."""


def family_of(model_type: str) -> Family:
    """What the engine knows of a supported ``model_type``.

    Raises:
        KeyError: if it is none of ``FAMILIES``.
    """
    family: Family = import_module(FAMILIES[model_type]).FAMILY
    return family

"""A tensor-parallel, paged-attention inference engine: ``from engine import LLM, SamplingParams``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.checkpoint.checkpoint_files import CheckpointError
    from engine.config import EngineConfig, ModelConfig, UnsupportedModelError
    from engine.frontend.outputs import CompletionOutput, Logprob, RequestOutput
    from engine.frontend.sampling import SamplingParams
    from engine.llm import LLM, Stream

__all__ = ["LLM", "CheckpointError", "CompletionOutput", "EngineConfig", "Logprob", "ModelConfig", "RequestOutput",
           "SamplingParams", "Stream", "UnsupportedModelError"]

# Imported on first use: a rank, or a layer's test, should not wait for tokenizers and hub clients.
_HOME = {
    "LLM": "engine.llm", "Stream": "engine.llm", "SamplingParams": "engine.frontend.sampling",
    "EngineConfig": "engine.config", "ModelConfig": "engine.config", "UnsupportedModelError": "engine.config",
    "CompletionOutput": "engine.frontend.outputs", "RequestOutput": "engine.frontend.outputs",
    "Logprob": "engine.frontend.outputs", "CheckpointError": "engine.checkpoint.checkpoint_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from engine.collector import without_collector

    with without_collector():
        return getattr(import_module(_HOME[name]), name)

"""Models to measure and to verify: named shapes as random checkpoints, kept in a cache folder, or any checkpoint there is."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.names import DTYPES

_COMMON = {
    "qwen3": {"vocab_size": 151_936, "head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 40_960, "rope_theta": 1e6},
    "llama": {"vocab_size": 128_256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "rope_theta": 5e5},
}
_LLAMA_31_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192, "rope_theta": 5e5}


def _shape(model_type: str, hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = False,
           **others: Any) -> dict[str, Any]:
    return {"model_type": model_type, "num_key_value_heads": 8, **_COMMON[model_type], "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
            "tie_word_embeddings": tied, **others}


_LLAMA_32_1B = _shape("llama", 2048, 8192, 16, 32, tied=True, head_dim=64, rope_scaling=_LLAMA_31_ROPE | {"factor": 32.0})

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _shape("qwen3", 2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _shape("qwen3", 2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32),
    "qwen3-14b": _shape("qwen3", 5120, 17408, 40, 40),
    "qwen3-32b": _shape("qwen3", 5120, 25600, 64, 64),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, 32, head_dim=128, rope_scaling=_LLAMA_31_ROPE | {"factor": 8.0}),
    "llama-3.2-1b": _LLAMA_32_1B,
    "llama-3.2-1b-biased": _LLAMA_32_1B | {"attention_bias": True, "mlp_bias": True},
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, tied=True, vocab_size=49_152, num_key_value_heads=3,
                           max_position_embeddings=8192, rope_theta=1e5),
}
"""Names and sizes of public models; their weights are random. ``-biased``: with biases in every linear layer, which few public
models have and which tensor parallelism gets wrong most easily."""

NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_LARGEST_FILE = "4GB"


def model_folder(model: str, *, dtype: str = "auto", cache: Path | None = None) -> Path:
    """The checkpoint of ``model``: random weights for a name of ``SHAPES``, else what ``reference.checkpoints`` finds.

    Random weights are written once, in ``dtype`` (bfloat16 for ``auto``), into the cache folder: ``$SHARDPROOF_CACHE``, or
    ``~/.cache/shardproof``.

    Raises:
        CheckpointError: if there is no such model.
        UsageError: if no model is named, or random weights can't be of this ``dtype``.
    """
    if not model.strip():
        raise UsageError(f"model={model!r} names nothing: give smollm2, a folder, a hub id or a shape")
    # Here: the names alone must cost no import of torch.
    from engine.checkpoint.hub import cache_folder
    from reference.checkpoints import random_checkpoint, resolve

    if model not in SHAPES:
        return resolve(model).absolute()
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype={dtype!r} is unknown; supported: auto, {', '.join(DTYPES)}")
    root = cache or cache_folder()
    dtype = "bfloat16" if dtype == "auto" else dtype
    folder = (root / "shapes" / f"{model}-{dtype}").absolute()
    if not folder.is_dir():
        # Whole or not at all: another run may look for it, and this one may be interrupted.
        scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            random_checkpoint(scratch, dict(SHAPES[model]) | NO_SPECIAL_TOKENS, dtype=dtype, max_shard_size=_LARGEST_FILE)
            _rename(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _rename(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same weights
            raise

"""Tiny configs in which no two sizes are alike, so that a mixed-up dimension shows."""

from typing import Any

import pytest
import torch

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
)


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """6 query heads on 2 KV heads; Llama with all the biases it can have."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 48,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 101,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type == "llama":
        config |= {"attention_bias": True, "mlp_bias": True}
    if model_type == "phi3":  # its head_dim follows from the hidden size
        config |= {"hidden_size": 60, "pad_token_id": None}
    return config | changes


def small_config(family: str = "llama", *, num_q_heads: int = 9, num_kv_heads: int = 3, **changes: Any) -> dict[str, Any]:
    """Two layers; 9 query heads over 3 KV heads share a KV head between two ranks, and no other size fits any tp_size."""
    config: dict[str, Any] = {
        "model_type": family, "vocab_size": 131, "hidden_size": 8 * num_q_heads, "intermediate_size": 53,
        "num_hidden_layers": 2, "num_attention_heads": num_q_heads, "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 192, "tie_word_embeddings": family == "qwen2", "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None,
    }
    config |= {"llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 8}, "qwen3": {"head_dim": 16},
               "mistral": {"head_dim": 16}}.get(family, {})
    return config | changes

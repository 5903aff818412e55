"""Tiny models on which faults are planted: each has what some bugs need to be seen, and no size is a round one.

Biases in all projections, a norm of queries and keys, tied embeddings, KV heads fewer than ranks, a group of query heads cut
in two, sizes and vocabularies that do not split evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_COMMON: dict[str, Any] = {
    "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 192,
    # No end of sequence: random weights would stop at random.
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A model's config and the dtype it is run in."""

    config: dict[str, Any]
    dtype: str


LAYOUTS: dict[str, Layout] = {
    # Every bias that a Llama can have, row-parallel ones among them.
    "llama": Layout(dtype="bfloat16", config={
        **_COMMON, "model_type": "llama", "hidden_size": 48, "intermediate_size": 52, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 131, "tie_word_embeddings": False, "attention_bias": True,
        "mlp_bias": True}),
    # Odd sizes: intermediate and vocabulary split unevenly over two ranks.
    "llama-odd": Layout(dtype="float32", config={
        **_COMMON, "model_type": "llama", "hidden_size": 40, "intermediate_size": 53, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 129, "tie_word_embeddings": True}),
    # Three KV heads over two ranks: the middle one lives on both, and the groups are of one and two query heads.
    "llama-cut-group": Layout(dtype="bfloat16", config={
        **_COMMON, "model_type": "llama", "hidden_size": 48, "intermediate_size": 52, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 131, "tie_word_embeddings": True}),
    # Nine heads: rank 1 has four query heads on two KV heads, one on the first and three on the second.
    "llama-nine-heads": Layout(dtype="bfloat16", config={
        **_COMMON, "model_type": "llama", "hidden_size": 45, "intermediate_size": 52, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 131, "tie_word_embeddings": True}),
    # Stretched to four times the positions that it was first trained on, and no default among the rotary parameters.
    "llama-yarn": Layout(dtype="bfloat16", config={
        **_COMMON, "model_type": "llama", "hidden_size": 48, "intermediate_size": 52, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0,
                            "original_max_position_embeddings": 48}}),
    # Several KV heads a rank, and biases of queries, keys and values.
    "qwen2": Layout(dtype="float32", config={
        **_COMMON, "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 52, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 131, "tie_word_embeddings": False}),
    # A norm over each query and key head; at four ranks fewer KV heads than ranks.
    "qwen3": Layout(dtype="bfloat16", config={
        **_COMMON, "model_type": "qwen3", "hidden_size": 44, "intermediate_size": 52, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "tie_word_embeddings": True}),
    # Fused on disk: queries, keys and values in one tensor, gate and up in another; three quarters of each head are rotated.
    "phi3": Layout(dtype="bfloat16", config={
        **_COMMON, "model_type": "phi3", "hidden_size": 64, "intermediate_size": 52, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 131, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}}),
    # Padding is a large part of the vocabulary of the last ranks at four of them: 9 rows each, 3 of them padding.
    "small-vocabulary": Layout(dtype="float32", config={
        **_COMMON, "model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 33, "tie_word_embeddings": False}),
}

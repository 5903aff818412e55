"""What is drawn: tiny models of every layout that can be cut.

Everything is described once, in terms of a ``Pick``, and drawn in two ways: by hypothesis, which shrinks what fails, and
from a plain generator, for the thousands of unbiased cases that calibration needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Pick = Callable[[int, int], int]
"""A whole number from the first to the second, both included."""

CALIBRATED = ("llama", "qwen2", "qwen3")
"""What calibration draws from: its figures are those of equal seeds."""
FAMILIES = (*CALIBRATED, "mistral", "phi3")
PHI4_FACTOR = 0.75
"""The part of each head that Phi-4-mini rotates."""


def model_configs(tp_size: int, *, families: Sequence[str] = FAMILIES, max_width: int = 48,
                  max_layers: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Hypothesis: configs of models that ``tp_size`` ranks can share."""

    @st.composite
    def configs(draw: st.DrawFn) -> dict[str, Any]:
        return pick_config(lambda low, high: draw(st.integers(low, high)), tp_size=tp_size, families=families,
                           max_width=max_width, max_layers=max_layers)

    return configs()


def random_config(draw: random.Random, tp_size: int, *, max_width: int = 128, max_layers: int = 4) -> dict[str, Any]:
    """The same from a plain generator."""
    return pick_config(draw.randint, tp_size=tp_size, families=CALIBRATED, max_width=max_width, max_layers=max_layers)


def pick_config(pick: Pick, *, tp_size: int, families: Sequence[str] = FAMILIES, max_width: int,
                max_layers: int) -> dict[str, Any]:
    """A config.json, as a dict, of a small decoder with at least one query head for each of ``tp_size`` ranks.

    KV heads are fewer than the ranks, as many, or more, and may be shared by two ranks; no size needs to be a multiple of
    ``tp_size``. No end-of-sequence token: random weights would stop at random.

    Args:
        pick: a number between two, both included: drawn by hypothesis or a generator.
        tp_size: ranks, each of which gets a query head.
        families: the values of ``model_type`` to pick from. Llamas get every bias that they can have.
        max_width: hidden size, about; the intermediate size goes up to four times that.
        max_layers: at most so many, at least one.
    """
    model_type = families[pick(0, len(families) - 1)]
    num_kv_heads = pick(1, tp_size + 2)
    group = -(-tp_size // num_kv_heads) + pick(0, 2)
    num_q_heads = num_kv_heads * group
    head_dim = (4, 8, 16)[pick(0, 2)]
    if model_type in ("qwen2", "phi3"):  # derive their head_dim
        hidden_size = num_q_heads * head_dim
    elif model_type == "llama":  # transformers asks for a multiple
        hidden_size = num_q_heads * pick(1, max(1, max_width // num_q_heads))
    else:
        hidden_size = pick(8, max_width)
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": pick(max(32, tp_size), 300),
        "hidden_size": hidden_size,
        "intermediate_size": pick(tp_size, max(tp_size, 4 * max_width)),
        "num_hidden_layers": pick(1, max_layers),
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 192,
        "rms_norm_eps": (1e-5, 1e-6)[pick(0, 1)],
        "tie_word_embeddings": pick(0, 1) == 1,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }
    if model_type == "llama":
        config |= {"attention_bias": True, "mlp_bias": True}
    if model_type in ("qwen2", "phi3"):
        del config["head_dim"]
    if model_type == "phi3" and pick(0, 1):
        config["partial_rotary_factor"] = PHI4_FACTOR
    return config

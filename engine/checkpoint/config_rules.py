"""What the values of a ``config.json`` must be, where the engine looks at them: one table, one message a key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.checkpoint_files import CheckpointError, short


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


LARGEST_SIZE = 2**24
MOST_LAYERS = 1000
"""What is larger is a mistake, and would take hours, or all memory, to fail."""

Rule = tuple[Callable[[Any], bool], str]
_COUNT: Rule = (lambda value: _is_whole(value, 1) and value <= LARGEST_SIZE, f"a whole number from 1 to {LARGEST_SIZE}")
_LAYERS: Rule = (lambda value: _is_whole(value, 1) and value <= MOST_LAYERS, f"a whole number from 1 to {MOST_LAYERS}")
_POSITIVE: Rule = (lambda value: _is_number(value) and value > 0, "a number above 0")
_SHARE: Rule = (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1")
_NUMBERS: Rule = (lambda value: isinstance(value, list) and all(_is_number(one) and one > 0 for one in value),
                  "a list of numbers above 0")
_NUMBER: Rule = (lambda value: _is_number(value) and value >= 0, "a number of at least 0")
_FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
_TEXT: Rule = (lambda value: isinstance(value, str), "a string")
_IDS: Rule = (lambda value: all(_is_whole(one, -1) for one in (value if isinstance(value, list) else [value])),
              "a token id, or a list of them")
_OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")

_CONFIG_RULES: dict[str, Rule] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "max_position_embeddings", "original_max_position_embeddings", "sliding_window"), _COUNT),
    "num_hidden_layers": _LAYERS,
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _FLAG),
    **dict.fromkeys(("hidden_act", "dtype", "torch_dtype"), _TEXT),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECT),
    "rms_norm_eps": _NUMBER, "rope_theta": _POSITIVE, "eos_token_id": _IDS, "partial_rotary_factor": _SHARE,
}
_ROPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT), "original_max_position_embeddings": _COUNT,
    **dict.fromkeys(("factor", "rope_theta", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"),
                    _POSITIVE),
    **dict.fromkeys(("short_factor", "long_factor"), _NUMBERS), "partial_rotary_factor": _SHARE,
}
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "dtype", "torch_dtype", "rope_parameters", "rope_scaling", "eos_token_id",
                "attention_factor", "beta_fast", "beta_slow", "sliding_window", "partial_rotary_factor"}


def check_values(raw: Mapping[str, Any], path: Path) -> None:
    """Raise ``CheckpointError``, naming file and key, for a value that can't be, whatever transformers makes of it."""
    parts = [("", raw, _CONFIG_RULES)]
    parts += [(f"{part}.", raw[part], _ROPE_RULES) for part in ("rope_parameters", "rope_scaling")
              if isinstance(raw.get(part), dict)]
    for where, values, rules in parts:
        for key, (holds, rule) in rules.items():
            value = values.get(key)
            if key in values and not (value is None and key in _MAY_BE_NULL) and not holds(value):
                raise CheckpointError(f"file={path}: {where}{key}={short(value)} must be {rule}: correct it")

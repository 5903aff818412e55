"""In which layouts an architecture is tried: its base, other sizes to cut, and every option that its config class has.

A layout changes one thing of the tiny config. What there is to change is read off the class: a boolean is turned over, what is
off is turned on, a choice takes each of its other values. There is no list of architectures: the next release's are read alike.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from reference.shrink import HEADS, INTERMEDIATE, OWN_HEAD_DIM, VOCABULARY, WINDOW, tiny_config

# What is returned, stored, trained, or computed by which code, and not what is computed.
NO_ARITHMETIC = re.compile(
    r"output_\w+|return_\w+|use_cache\w*|is_decoder|is_encoder_decoder|add_cross_attention|use_\w*kernels?|use_mambapy|use_mems_\w+"
    r"|use_associative_scan|use_mem_eff_path|summary_\w+|\w*dropout\w*|\w*init\w*|router_aux\w*|slow_but_exact|\w*in_fp32|mtp_\w+"
    r"|reorder_and_upcast_attn|rescale_prenorm_residual|problem_type|norm_reduction_force_float32|asm|use_weighted_layer_sum"
    r"|apply_spec_augment")
# Of what is off (None or 0), the value that turns it on.
TURNED_ON: Mapping[str, Any] = {
    "attention_chunk_size": WINDOW, "attn_logit_softcapping": 5.0, "clip_qkv": 0.5, "final_logit_softcapping": 5.0,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_kv_shared_layers": 1, "num_shared_experts": 1, "pad_token_id": 7,
    "q_lora_rank": 24, "shared_intermediate_size": INTERMEDIATE, "sliding_window": WINDOW, "swiglu_limit": 1.0,
}
# Sizes to cut: by the name that all architectures share, or by any name of this form.
SIZES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("num_key_value_heads", (1, 2, HEADS // 2, HEADS)),  # fewer than ranks, as many, more, as many as query heads
    ("head_dim", (2 * OWN_HEAD_DIM,)),
    ("vocab_size", (VOCABULARY + 1,)),
    (r"(\w+_)?intermediate_size", (INTERMEDIATE + 1, 9)),  # 9 over 4 by ceiling: 3, 3, 3 and nothing
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A way to set up an architecture.

    name             ``base``, or what is changed
    changes          fields of the tiny config, as ``reference.shrink.tiny_config`` takes them
    expert_parallel  whether whole experts are dealt to ranks
    own_names        whether the checkpoint has the model's own tensors in place of those of the hub's files
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    expert_parallel: bool = False
    own_names: bool = False


BASE = Layout(name="base")


def layouts_of(architecture: str, sizes: Callable[[Any], dict[str, Any]] = lambda config: {}) -> list[Layout]:
    """The base first; of the rest those whose field the config has, with another value.

    Args:
        architecture: a ``model_type``.
        sizes: of a tiny config what must be otherwise in all of them (``Subject.tiny_sizes``).
    """
    try:
        tiny = tiny_config(architecture)
        own = sizes(tiny)
        config = tiny_config(architecture, **own).get_text_config(decoder=True)
    except Exception:  # a library's, of any kind: the base row tells of it
        return [BASE]
    values = _values(config)
    changes = {f"{name}={value}": Layout(name=f"{name}={value}", changes={name: value})
               for name, value in (*_sizes(values), *_options(config, values)) if values[name] != value}
    layouts = [BASE, *changes.values()]
    if getattr(type(config), "base_model_ep_plan", None):
        layouts.append(Layout(name="expert parallel", expert_parallel=True))
    if get_checkpoint_conversion_mapping(config.model_type):
        layouts.append(Layout(name="own names", own_names=True))
    return [replace(layout, changes={**own, **layout.changes}) for layout in layouts]


def _values(config: PretrainedConfig) -> dict[str, Any]:
    """By the names that all architectures share, where there is one, and else by the config's own."""
    values = config.to_dict()
    own = type(config).attribute_map
    shared = {name: values[field] for name, field in own.items() if field in values}
    return {**{name: value for name, value in values.items() if name not in own.values()}, **shared}


def _sizes(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for pattern, sizes in SIZES:
        for name, value in values.items():
            if re.fullmatch(pattern, name) and isinstance(value, int) and value > 0:
                yield from ((name, size) for size in sizes)


def _options(config: PretrainedConfig, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    choices = _choices(type(config))
    for name, value in values.items():
        if NO_ARITHMETIC.fullmatch(name):
            continue
        if isinstance(value, bool):
            yield name, not value
        elif not value and name in TURNED_ON:
            yield name, TURNED_ON[name]
        yield from ((name, other) for other in choices.get(name, ()))


def _choices(config_class: type) -> dict[str, tuple[Any, ...]]:
    """The values that a field may have, where the class's type hints list them."""
    found = {}
    for name, hint in getattr(config_class, "__annotations__", {}).items():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                found[name] = typing.get_args(part)
    return found

"""In which layouts an architecture is tried: its base, and changes of its config that tensor parallelism has to deal with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reference.shrink import tiny_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A way to set up an architecture.

    name             ``base``, or what is changed
    changes          fields of the tiny config, as ``reference.shrink.tiny_config`` takes them
    expert_parallel  whether whole experts are dealt to ranks
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    expert_parallel: bool = False


BASE = Layout(name="base")


def layouts_of(architecture: str) -> list[Layout]:
    """The base first; of the rest those whose field the config has, with another value."""
    try:
        config = tiny_config(architecture).get_text_config()
    except Exception:  # a library's, of any kind: the base row tells of it
        return [BASE]
    layouts = [BASE]
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if isinstance(value := getattr(config, name, None), bool):
            layouts.append(Layout(name=f"{name}={not value}", changes={name: not value}))
    if getattr(type(config), "base_model_ep_plan", None):
        layouts.append(Layout(name="expert parallel", expert_parallel=True))
    return layouts

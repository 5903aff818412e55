"""One file a check, with one object ``CHECK``. Their order is that in which they run: what the later ones rest on comes first."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.checks.base import Check

CHECK_NAMES = ("collectives", "weights", "layers", "attention", "kv", "logits", "generation", "lifecycle")
"""The modules here that are checks. To name them loads none of them."""

ON_REQUEST = ("invariance",)
"""Those that run only where they are asked for by name: of a mode that is not the one that the others verify."""

PRELOAD = ("harness.subjects.engine", *(f"harness.checks.{name}" for name in CHECK_NAMES),
           "transformers.models.llama.configuration_llama")
"""For ``Ranks``: what every rank needs, and what takes seconds to import; Llama's config brings what all configs need."""


@cache
def all_checks() -> dict[str, Check]:
    """The checks by name."""
    return {name: import_module(f"harness.checks.{name}").CHECK for name in (*CHECK_NAMES, *ON_REQUEST)}

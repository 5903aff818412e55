"""One file a check. Their order here is the order in which they run: what the later ones rest on comes first."""

from __future__ import annotations

from harness.checks.attention import check_attention
from harness.checks.base import Check
from harness.checks.collectives import check_collectives
from harness.checks.generation import check_generation
from harness.checks.kv import check_kv
from harness.checks.layers import check_layers
from harness.checks.lifecycle import check_lifecycle
from harness.checks.logits import check_logits
from harness.checks.weights import check_weights

CHECKS: dict[str, Check] = {
    "collectives": check_collectives,
    "weights": check_weights,
    "layers": check_layers,
    "attention": check_attention,
    "kv": check_kv,
    "logits": check_logits,
    "generation": check_generation,
    "lifecycle": check_lifecycle,
}

WITHOUT_SUBJECT = frozenset({"collectives", "layers", "attention", "lifecycle"})
"""Checks that build what they test by themselves: they run also where the model does not load."""

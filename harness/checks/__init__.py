"""One file a check. Their order here is the order in which they run: what the later ones rest on comes first."""

from __future__ import annotations

from harness.checks.base import Check
from harness.checks.collectives import check_collectives
from harness.checks.generation import check_generation
from harness.checks.layers import check_layers
from harness.checks.logits import check_logits
from harness.checks.weights import check_weights

CHECKS: dict[str, Check] = {
    "collectives": check_collectives,
    "weights": check_weights,
    "layers": check_layers,
    "logits": check_logits,
    "generation": check_generation,
}

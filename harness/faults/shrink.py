"""The smallest case in which a fault still shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.checks.base import Outcome
from harness.checks.logits import MODEL
from harness.faults.base import Fault
from harness.faults.models import BROKE, FULL, FaultModels, Planted, Size

LADDER = (
    Size(num_layers=1, schedule_lengths=(1,)),
    Size(num_layers=1, schedule_lengths=(2,)),
    Size(num_layers=1, schedule_lengths=(2, 2)),
    Size(num_layers=1, schedule_lengths=(5, 3)),
    Size(num_layers=1, schedule_lengths=(17,)),
    Size(num_layers=1, schedule_lengths=FULL.schedule_lengths),
    Size(num_layers=2, schedule_lengths=(2,)),
    FULL,
)
"""From the smallest up: the first in which ``logits`` shows the fault is reported. Other checks tell their own."""


def smallest_case(models: FaultModels, planted: Planted, fault: Fault, tp_size: int, outcomes: Mapping[str, Outcome]) -> str:
    """The smallest case that is red: one layer or collective, or a small model and few tokens. Empty if nothing is red."""
    red = {name: outcome for name, outcome in outcomes.items() if outcome.finding is not None}
    for name, outcome in red.items():
        if "smallest_case" in outcome.extra:
            return f"{name}: {outcome.extra['smallest_case']}"
    if "logits" in red and not red["logits"].extra.get(BROKE):  # ranks that hang take their time at any size
        contexts = ((size, models.context(fault.layout, tp_size, size)) for size in LADDER)
        # At full size it was red before.
        size = next(size for size, context in contexts if size == FULL or _is_red(planted.run("logits", context)))
        return f"logits: {describe(size)}"
    return "; ".join(f"{name}: {(outcome.finding or '').splitlines()[0]}" for name, outcome in list(red.items())[:1])


def _is_red(kinds: Sequence[Outcome]) -> bool:
    """The model's own logits: those of the other kinds are of one size."""
    return any(outcome.finding is not None for outcome in kinds if outcome.kind in ("", MODEL))


def describe(size: Size) -> str:
    """``1 layer, one sequence of 2 tokens``."""
    lengths = size.schedule_lengths
    layers = f"{size.num_layers} layer{'s' if size.num_layers > 1 else ''}"
    if len(lengths) == 1:
        return f"{layers}, one sequence of {lengths[0]} token{'s' if lengths[0] > 1 else ''}"
    return f"{layers}, {len(lengths)} sequences of {', '.join(map(str, lengths))} tokens"

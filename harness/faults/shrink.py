"""The smallest case in which a fault still shows."""

from __future__ import annotations

from collections.abc import Mapping

from harness.checks.base import Outcome
from harness.faults.base import Fault
from harness.faults.workshop import BROKE, FULL, Planted, Size, Workshop

LADDER = (
    Size(num_layers=1, script_lengths=(1,), prompt_lengths=(1,)),
    Size(num_layers=1, script_lengths=(2,), prompt_lengths=(2,)),
    Size(num_layers=1, script_lengths=(2, 2), prompt_lengths=(2, 2)),
    Size(num_layers=1, script_lengths=(5, 3), prompt_lengths=(5, 3)),
    Size(num_layers=1, script_lengths=(17,), prompt_lengths=(17,)),
    Size(num_layers=1, script_lengths=FULL.script_lengths, prompt_lengths=FULL.prompt_lengths),
    Size(num_layers=2, script_lengths=(2,), prompt_lengths=(2,)),
    FULL,
)
"""From the smallest up: the first that shows the fault is reported."""
WHOLE_MODEL = ("logits", "generation")
"""Checks whose cases are as large as the model and its prompts."""


def smallest_case(shop: Workshop, planted: Planted, fault: Fault, tp_size: int, outcomes: Mapping[str, Outcome]) -> str:
    """The smallest case that is red: one layer or collective, or a small model and few tokens. Empty if nothing is red."""
    red = {name: outcome for name, outcome in outcomes.items() if outcome.finding is not None}
    for name, outcome in red.items():
        if "smallest_case" in outcome.extra:
            return f"{name}: {outcome.extra['smallest_case']}"
    for name, outcome in red.items():
        if name in WHOLE_MODEL and not outcome.extra.get(BROKE):  # ranks that hang take their time at any size
            contexts = ((size, shop.context(fault.layout, tp_size, size)) for size in LADDER)
            # At full size it was red before.
            size = next(size for size, context in contexts if size == FULL or planted.run(name, context).finding is not None)
            return f"{name}: {describe(size, name)}"
    return "; ".join(f"{name}: {(outcome.finding or '').splitlines()[0]}" for name, outcome in list(red.items())[:1])


def describe(size: Size, name: str) -> str:
    """``1 layer, a sequence of 2 tokens``."""
    lengths = size.script_lengths if name == "logits" else size.prompt_lengths
    what = "sequence" if name == "logits" else "prompt"
    layers = f"{size.num_layers} layer{'s' if size.num_layers > 1 else ''}"
    if len(lengths) == 1:
        return f"{layers}, one {what} of {lengths[0]} token{'s' if lengths[0] > 1 else ''}"
    return f"{layers}, {len(lengths)} {what}s of {', '.join(map(str, lengths))} tokens"

"""What a benchmark asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.bench.figures import Answered, TokenTimes
from harness.bench.workloads import Limits, Requests

LARGEST_BATCH = 64
"""Of transformers' ``generate``, which pads every sequence of a batch to the longest, in a cache that is copied when it grows;
larger batches of ragged requests run out of memory. Batches hold requests of like length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """How an engine is started. Prefix caching is off everywhere, since rounds repeat their prompts.

    sequence_lens   lengths that must fit into the cache at once; engines that size it themselves get ``memory_share``
    memory_share    of a GPU's memory, where several engines take turns on it
    """

    folder: Path
    tp_size: int
    fabric: str
    device: str
    dtype: str
    limits: Limits
    sequence_lens: tuple[int, ...]
    memory_share: float = 0.9


class Engine(Protocol):
    """An engine that is ready. Its class takes (spec, folder of the weights, without a tokenizer).

    Every request is to get exactly the tokens that it asks for: end-of-sequence tokens don't end it. An engine tells how many
    came back, counted in its answers and without the prompts: what it was asked for is no evidence.
    """

    fabric: str
    """What joins its ranks, for the record; ``own`` for a peer's."""

    def generate(self, requests: Requests, temperature: float) -> Answered:
        """Run until every request is done, nobody watching."""

    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        """When each token of each request came, as somebody sees it who reads along."""

    def peak_device_bytes(self) -> int | None:
        """Most memory held on all GPUs together; None if it can't tell."""

    def close(self) -> None:
        """Free everything."""

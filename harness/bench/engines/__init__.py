"""Engines that can run a serving workload: the one of this project, and peers that are used where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from harness.bench.workloads import Limits, Requests

if TYPE_CHECKING:  # it brings numpy, which the command line's help must not wait for
    from harness.bench.figures import Answered, TokenTimes

OWN = "shardproof"
REFERENCE = "transformers"
"""The single-device Hugging Face reference, a peer of every workload that it can run in reasonable time."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """How to find an engine, and what it can do.

    target           ``module:class``, imported in the engine's own process only
    needs            the package that must be importable
    devices          on which it runs
    largest_tp_size  None: any
    """

    target: str
    needs: str
    devices: tuple[str, ...] = ("cuda",)
    largest_tp_size: int | None = None

    def load(self) -> Callable[..., Engine]:
        """The engine's class."""
        module, _, name = self.target.partition(":")
        found: Callable[..., Engine] = getattr(importlib.import_module(module), name)
        return found

    def why_not(self, name: str, *, device: str) -> str | None:
        """Why it can't run here; None if it can."""
        if importlib.util.find_spec(self.needs) is None:
            return f"the package {self.needs} is not installed"
        return None if device in self.devices else f"{name} does not run on device={device}"


_HERE = "harness.bench.engines"
ENGINES: dict[str, EngineKind] = {
    OWN: EngineKind(target=f"{_HERE}.shardproof_engine:ShardproofEngine", needs="engine", devices=("cpu", "cuda")),
    "shardproof-invariant": EngineKind(target=f"{_HERE}.shardproof_engine:InvariantEngine", needs="engine",
                                       devices=("cpu", "cuda")),
    "transformers": EngineKind(target=f"{_HERE}.transformers_engine:GenerateEngine", needs="transformers",
                               devices=("cpu", "cuda"), largest_tp_size=1),
    "transformers-cb": EngineKind(target=f"{_HERE}.transformers_engine:ContinuousBatchingEngine", needs="transformers",
                                  largest_tp_size=1),
    "vllm": EngineKind(target=f"{_HERE}.vllm_engine:VllmEngine", needs="vllm"),
    "nanovllm": EngineKind(target=f"{_HERE}.nanovllm_engine:NanoVllmEngine", needs="nanovllm"),
}
PEERS = {name: kind for name, kind in ENGINES.items() if name != OWN}

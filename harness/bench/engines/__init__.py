"""Engines that can run a serving workload: the one of this project, and peers that are used where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it brings numpy, which the command line's help must not wait for
    from harness.bench.engines.base import Engine

OWN = "shardproof"
REFERENCE = "transformers"
"""The single-device Hugging Face reference, a peer of every workload that it can run in reasonable time."""


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
        module, _, name = self.target.partition(":")
        found: Callable[..., Engine] = getattr(importlib.import_module(module), name)
        return found

    def why_not(self, name: str, *, device: str) -> str | None:
        """Why it can't run here; None if it can."""
        if importlib.util.find_spec(self.needs) is None:
            return f"the package {self.needs} is not installed"
        return None if device in self.devices else f"{name} does not run on device={device}"


ENGINES: dict[str, EngineKind] = {
    OWN: EngineKind(target="harness.bench.engines.shardproof_engine:ShardproofEngine", needs="engine", devices=("cpu", "cuda")),
    "transformers": EngineKind(target="harness.bench.engines.transformers_engine:GenerateEngine", needs="transformers",
                               devices=("cpu", "cuda"), largest_tp_size=1),
    "transformers-cb": EngineKind(target="harness.bench.engines.transformers_engine:ContinuousBatchingEngine",
                                  needs="transformers", largest_tp_size=1),
    "vllm": EngineKind(target="harness.bench.engines.vllm_engine:VllmEngine", needs="vllm"),
    "nanovllm": EngineKind(target="harness.bench.engines.nanovllm_engine:NanoVllmEngine", needs="nanovllm"),
}
PEERS = {name: kind for name, kind in ENGINES.items() if name != OWN}

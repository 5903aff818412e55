"""What a benchmark run is to measure, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import DTYPES
from harness.bench.engines import PEERS, REFERENCE
from harness.bench.workloads import REFERENCE_ROUNDS, GenerateWork, Work, works_of
from harness.names import FABRICS


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """What to measure, and on what.

    Args:
        model: as the user named it, for the report; ``folder`` is where it lies.
        peers: engines beside our own; None: the Hugging Face reference, where it takes reasonable time.
        cases: only works whose case holds one of these texts, and none of those that are several cases; empty: all.
        rounds: instead of each workload's own number.
        against: another checkout of this project, which takes turns with this one, round by round.
        slower: layer -> share of its work that the candidate does on top, to see whether a comparison finds it.
    """

    model: str
    folder: Path
    workloads: tuple[str, ...]
    tp_sizes: tuple[int, ...] = (1,)
    fabric: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    peers: tuple[str, ...] | None = None
    cases: tuple[str, ...] = ()
    rounds: int | None = None
    against: Path | None = None
    seed: int = 0
    slower: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [work.case for work in works_of(self.workloads) if work.case is not None]
        if unknown := [text for text in self.cases if not any(text in name for name in names)]:
            raise ValueError(f"cases={unknown} are in no case of workloads={list(self.workloads)}; cases that can be had alone: "
                             f"{'; '.join(names) or 'none'}")
        if not self.tp_sizes or min(self.tp_sizes) < 1 or len(set(self.tp_sizes)) != len(self.tp_sizes):
            raise ValueError(f"tp_sizes={self.tp_sizes} must be one or several different numbers of at least 1")
        if self.fabric not in FABRICS:
            raise ValueError(f"fabric={self.fabric!r} is unknown; supported: {', '.join(FABRICS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r} is unknown; supported: auto, cpu, cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no GPU")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; supported: auto, {', '.join(DTYPES)}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if unknown := [peer for peer in self.peers or () if peer not in PEERS]:
            raise ValueError(f"peers={unknown} are unknown; there are: {', '.join(PEERS)}, and none")
        if self.against is not None and not (self.against / "harness" / "bench" / "measuring.py").is_file():
            raise ValueError(f"against={self.against} is no checkout of this project with benchmarks that this one can drive "
                             "(harness/bench/measuring.py): name another, or compare two reports")

    @property
    def works(self) -> list[Work]:
        """What is to be measured, in order."""
        return [work for work in works_of(self.workloads)
                if not self.cases or any(text in (work.case or "") for text in self.cases)]

    def peers_of(self, work: GenerateWork) -> tuple[str, ...]:
        """The engines that run it beside our own."""
        if self.peers is None:
            return (REFERENCE,) if work.reference else ()
        return self.peers

    def rounds_of(self, work: Work, engine: str) -> int:
        """Rounds of one participant, after its first run."""
        rounds = self.rounds or work.rounds
        return min(rounds, REFERENCE_ROUNDS) if engine == REFERENCE else rounds

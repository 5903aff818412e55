"""What a benchmark run is to measure, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.config import DTYPES, EngineConfig, ModelConfig
from harness.bench.engines import PEERS, REFERENCE
from harness.bench.memory import Memory, too_large
from harness.bench.workloads import GenerateCase, GeneratePart, Limits, Part, StartPart, parts_of
from harness.errors import UsageError, usage

FABRICS = ("auto", "gloo", "threads", "nccl")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """What to measure, and on what.

    Args:
        model: as the user named it, for the report; ``folder`` is where it lies.
        peers: engines beside our own; None: the Hugging Face reference, where it takes reasonable time.
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
    rounds: int | None = None
    against: Path | None = None
    seed: int = 0
    slower: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts_of(self.workloads)
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
        if self.against is not None and not (self.against / "harness" / "bench" / "worker.py").is_file():
            raise ValueError(f"against={self.against} is no checkout of this project that has benchmarks")

    def with_folder(self, folder: Path) -> BenchPlan:
        """The same plan, once the model is there."""
        return replace(self, folder=folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A plan with all that follows from the machine and the model."""

    plan: BenchPlan
    config: ModelConfig
    device: str
    dtype: str
    parts: tuple[Part, ...]
    unfit: tuple[tuple[str, str, str], ...]
    """(workload, case, why) of cases that the model can't run."""

    @classmethod
    def of(cls, plan: BenchPlan) -> Setting:
        """
        Raises:
            UsageError: if the model can't be run as planned.
        """
        config = ModelConfig.from_folder(plan.folder)
        if too_many := [tp_size for tp_size in plan.tp_sizes if tp_size > config.num_q_heads]:
            raise UsageError(f"tp_sizes={too_many} are above num_q_heads={config.num_q_heads} of the model: every rank needs "
                             "at least one query head")
        with usage():
            resolved = EngineConfig(device=plan.device, dtype=plan.dtype).resolve(config)
        parts: list[Part] = []
        unfit: list[tuple[str, str, str]] = []
        for part in parts_of(plan.workloads):
            if isinstance(part, GeneratePart):
                fit, too_long = _fit(part, config.max_position_embeddings)
                unfit += too_long
                if fit.cases:
                    parts.append(fit)
            elif isinstance(part, StartPart):
                parts.append(StartPart(limits=_limits(part.limits, config.max_position_embeddings), rounds=part.rounds))
            else:
                parts.append(part)
        setting = cls(plan=plan, config=config, device=resolved.device, dtype=resolved.dtype, parts=tuple(parts),
                      unfit=tuple(unfit))
        return setting if setting.device == "cuda" else setting._within_memory()

    def _within_memory(self) -> Setting:
        """Without the cases for which the memory of a CPU is too small: what it would lack shows only when all are at work."""
        serving = [part for part in self.parts if isinstance(part, GeneratePart)]
        refused = too_large(Memory(config=self.config, itemsize=DTYPES[self.dtype].itemsize), serving, self.peers_of,
                            tp_sizes=self.plan.tp_sizes, num_sides=1 if self.plan.against is None else 2)
        parts = [replace(part, cases=tuple(case for case in part.cases if (part.workload, case.case) not in refused))
                 if isinstance(part, GeneratePart) else part for part in self.parts]
        return replace(self, parts=tuple(part for part in parts if not isinstance(part, GeneratePart) or part.cases),
                       unfit=(*self.unfit, *((workload, case, why) for (workload, case), why in refused.items())))

    def rounds_of(self, own: int) -> int:
        """The plan's rounds, or else the workload's own."""
        return self.plan.rounds or own

    def peers_of(self, case: GenerateCase) -> tuple[str, ...]:
        """The engines that run a case beside our own."""
        if self.plan.peers is None:
            return (REFERENCE,) if case.reference else ()
        return self.plan.peers

    def fabric_of(self, tp_size: int) -> str:
        """What joins the ranks."""
        return "auto" if tp_size == 1 else self.plan.fabric


def _limits(limits: Limits, longest: int) -> Limits:
    return Limits(max_model_len=min(limits.max_model_len, longest), max_num_seqs=limits.max_num_seqs,
                  max_num_batched_tokens=limits.max_num_batched_tokens)


def _fit(part: GeneratePart, longest: int) -> tuple[GeneratePart, list[tuple[str, str, str]]]:
    """The part with the cases that a model of ``longest`` positions can run; and (workload, case, why not) of the others."""
    cases, too_long = [], []
    for case in part.cases:
        needed = max(len(prompt) + num_tokens for prompt, num_tokens in case.draw())
        if needed <= longest:
            cases.append(case)
        else:
            too_long.append((part.workload, case.case, f"needs {needed} positions, and the model has {longest}"))
    return GeneratePart(workload=part.workload, limits=_limits(part.limits, longest), cases=tuple(cases)), too_long

"""Who takes part in a workload: an engine of one side at one tp_size, in its own worker, and what it could do at best."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import DTYPES
from harness.bench import micro, serving
from harness.bench.bounds import Ceilings, ModelSize, all_reduce_bytes, decode_step_s, generate_s, prefill_s
from harness.bench.collectives import Problems, size_of_case
from harness.bench.engines.base import EngineSpec
from harness.bench.figures import Figures
from harness.bench.layers import LayerWork
from harness.bench.plan import Setting
from harness.bench.worker import Worker
from harness.bench.workloads import CollectivesPart, GenerateCase, LayersPart, LoadPart, Requests, StartPart
from reports.records import NotMeasured

Measured = dict[tuple[str, str], Figures]
"""(case, engine) -> figures of one round"""
Block = GenerateCase | LayersPart | CollectivesPart | StartPart | str
"""What one round measures: a case, or all cases of a part; the name of a case where that says all."""
NVLINK_ALL_REDUCE_S = 5e-6
"""The least that an all-reduce of a few KiB is taken to cost between GPUs; one-shot over NVLink takes 6 µs in a graph."""
CALL_TIMEOUT_S = 1800.0
ALL_ROUNDS = sys.maxsize


ENGINE_CASE, ONE_THREAD_CASE = "as the engine runs", "one thread"
"""Cases of the hardware's own rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A checkout of this project."""

    name: str
    checkout: Path


@dataclass(slots=True, kw_only=True, eq=False)
class Hardware:
    """The best figures of the hardware's own rows in this run, by case; empty if they could not be measured."""

    best: dict[str, Figures] = field(default_factory=dict)

    def of_engine(self, device: str) -> Ceilings | None:
        """Of one rank that has the whole machine, or a whole GPU."""
        figures = self.best.get(ENGINE_CASE)
        if figures is None:
            return None
        return Ceilings(copy_bytes_per_s=figures["copy_gb_per_s"] * 1e9, matmul_flop_per_s=figures["matmul_tflop_per_s"] * 1e12,
                        all_reduce_s=NVLINK_ALL_REDUCE_S if device == "cuda" else 0.0)

    def get(self, case: str, metric: str) -> float | None:
        """The best of a metric; None if it was not measured."""
        return self.best.get(case, {}).get(metric)


@dataclass(slots=True, kw_only=True, eq=False)
class Participant:
    """Base: what the rounds need. ``measure`` gives the figures of one round of a block, a case or a whole part."""

    setting: Setting
    side: Side
    engine: str
    tp_size: int
    worker: Callable[[], Worker]
    """Starts it if it does not run."""
    fabric: str = ""
    rounds: int = ALL_ROUNDS
    """At most, where it is too slow for all of them."""

    def open(self) -> None:
        """Make ready. What this costs is no part of any round."""
        raise NotImplementedError

    def measure(self, block: Any) -> Measured:
        """One round of a block."""
        raise NotImplementedError

    def bounds(self, block: Any, case: str, hardware: Hardware) -> Figures:
        """What the hardware could do at best, of those metrics of ``case`` for which that is known."""
        return {}

    def memory(self) -> Figures:
        """``memory_gib``, the most that all of the engine's ranks have held together; empty if unknown."""
        return {}

    def not_measured(self, workload: str) -> list[NotMeasured]:
        """What it could not measure of a block."""
        return []

    def close(self) -> None:
        """Free what ``open`` took."""

    def __str__(self) -> str:
        side = "" if self.side.name == "candidate" else f" ({self.side.name})"
        return f"{self.engine}{side} tp {self.tp_size}"


@dataclass(slots=True, kw_only=True, eq=False)
class ServingParticipant(Participant):
    """An engine that serves requests."""

    spec: EngineSpec
    drawn: dict[str, Requests] = field(default_factory=dict)

    def open(self) -> None:
        self.fabric = self.worker().call(serving.start, self.engine, self.spec, timeout_s=CALL_TIMEOUT_S)

    def measure(self, block: GenerateCase) -> Measured:
        figures = self.worker().call(serving.run_case, self._requests(block), block.figures, block.temperature,
                                     timeout_s=CALL_TIMEOUT_S)
        return {(block.case, self.engine): figures}

    def _requests(self, case: GenerateCase) -> Requests:
        if case.case not in self.drawn:
            vocab_size = self.setting.config.vocab_size
            self.drawn[case.case] = [([token % vocab_size for token in prompt], count) for prompt, count in case.draw()]
        return self.drawn[case.case]

    def memory(self) -> Figures:
        peak = self.worker().call(serving.peak_bytes, timeout_s=60.0)
        return {} if peak is None else {"memory_gib": peak / 2**30}

    def bounds(self, block: GenerateCase, case: str, hardware: Hardware) -> Figures:
        found: Figures = {}
        if (ceilings := hardware.of_engine(self.setting.device)) is None:
            return found
        size = ModelSize.of(self.setting.config, DTYPES[self.setting.dtype].itemsize)
        requests = self._requests(block)
        prompt_lens, output_lens = [len(prompt) for prompt, _ in requests], [count for _, count in requests]
        # On a CPU the ceilings are the whole machine's, which ranks share.
        shares = {"tp_size": self.tp_size if self.setting.device == "cuda" else 1}
        if "throughput" in block.figures:
            seconds = generate_s(size, ceilings, prompt_lens=prompt_lens, output_lens=output_lens, **shares)
            found["output_tokens_per_s"] = sum(output_lens) / seconds
        if "prompt" in block.figures:
            seconds = prefill_s(size, ceilings, prompt_lens=prompt_lens, **shares)
            found["prompt_tokens_per_s"] = sum(prompt_lens) / seconds
        if "itl" in block.figures:
            context = prompt_lens[0] + output_lens[0] / 2
            step_s = decode_step_s(size, ceilings, batch_size=len(requests), context=context, **shares)
            found |= {"ms_per_token": 1e3 * step_s, "itl_ms": 1e3 * step_s}
            found = {name: bound for name, bound in found.items() if name != "ms_per_token" or "decode" in block.figures}
        return found


@dataclass(slots=True, kw_only=True, eq=False)
class LayersParticipant(Participant):
    """Parallel layers on fresh ranks."""

    part: LayersPart
    slower: dict[str, float] = field(default_factory=dict)
    works: dict[str, LayerWork] = field(default_factory=dict)
    turns: int = 0

    def open(self) -> None:
        # On a CPU one rank is a process of its own too, so that it is as fresh as several are.
        fabric = "gloo" if self.tp_size == 1 and self.setting.device == "cpu" else self.setting.fabric_of(self.tp_size)
        self.fabric = self.worker().call(micro.open_ranks, self.tp_size, fabric, self.setting.device, timeout_s=CALL_TIMEOUT_S)
        if self.tp_size == 1:
            self.fabric = "solo"
        self.works = self.worker().call(micro.build_layers, self.setting.plan.folder, self.setting.dtype, self.part, self.slower,
                                        timeout_s=CALL_TIMEOUT_S)

    def measure(self, block: LayersPart) -> Measured:
        # The first run belongs to the first ranks' rounds.
        if self.part.fresh_every and self.turns > 1 and (self.turns - 1) % self.part.fresh_every == 0:
            self.open()
        self.turns += 1
        measured: Measured = self.worker().call(micro.measure_layers, self.engine, timeout_s=CALL_TIMEOUT_S)
        return measured

    def bounds(self, block: LayersPart, case: str, hardware: Hardware) -> Figures:
        work = self.works[case]
        if self.setting.device == "cuda":
            ceilings = hardware.of_engine("cuda")
            seconds = None if ceilings is None else ceilings.seconds(num_bytes=work.num_bytes, flop=work.flop)
        else:
            # One thread a rank; weights in the cache are not read from memory.
            rate = hardware.get(ONE_THREAD_CASE, "matmul_tflop_per_s")
            seconds = None if rate is None else work.flop / (rate * 1e12)
            copy = hardware.get(ONE_THREAD_CASE, "copy_gb_per_s")
            if seconds is not None and copy is not None and self.part.rotate_bytes:
                seconds = max(seconds, work.num_bytes / (copy * 1e9))
        return {"call_us": 1e6 * seconds} if seconds else {}

    def close(self) -> None:
        self.worker().call(micro.close_ranks, timeout_s=60.0)


@dataclass(slots=True, kw_only=True, eq=False)
class CollectivesParticipant(Participant):
    """All-reduces on fresh ranks. ``problems``: ways that can't run here, and why."""

    part: CollectivesPart
    problems: Problems = field(default_factory=dict)

    def open(self) -> None:
        worker = self.worker()
        self.fabric = worker.call(micro.open_ranks, self.tp_size, self.setting.fabric_of(self.tp_size), self.setting.device,
                                  timeout_s=CALL_TIMEOUT_S)
        self.problems = worker.call(micro.build_collectives, self.setting.dtype, self.part, timeout_s=CALL_TIMEOUT_S)

    def measure(self, block: CollectivesPart) -> Measured:
        measured: Measured = self.worker().call(micro.measure_collectives, timeout_s=CALL_TIMEOUT_S)
        return measured

    def bounds(self, block: CollectivesPart, case: str, hardware: Hardware) -> Figures:
        path = "gpu_to_gpu_gb_per_s" if self.setting.device == "cuda" else "copy_gb_per_s"
        if (rate := hardware.get(ENGINE_CASE, path)) is None:
            return {}
        message_bytes = size_of_case(self.part.message_bytes, case)
        return {"all_reduce_us": all_reduce_bytes(message_bytes, self.tp_size) / (rate * 1e3)}

    def not_measured(self, workload: str) -> list[NotMeasured]:
        return [NotMeasured(workload=workload, case=case, engine=who, tp_size=self.tp_size, reason=why)
                for (who, case), why in self.problems.items()]

    def close(self) -> None:
        self.worker().call(micro.free_collectives, timeout_s=60.0)
        self.worker().call(micro.close_ranks, timeout_s=60.0)


@dataclass(slots=True, kw_only=True, eq=False)
class LoadParticipant(Participant):
    """Checkpoint to shards on live ranks."""

    part: LoadPart

    def open(self) -> None:
        self.fabric = self.worker().call(micro.open_ranks, self.tp_size, self.setting.fabric_of(self.tp_size),
                                         self.setting.device, timeout_s=CALL_TIMEOUT_S)

    def measure(self, block: str) -> Measured:
        measured: Measured = self.worker().call(micro.measure_load, self.setting.plan.folder, self.setting.dtype, block,
                                                self.engine, timeout_s=CALL_TIMEOUT_S)
        return measured

    def bounds(self, block: str, case: str, hardware: Hardware) -> Figures:
        if self.setting.device == "cuda":
            rate = hardware.get(ENGINE_CASE, "host_to_device_gb_per_s")
            return {"read_gb_per_s": rate * self.tp_size} if rate else {}
        # Every byte that is read is written once more: half of what a copy moves.
        copy = hardware.get(ENGINE_CASE, "copy_gb_per_s")
        return {"read_gb_per_s": copy / 2} if copy else {}

    def close(self) -> None:
        self.worker().call(micro.close_ranks, timeout_s=60.0)


@dataclass(slots=True, kw_only=True, eq=False)
class StartParticipant(Participant):
    """A fresh process each round, until its first token."""

    spec: EngineSpec

    def open(self) -> None:
        """Nothing: starting is what is measured."""

    def measure(self, block: StartPart) -> Measured:
        prompt = [1 + number % (self.setting.config.vocab_size - 1) for number in range(block.prompt_len)]
        started = time.perf_counter()
        with Worker(str(self), checkout=self.side.checkout) as worker:
            self.fabric = worker.call(serving.first_token, self.engine, self.spec, prompt, timeout_s=CALL_TIMEOUT_S)
            seconds = time.perf_counter() - started
        return {("start to first token", self.engine): {"start_s": seconds}}


@dataclass(slots=True, kw_only=True, eq=False)
class HardwareParticipant(Participant):
    """The machine itself. Its rows give everybody's bounds."""

    def open(self) -> None:
        self.fabric = self.worker().call(micro.open_ranks, 1, "solo", self.setting.device, timeout_s=CALL_TIMEOUT_S)

    def measure(self, block: str) -> Measured:
        measured: Measured = self.worker().call(micro.measure_hardware, self.setting.dtype, _threads_of(block), block,
                                                self.engine, timeout_s=CALL_TIMEOUT_S)
        return measured

    def close(self) -> None:
        self.worker().call(micro.close_ranks, timeout_s=60.0)


def _threads_of(case: str) -> int | None:
    return 1 if case == ONE_THREAD_CASE else None

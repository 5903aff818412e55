"""Who takes part in what: the steps of a run, and the participants of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness.bench.engines import ENGINES, OWN, REFERENCE
from harness.bench.engines.base import EngineSpec
from harness.bench.participants import (
    ALL_ROUNDS,
    ENGINE_CASE,
    ONE_THREAD_CASE,
    CollectivesParticipant,
    HardwareParticipant,
    LayersParticipant,
    LoadParticipant,
    Participant,
    ServingParticipant,
    Side,
    StartParticipant,
)
from harness.bench.plan import Setting
from harness.bench.step import Outcome, Step
from harness.bench.worker import CHECKOUT, Worker
from harness.bench.workloads import (
    REFERENCE_ROUNDS,
    CollectivesPart,
    GenerateCase,
    GeneratePart,
    LayersPart,
    Limits,
    LoadPart,
    StartPart,
)
from reports.compare import HARDWARE
from reports.records import NotMeasured

CANDIDATE, BASELINE = "candidate", "baseline"
HARDWARE_ROUNDS = 3
MICRO = "micro"
"""The worker of a side for what needs no engine."""


class Workers:
    """The workers of a run, started when they are first needed."""

    def __init__(self) -> None:
        self._workers: dict[tuple[str, ...], Worker] = {}

    def get(self, side: Side, *role: str) -> Worker:
        """The side's worker for this role; a new one in place of one that has died."""
        key = (side.name, *role)
        if key not in self._workers or self._workers[key].is_closed:
            self._workers[key] = Worker(" ".join(key), checkout=side.checkout)
        return self._workers[key]

    def first_micro(self, side: Side, setting: Setting) -> Worker:
        """The side's first worker for what needs no engine, which also speaks for its machine."""
        return self.get(side, MICRO, str(setting.plan.tp_sizes[0]))

    def close_engines(self) -> None:
        """End the workers of all engines: their memory and threads are no part of what comes next."""
        self._close([key for key in self._workers if key[1] != MICRO])

    def close(self, *, at_once: bool = False) -> None:
        """End them all, in good order or at once."""
        self._close(list(self._workers), at_once=at_once)

    def _close(self, keys: list[tuple[str, ...]], *, at_once: bool = False) -> None:
        leaving = [self._workers.pop(key) for key in keys]
        for worker in leaving:
            worker.hang_up()  # so that they go all at the same time
        for worker in leaving:
            if at_once:
                worker.close(grace_s=0)
            else:
                worker.close()


class Steps:
    """Makes the steps of a run, and says who is missing."""

    def __init__(self, setting: Setting, workers: Workers, outcome: Outcome) -> None:
        self.setting = setting
        self.workers = workers
        self.outcome = outcome
        self.sides = [Side(name=CANDIDATE, checkout=CHECKOUT)]
        if setting.plan.against is not None:
            self.sides.append(Side(name=BASELINE, checkout=Path(setting.plan.against).absolute()))

    def steps(self, *, with_hardware: bool) -> Iterator[Step]:
        """In the order in which they run."""
        if with_hardware:
            for case in (ENGINE_CASE, ONE_THREAD_CASE) if self.setting.device == "cpu" else (ENGINE_CASE,):
                yield Step(self.setting, HARDWARE, case, self._hardware, HARDWARE_ROUNDS)
        for workload, case, reason in self.setting.unfit:
            self.outcome.miss(NotMeasured(workload=workload, case=case, engine=OWN, reason=reason))
        for part in self.setting.parts:
            if isinstance(part, GeneratePart):
                for case_ in part.cases:
                    yield Step(self.setting, part.workload, case_, partial(self._serving, part, case_),
                               self.setting.rounds_of(case_.rounds))
            elif isinstance(part, LoadPart):
                for name in part.cases:
                    yield Step(self.setting, part.workload, name, partial(self._load, part), self.setting.rounds_of(part.rounds))
            elif isinstance(part, CollectivesPart) and set(self.setting.plan.tp_sizes) == {1}:
                self.outcome.miss(NotMeasured(workload=part.workload, engine=OWN, tp_size=1,
                                              reason="one rank has nobody to reduce with"))
            else:
                yield Step(self.setting, part.workload, part, partial(self._whole, part), self.setting.rounds_of(part.rounds))

    def _whole(self, part: LayersPart | CollectivesPart | StartPart) -> Sequence[Participant]:
        if isinstance(part, StartPart):
            return self._start(part)
        return self._layers(part) if isinstance(part, LayersPart) else self._collectives(part)

    def _hardware(self) -> list[Participant]:
        side = self.sides[0]
        return [HardwareParticipant(setting=self.setting, side=side, engine="torch", tp_size=1,
                                  worker=partial(self.workers.first_micro, side, self.setting))]

    def _serving(self, part: GeneratePart, case: GenerateCase) -> list[Participant]:
        return [
            ServingParticipant(setting=self.setting, side=side, engine=name, tp_size=tp_size,
                             worker=partial(self.workers.get, side, name, str(tp_size)), spec=self._serving_spec(part, tp_size),
                             rounds=REFERENCE_ROUNDS if name == REFERENCE else ALL_ROUNDS)
            for side, name, tp_size in self._engines(part.workload, self.setting.peers_of(case))
        ]

    def _start(self, part: StartPart) -> list[Participant]:
        self.workers.close_engines()
        return [
            StartParticipant(setting=self.setting, side=side, engine=name, tp_size=tp_size, worker=partial(_no_worker, name),
                           spec=self._spec(part.limits, tp_size, (part.limits.max_model_len,), 0.9))
            for side, name, tp_size in self._engines(part.workload, self.setting.plan.peers or ())
        ]

    def _layers(self, part: LayersPart) -> list[Participant]:
        slower = self.setting.plan.slower
        return [LayersParticipant(**own, slower=slower if own["side"] is self.sides[0] else {}) for own in self._own(part)]

    def _collectives(self, part: CollectivesPart) -> list[Participant]:
        return [CollectivesParticipant(**own) for own in self._own(part) if own["tp_size"] > 1]

    def _load(self, part: LoadPart) -> list[Participant]:
        return [LoadParticipant(**own) for own in self._own(part)]

    def _own(self, part: LayersPart | CollectivesPart | LoadPart) -> list[dict[str, Any]]:
        """What every participant of the project's own is made of: one for each tp_size and side."""
        self.workers.close_engines()
        return [{"setting": self.setting, "side": side, "engine": OWN, "tp_size": tp_size, "part": part,
                 "worker": partial(self.workers.get, side, MICRO, str(tp_size))}
                for tp_size in self.setting.plan.tp_sizes for side in self.sides]

    def _engines(self, workload: str, peers: Sequence[str]) -> Iterator[tuple[Side, str, int]]:
        """(side, engine, tp_size) of all who can take part. Peers run once, on the candidate's side."""
        tp_sizes = self.setting.plan.tp_sizes
        for tp_size in tp_sizes:
            yield from ((side, OWN, tp_size) for side in self.sides)
        for name in peers:
            kind = ENGINES[name]
            # One that runs on a single device only has one row, which stands for every tp_size.
            for tp_size in dict.fromkeys(min(tp_size, kind.largest_tp_size or tp_size) for tp_size in tp_sizes):
                reason = kind.why_not(name, device=self.setting.device)
                if reason is None:
                    yield self.sides[0], name, tp_size
                else:
                    self.outcome.miss(NotMeasured(workload=workload, engine=name, tp_size=tp_size, reason=reason))

    def _serving_spec(self, part: GeneratePart, tp_size: int) -> EngineSpec:
        # Started once for all cases of all parts with these limits, so with room for the largest of them.
        members = [member for member in self.setting.parts if isinstance(member, GeneratePart) and member.limits == part.limits]
        cases = [case for member in members for case in member.cases]
        largest = max(([len(prompt) + count for prompt, count in case.draw()] for case in cases), key=sum)
        num_peers = max(len(self.setting.peers_of(case)) for case in cases)
        num_engines = len(self.setting.plan.tp_sizes) * len(self.sides) + num_peers
        return self._spec(part.limits, tp_size, tuple(largest), 0.9 / num_engines)

    def _spec(self, limits: Limits, tp_size: int, sequence_lens: tuple[int, ...], memory_share: float) -> EngineSpec:
        return EngineSpec(folder=self.setting.plan.folder, tp_size=tp_size, fabric=self.setting.fabric_of(tp_size),
                          device=self.setting.device, dtype=self.setting.dtype, vocab_size=self.setting.config.vocab_size,
                          limits=limits, sequence_lens=sequence_lens, memory_share=memory_share)


def _no_worker(name: str) -> Worker:
    raise AssertionError(f"{name} has no lasting worker: starting one is what is measured")

"""``shardproof bench``: candidate, peers and baseline take turns, round by round, and their figures become rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.config import DTYPES, EngineConfig, ModelConfig
from harness.bench import measuring
from harness.bench.engines import ENGINES, OWN
from harness.bench.figures import Figures, Measured
from harness.bench.measurement import Ready, Task
from harness.bench.memory import Memory, too_large
from harness.bench.plan import BenchPlan
from harness.bench.serving import ShortAnswerError
from harness.bench.worker import CHECKOUT, CLOSE_S, Worker, WorkerError
from harness.bench.workloads import (
    ENGINE_CASE,
    ONE_THREAD_CASE,
    CollectivesWork,
    GenerateWork,
    HardwareWork,
    LayersWork,
    Limits,
    Work,
)
from harness.errors import UsageError, usage
from reports.compare import HARDWARE
from reports.metrics import direction
from reports.records import BenchRow, NotMeasured, RecordError, Report, RunInfo

CANDIDATE, BASELINE = "candidate", "baseline"
"""The two checkouts that can take turns."""
MICRO = "micro"
CALL_TIMEOUT_S = 1800.0
_SHORT_CALL_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Reports by side: ``candidate``, and ``baseline`` if there is one. ``failed``: the project's own engine did not run."""

    reports: dict[str, Report]
    interrupted: bool
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Whom to tell while a benchmark runs."""

    on_status: Callable[[str], None] = lambda text: None
    on_row: Callable[[str, BenchRow], None] = lambda side, row: None
    on_missing: Callable[[NotMeasured], None] = lambda item: None


class Workers:
    """The workers of a run, started when they are first needed, by (side, engine or "micro" for what needs none, tp_size)."""

    def __init__(self) -> None:
        self._workers: dict[tuple[str, str, int], Worker] = {}

    def get(self, side: str, role: str, tp_size: int, checkout: Path) -> Worker:
        """A new one in place of one that has died."""
        key = (side, role, tp_size)
        if key not in self._workers or self._workers[key].is_closed:
            self._workers[key] = Worker(" ".join(map(str, key)), checkout=checkout)
        return self._workers[key]

    def close(self, *, but_micro: bool = False, grace_s: float = CLOSE_S) -> None:
        """End them all, or those of engines: their memory and threads are no part of what comes next."""
        leaving = [self._workers.pop(key) for key in list(self._workers) if not (but_micro and key[1] == MICRO)]
        for worker in leaving:
            worker.hang_up()  # so that they go all at the same time
        for worker in leaving:
            worker.close(grace_s=grace_s)


@dataclass(slots=True, kw_only=True, eq=False)
class Participant:
    """An engine of one side at one tp_size, in a worker of its own.

    samples    (case, engine) -> figures of the first run, then of each round
    is_active  until its worker fails
    """

    task: Task
    side: str
    rounds: int
    worker: Callable[[], Worker]
    ready: Ready = field(default_factory=Ready)
    samples: dict[tuple[str, str], list[Figures]] = field(default_factory=dict)
    is_active: bool = True

    def start(self) -> None:
        """Make ready. What this costs is no part of any round."""
        self.ready = self.worker().call(measuring.start, self.task, timeout_s=CALL_TIMEOUT_S)

    def measure(self) -> Measured:
        """One round."""
        measured: Measured = self.worker().call(measuring.measure, timeout_s=CALL_TIMEOUT_S)
        return measured

    def memory(self) -> Figures:
        """``memory_gib``, if it is known."""
        held: Figures = self.worker().call(measuring.memory, timeout_s=_SHORT_CALL_S)
        return held

    def finish(self) -> None:
        """Free what the task took."""
        self.worker().call(measuring.finish, timeout_s=_SHORT_CALL_S)

    def __str__(self) -> str:
        return f"{self.task.engine}{'' if self.side == CANDIDATE else f' ({self.side})'} tp {self.task.tp_size}"


class FreshParticipant(Participant):
    """Starts a process each round: ``worker`` gives a new one, and how long it takes is what is measured."""

    def start(self) -> None:
        """Nothing, before the first round."""

    def measure(self) -> Measured:
        started = time.perf_counter()
        with self.worker() as worker:
            self.ready = worker.call(measuring.start, self.task, timeout_s=CALL_TIMEOUT_S)
            worker.call(measuring.measure, timeout_s=CALL_TIMEOUT_S)
            seconds = time.perf_counter() - started
        return {(self.task.work.case, self.task.engine): {"start_s": seconds}}

    def memory(self) -> Figures:
        return {}

    def finish(self) -> None:
        """Nothing is left."""


def run_bench(plan: BenchPlan, watcher: Watcher | None = None, *, argv: list[str] | None = None, workers: Workers | None = None,
              with_hardware: bool = True) -> BenchResult:
    """Run the plan. Ctrl-C ends it early: what is finished is in the reports, and so is what is not.

    Args:
        plan: what to measure.
        watcher: told how far the run is.
        argv: the command line, for the report.
        workers: those of an earlier run, to go on with; they stay, unless it is interrupted.
        with_hardware: measure the hardware's ceilings first; without them no row has a bound.

    Raises:
        ValueError: if the model can't be run as planned.
        WorkerError: if not even the first worker starts.
    """
    started_at = datetime.now(UTC)
    run = BenchRun(plan, watcher or Watcher(), workers or Workers())
    works = run.works
    if with_hardware:
        cases = {ENGINE_CASE: None, ONE_THREAD_CASE: 1} if run.device == "cpu" else {ENGINE_CASE: None}
        works = [*(HardwareWork(workload=HARDWARE, case=case, num_threads=count) for case, count in cases.items()), *works]
    heads: dict[str, RunInfo] = {}
    interrupted = True  # whatever ends it but a last step that is done
    try:
        for side, checkout in run.sides.items():
            run.watcher.on_status(f"starting {side}")
            heads[side] = run.workers.get(side, MICRO, plan.tp_sizes[0], checkout).call(
                measuring.describe, "bench", started_at, plan.seed, argv if argv is not None else ["shardproof", *sys.argv[1:]],
                timeout_s=_SHORT_CALL_S)
        interrupted = not run.measure_all(works)
    finally:
        if interrupted or workers is None:
            run.workers.close(grace_s=0.0 if interrupted else CLOSE_S)
    seconds = (datetime.now(UTC) - started_at).total_seconds()
    reports = {side: Report(run=replace(head, seconds=seconds), benches=run.rows[side], not_measured=run.missing)
               for side, head in heads.items()}
    return BenchResult(reports=reports, interrupted=interrupted, failed=run.failed)


class BenchRun:
    """A plan on this machine, and what it has brought so far.

    works     what the model can run and the memory holds; the others are among ``missing``
    rows      by side
    hardware  the best figures of the hardware's own rows, by case
    failed    some of the project's own engine could not be measured, for it broke

    Raises:
        UsageError: if the model can't be run as planned.
    """

    def __init__(self, plan: BenchPlan, watcher: Watcher, workers: Workers) -> None:
        self.plan, self.watcher, self.workers = plan, watcher, workers
        self.config = ModelConfig.from_folder(plan.folder)
        num_q_heads = self.config.num_q_heads
        if too_many := [tp_size for tp_size in plan.tp_sizes if tp_size > num_q_heads]:
            raise UsageError(f"tp_sizes={too_many} are above num_q_heads={num_q_heads} of the model: every rank needs at least "
                             "one query head")
        with usage():
            resolved = EngineConfig(device=plan.device, dtype=plan.dtype).resolve(self.config)
        self.device, self.dtype = resolved.device, resolved.dtype
        self.sides = {CANDIDATE: CHECKOUT} | ({BASELINE: plan.against.absolute()} if plan.against else {})
        self.rows: dict[str, list[BenchRow]] = {side: [] for side in self.sides}
        self.missing: list[NotMeasured] = []
        self.hardware: dict[str, Figures] = {}
        self.failed = False
        self._limits: Limits | None = None  # of the engines that are at work
        unfit = self._unfit(works := plan.works)
        self.works = [work for work in works if work not in unfit]
        for work, reason in unfit.items():
            self.miss(work, OWN, reason)

    def _unfit(self, works: Sequence[Work]) -> dict[Work, str]:
        """Works that can't be measured here, and why."""
        unfit: dict[Work, str] = {}
        longest = self.config.max_position_embeddings
        fit: list[GenerateWork] = []
        for work in works:
            if isinstance(work, CollectivesWork) and set(self.plan.tp_sizes) == {1}:
                unfit[work] = "one rank has nobody to reduce with"
            elif isinstance(work, GenerateWork):
                needed = max(len(prompt) + num_tokens for prompt, num_tokens in work.draw())
                if needed > longest:
                    unfit[work] = f"needs {needed} positions, and the model has {longest}"
                elif not work.is_fresh:
                    fit.append(work)
        if self.device == "cpu":  # what a CPU's memory would lack shows only when all are at work
            memory = Memory(config=self.config, itemsize=DTYPES[self.dtype].itemsize)
            unfit |= too_large(memory, fit, self.plan.peers_of, tp_sizes=self.plan.tp_sizes, num_sides=len(self.sides))
        return unfit

    def measure_all(self, works: Sequence[Work]) -> bool:
        """Measure one after the other. False if it was interrupted; what is not measured is then among the missing."""
        for number, work in enumerate(works):
            try:
                self.measure(work)
            except KeyboardInterrupt:
                for left in works[number + 1 :]:
                    self.miss(left, OWN, "interrupted before it began")
                return False
        return True

    def measure(self, work: Work) -> None:
        """Everybody's first run, then rounds in turns, then rows.

        Raises:
            KeyboardInterrupt: on Ctrl-C, once what is finished is among the rows.
        """
        everyone: list[Participant] = []
        try:
            self._make_room(work)
            everyone += self.participants(work)
            with ExitStack() as stack:
                for participant in everyone:
                    self.watcher.on_status(f"{work.workload}: starting {participant}")
                    with self._guard(participant):
                        participant.start()
                        stack.callback(self._finish, participant)
                for turn in range(max((each.rounds for each in everyone), default=0) + 1):
                    self._run_turn(turn, everyone)
                for participant in everyone:
                    self._make_rows(participant)
        except KeyboardInterrupt:
            # The workers may be in the middle of something: ask them nothing more.
            for participant in everyone:
                self._make_rows(participant, ask_worker=False)
                done = min((len(figures) - 1 for figures in participant.samples.values()), default=0)
                if done < participant.rounds:
                    self.miss(work, participant.task.engine, f"interrupted after {done} of {participant.rounds} rounds",
                              tp_size=participant.task.tp_size)
            if not everyone:
                self.miss(work, OWN, "interrupted before it began")
            raise

    def _make_room(self, work: Work) -> None:
        """End the engines that ``work`` can't go on with, all of them before the first of its own starts."""
        limits = work.limits if isinstance(work, GenerateWork) and not work.is_fresh else None
        if limits is None or limits != self._limits:
            self.workers.close(but_micro=True)
        self._limits = limits

    def participants(self, work: Work) -> list[Participant]:
        """All who can take part, once for each tp_size: both sides' own engine, and peers on the candidate's side."""
        if isinstance(work, HardwareWork):
            return [self._participant(work, CANDIDATE, "torch", 1, worker_size=self.plan.tp_sizes[0])]
        tp_sizes = self.plan.tp_sizes
        everyone = [self._participant(work, side, OWN, tp_size) for tp_size in tp_sizes for side in self.sides
                    if tp_size > 1 or not isinstance(work, CollectivesWork)]
        for name in self.plan.peers_of(work) if isinstance(work, GenerateWork) else ():
            kind = ENGINES[name]
            reason = kind.why_not(name, device=self.device)
            # One that runs on a single device only has one row, which stands for every tp_size.
            for tp_size in dict.fromkeys(min(tp_size, kind.largest_tp_size or tp_size) for tp_size in tp_sizes):
                if reason is None:
                    everyone.append(self._participant(work, CANDIDATE, name, tp_size))
                else:
                    self.miss(work, name, reason, tp_size=tp_size, case=None)
        return everyone

    def _participant(self, work: Work, side: str, engine: str, tp_size: int, worker_size: int | None = None) -> Participant:
        task = Task(work=work, engine=engine, folder=self.plan.folder, tp_size=tp_size, device=self.device, dtype=self.dtype,
                    fabric="auto" if tp_size == 1 else self.plan.fabric, hardware=self.hardware)
        if isinstance(work, GenerateWork):
            vocab_size = self.config.vocab_size
            requests = [([token % vocab_size for token in prompt], count) for prompt, count in work.draw()]
            # An engine is started once for all works of these limits, so with room for the largest of them.
            alike = [work] if work.is_fresh else [other for other in self.works if isinstance(other, GenerateWork)
                                                  and not other.is_fresh and other.limits == work.limits]
            largest = max(([len(prompt) + count for prompt, count in each.draw()] for each in alike), key=sum)
            num_engines = len(self.plan.tp_sizes) * len(self.sides) + max(len(self.plan.peers_of(each)) for each in alike)
            # Cut to the model's here, so that a worker need not read its config before it starts the engine.
            work = replace(work, limits=work.limits.within(self.config.max_position_embeddings))
            task = replace(task, work=work, requests=requests, sequence_lens=tuple(largest),
                           memory_share=0.9 if work.is_fresh else 0.9 / num_engines)
        elif isinstance(work, LayersWork) and side == CANDIDATE:
            task = replace(task, slower=self.plan.slower)
        checkout, rounds = self.sides[side], self.plan.rounds_of(work, engine)
        if isinstance(work, GenerateWork) and work.is_fresh:
            return FreshParticipant(task=task, side=side, rounds=rounds,
                                    worker=lambda: Worker(f"{side} {engine} {tp_size}", checkout=checkout))
        role = engine if isinstance(work, GenerateWork) else MICRO
        return Participant(task=task, side=side, rounds=rounds,
                           worker=lambda: self.workers.get(side, role, worker_size or tp_size, checkout))

    def _run_turn(self, turn: int, everyone: Sequence[Participant]) -> None:
        active = [participant for participant in everyone if participant.is_active]
        # Nobody always comes first: who does finds the machine as the last one left it.
        shift = turn % max(1, len(active))
        for participant in active[shift:] + active[:shift]:
            if turn > participant.rounds:
                continue
            work = participant.task.work
            what = "first run" if turn == 0 else f"round {turn} of {participant.rounds}"
            self.watcher.on_status(f"{work.workload}{f' {work.case}' if work.case else ''}: {participant}, {what}")
            with self._guard(participant):
                for key, figures in participant.measure().items():
                    participant.samples.setdefault(key, []).append(figures)

    def _make_rows(self, participant: Participant, *, ask_worker: bool = True) -> None:
        task, work = participant.task, participant.task.work
        memory: Figures = {}
        if ask_worker and participant.is_active:
            with self._guard(participant):
                memory = participant.memory()
        for (case, engine), (first, *rounds) in participant.samples.items():
            if not rounds:
                continue
            bounds = {f"bound_{name}": bound for name, bound in participant.ready.bounds.get(case, {}).items()}
            try:
                row = BenchRow(
                    workload=work.workload, case=case, engine=engine, tp_size=task.tp_size, dtype=task.dtype,
                    # The machine and its collectives are the same for every model.
                    model="" if isinstance(work, HardwareWork | CollectivesWork) else self.plan.model,
                    fabric=participant.ready.fabric, first=first, axes=work.axes_of(case), metrics=memory | bounds,
                    samples={name: [figures[name] for figures in rounds] for name in rounds[0]},
                )
            except RecordError as error:  # a figure that can't be one, such as no time at all
                self.failed |= engine == OWN
                self.miss(work, engine, f"its figures make no sense: {error}", case=case, tp_size=task.tp_size, verdict="error")
            else:
                self.add(participant.side, row)
        for (who, where), why in participant.ready.problems.items():
            self.miss(work, who, why, case=where, tp_size=task.tp_size)

    def add(self, side: str, row: BenchRow) -> None:
        """Note a row."""
        self.rows[side].append(row)
        self.watcher.on_row(side, row)
        if row.workload == HARDWARE:
            self.hardware[row.case] = {name: (max if direction(name) == "higher" else min)(values)
                                       for name, values in row.samples.items()}

    def miss(self, work: Work, engine: str, reason: str, **fields: Any) -> None:
        """Note what is not measured, once; by default all tp_sizes of the work's case, if it has one."""
        item = NotMeasured(**{"workload": work.workload, "case": work.case, "engine": engine, "reason": reason} | fields)
        if item not in self.missing:
            self.missing.append(item)
            self.watcher.on_missing(item)

    @contextmanager
    def _guard(self, participant: Participant) -> Iterator[None]:
        """A participant whose worker fails takes no further part, and the others go on."""
        try:
            yield
        except WorkerError as failure:
            participant.is_active = False
            if failure.kind == ShortAnswerError.__name__:
                participant.samples.clear()  # what it did in the other rounds is in doubt as well
            task = participant.task
            self.failed |= task.engine == OWN
            self.miss(task.work, task.engine, failure.summary, tp_size=task.tp_size, verdict="error", traceback=str(failure))

    def _finish(self, participant: Participant) -> None:
        if participant.is_active:
            with self._guard(participant):
                participant.finish()

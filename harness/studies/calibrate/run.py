"""``shardproof calibrate``: sample, fit, judge and measure power, each part in an interpreter of its own."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from harness.bench.worker import Worker
from harness.machine import run_info
from harness.studies.calibrate import DEFAULT_MODELS
from harness.studies.calibrate.draws import DTYPES, ORDERS, Pools, sample_models
from harness.studies.calibrate.judge import DRAWN, SETTINGS, judge_models
from harness.studies.calibrate.power import TP_SIZES as POWER_TP_SIZES
from harness.studies.calibrate.power import power_of_drawn, power_of_logits
from harness.studies.calibrate.report import make_report
from reports.records import Report

MODELS_PER_TASK = 3
SAMPLING, JUDGING, PLANTING = "sampling models", "judging runs of checks", "planting errors"
OnProgress = Callable[[str, int, int], None]
"""(what is done, tasks of it done, in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A part that can run by itself: ``function(pools, draw, *args)``, an iterator over what it finds."""

    what: str
    name: str
    """Its draws follow from it: a task finds the same whatever runs beside it."""
    function: Callable[..., Iterator[Any]]
    args: tuple[Any, ...]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratePlan:
    """How much of everything is drawn. ``models`` float32 models are judged under every setting, a third of that in 16 bits."""

    models: int = DEFAULT_MODELS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.models < 1:
            raise ValueError(f"models={self.models} must be at least 1")

    def tasks(self) -> list[Task]:
        """All that is to be done, what takes longest first."""
        tasks: list[Task] = []

        def add(what: str, name: str, function: Callable[..., Iterator[Any]], *args: Any,
                environ: Mapping[str, str] | None = None, is_slow: bool = False) -> None:
            task = Task(what=what, name=f"{self.seed}/{what}/{name}", function=function, args=args, environ=environ or {})
            tasks.insert(0 if is_slow else len(tasks), task)

        for dtype in DTYPES:
            for orders in ORDERS:
                for first, count in _chunks(2 * self.models // len(DTYPES) or 1, orders):
                    add(SAMPLING, f"{orders} {dtype} {first}", sample_models, dtype, orders, count, is_slow=orders == ORDERS[1])
            for setting, environ in SETTINGS.items():
                for first, count in _chunks(self.models if dtype == "float32" else -(-self.models // 3), setting):
                    add(JUDGING, f"{setting} {dtype} {first}", judge_models, setting, dtype, count, environ=environ,
                        is_slow=setting == DRAWN)
            planted = 7 * self.models
            for check in ("collectives", "layers"):
                for tp_size in POWER_TP_SIZES:
                    add(PLANTING, f"{check} {dtype} {tp_size}", power_of_drawn, check, dtype, tp_size, planted)
            for first in range(0, planted, self.models):
                add(PLANTING, f"logits {dtype} {first}", power_of_logits, dtype, min(self.models, planted - first))
        return tasks


def _chunks(num_models: int, orders: str) -> Iterator[tuple[int, int]]:
    """(first, how many) of the models of each task: of drawn orders, which are slow, one at a time."""
    size = 1 if orders in (DRAWN, ORDERS[1]) else MODELS_PER_TASK
    for first in range(0, num_models, size):
        yield first, min(size, num_models - first)


def calibrate(plan: CalibratePlan, on_progress: OnProgress = lambda what, done, total: None) -> tuple[Report, bool]:
    """The report, and whether it was interrupted: then it holds what was finished, and names what was not."""
    started_at = datetime.now(UTC)
    tasks = plan.tasks()
    totals, done = Counter(task.what for task in tasks), Counter[str]()
    found: dict[int, list[Any]] = {}
    try:
        for what, total in totals.items():
            on_progress(what, 0, total)
        for number, results in in_workers(tasks):
            found[number] = results
            what = tasks[number].what
            done[what] += 1
            on_progress(what, done[what], totals[what])
    except KeyboardInterrupt:
        pass
    samples, verdicts, thresholds = (
        list(chain.from_iterable(found[number] for number in sorted(found) if tasks[number].what == what))
        for what in (SAMPLING, JUDGING, PLANTING))
    left = {what: f"{done[what]} of {total} parts done" for what, total in totals.items() if done[what] < total}
    report = make_report(samples, verdicts, thresholds, left=left,
                         run=lambda: run_info("calibrate", started_at=started_at, seed=plan.seed))
    return report, bool(left)


def in_workers(tasks: Sequence[Task]) -> Iterator[tuple[int, list[Any]]]:
    """(number of the task, what it found), as they are done. As many interpreters at a time as there are cores."""
    workers: list[Worker] = []

    def work(number: int, task: Task) -> tuple[int, list[Any]]:
        # One thread each: the tiny products of tiny models, and as many interpreters as cores.
        workers.append(worker := Worker(task.name, environ={"OMP_NUM_THREADS": "1", **task.environ}))
        with worker:
            return number, worker.call(run_task, task.function, task.name, task.args)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(work, number, task) for number, task in enumerate(tasks)]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:  # after Ctrl-C some are at work: a worker that is gone ends its call
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close(grace_s=0)


def run_task(state: dict[str, Any], function: Callable[..., Iterator[Any]], name: str, args: tuple[Any, ...]) -> list[Any]:
    """In a worker: all that the task finds."""
    return list(function(state.setdefault("pools", Pools()), random.Random(name), *args))

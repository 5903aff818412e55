"""``shardproof calibrate``: sample, fit, judge and measure power, in parts that run in other interpreters."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, cycle, repeat
from typing import Any, Literal

import torch

from harness.bench.worker import Worker, WorkerError
from harness.machine import run_info
from harness.studies.calibrate import DEFAULT_MODELS
from harness.studies.calibrate.draws import DTYPES, FABRICS, LARGEST_TP, ORDERS, Pools, sample_models
from harness.studies.calibrate.judge import AS_IT_IS, DRAWN, SETTINGS, judge_models, runs_here
from harness.studies.calibrate.power import TP_SIZES as POWER_TP_SIZES
from harness.studies.calibrate.power import power_of_drawn, power_of_logits
from harness.studies.calibrate.report import make_report
from reports.records import Report
from reports.rows import NotMeasured

MODELS_PER_TASK = 3
WORKERS_PER_GPU = 8
"""They take turns on it. Ranks on several GPUs that wait for each other there must not: theirs run one after the other."""
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
    """How much of everything is drawn. ``models`` float32 models are judged under every setting, a third of that in 16 bits.

    On GPUs the 16-bit dtypes alone, with as many models, and the arithmetic that there is: kernels there know no setting, and no
    drawn order.
    """

    models: int = DEFAULT_MODELS
    seed: int = 0
    device: str = "cpu"
    fabric: str = "threads"

    def __post_init__(self) -> None:
        if self.models < 1:
            raise ValueError(f"models={self.models} must be at least 1")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} must be cpu or cuda")
        if self.fabric not in FABRICS[self.device]:
            raise ValueError(f"fabric={self.fabric!r} on device={self.device!r} must be one of {', '.join(FABRICS[self.device])}")
        if self.fabric == "nccl" and torch.cuda.device_count() < 2:
            raise ValueError(f"fabric='nccl' needs two GPUs or more, torch sees {torch.cuda.device_count()}")

    @property
    def on_gpus(self) -> bool:
        return self.device == "cuda"

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(dtype for dtype in DTYPES if dtype != "float32" or not self.on_gpus)

    @property
    def num_workers(self) -> int:
        """Interpreters at a time."""
        cores = len(os.sched_getaffinity(0))
        if not self.on_gpus:
            return cores
        return 1 if self.fabric == "nccl" else min(cores, WORKERS_PER_GPU * max(1, torch.cuda.device_count()))

    def environs(self) -> Iterator[dict[str, str]]:
        """Of one task after the other: threads share a GPU, and tasks are dealt to the GPUs in turn."""
        if not self.on_gpus or self.fabric == "nccl":
            return repeat({})
        own = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = own.split(",") if own else map(str, range(torch.cuda.device_count()))
        return cycle([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}])

    def pools(self) -> Pools:
        """For one task; the interpreter's own."""
        return Pools(self.device, self.fabric, torch.cuda.device_count() if self.fabric == "nccl" else LARGEST_TP)

    def settings(self) -> dict[str, Mapping[str, str]]:
        """What is judged under: on a CPU all that it can be held to."""
        return {name: environ for name, environ in SETTINGS.items() if (name == AS_IT_IS if self.on_gpus else runs_here(environ))}

    def tasks(self) -> list[Task]:
        """All that is to be done, what takes longest first."""
        tasks: list[Task] = []
        settings, orders_drawn = self.settings(), ORDERS[:1] if self.on_gpus else ORDERS
        gpus = self.environs()

        def add(what: str, name: str, function: Callable[..., Iterator[Any]], *args: Any,
                environ: Mapping[str, str] | None = None, is_slow: bool = False) -> None:
            task = Task(what=what, name=f"{self.seed}/{what}/{name}", function=function, args=args,
                        environ=next(gpus) | dict(environ or {}))
            tasks.insert(0 if is_slow else len(tasks), task)

        for dtype in self.dtypes:
            for orders in orders_drawn:
                for first, count in self._chunks(2 * self.models // len(DTYPES) or 1, orders):
                    add(SAMPLING, f"{orders} {dtype} {first}", sample_models, dtype, orders, count, is_slow=orders == ORDERS[1])
            for setting, environ in settings.items():
                for first, count in self._chunks(self.models if dtype == "float32" or self.on_gpus else -(-self.models // 3),
                                                 setting):
                    add(JUDGING, f"{setting} {dtype} {first}", judge_models, setting, dtype, count, environ=environ,
                        is_slow=setting == DRAWN)
            planted = 7 * self.models
            for check in ("collectives", "layers"):
                for tp_size in self.pools().sizes(POWER_TP_SIZES):
                    add(PLANTING, f"{check} {dtype} {tp_size}", power_of_drawn, check, dtype, tp_size, planted)
            for first in range(0, planted, self.models):
                add(PLANTING, f"logits {dtype} {first}", power_of_logits, dtype, min(self.models, planted - first))
        return tasks

    def _chunks(self, num_models: int, orders: str) -> Iterator[tuple[int, int]]:
        """(first, how many) of the models of each task: one at a time where it is slow, in drawn orders and on GPUs."""
        size = 1 if self.on_gpus or orders in (DRAWN, ORDERS[1]) else MODELS_PER_TASK
        for first in range(0, num_models, size):
            yield first, min(size, num_models - first)


def calibrate(plan: CalibratePlan, on_progress: OnProgress = lambda what, done, total: None) -> tuple[Report, bool]:
    """The report, and whether it was interrupted: then it holds what was finished, and names what was not.

    A part whose interpreter dies, or that raises, ends itself alone.
    """
    started_at = datetime.now(UTC)
    tasks = plan.tasks()
    totals, done = Counter(task.what for task in tasks), Counter[str]()
    found: dict[int, list[Any]] = {}
    missing: list[NotMeasured] = []
    try:
        for what, total in totals.items():
            on_progress(what, 0, total)
        for number, results in in_workers(tasks, plan):
            what = tasks[number].what
            if isinstance(results, WorkerError):
                missing.append(_not_measured(tasks[number].name, results.summary, "error"))
            else:
                found[number] = results
            done[what] += 1
            on_progress(what, done[what], totals[what])
    except KeyboardInterrupt:
        pass
    samples, verdicts, thresholds = (
        list(chain.from_iterable(found[number] for number in sorted(found) if tasks[number].what == what))
        for what in (SAMPLING, JUDGING, PLANTING))
    left = [_not_measured(what, f"interrupted: {done[what]} of {total} parts done")
            for what, total in totals.items() if done[what] < total]
    judged, capability = plan.settings(), torch.backends.cpu.get_cpu_capability()
    lacking = [_not_measured(f"{JUDGING}: {name}", f"this CPU lacks the instructions: torch computes with {capability}")
               for name in SETTINGS if name not in judged and not plan.on_gpus]
    report = make_report(samples, verdicts, thresholds, missing=[*missing, *left, *lacking],
                         run=lambda: run_info("calibrate", started_at=started_at, seed=plan.seed))
    return report, bool(left)


def _not_measured(case: str, reason: str, verdict: Literal["skipped", "error"] = "skipped") -> NotMeasured:
    return NotMeasured(workload="calibrate", engine="", case=case, reason=reason, verdict=verdict)


def in_workers(tasks: Sequence[Task], plan: CalibratePlan) -> Iterator[tuple[int, list[Any] | WorkerError]]:
    """(number of the task, what it found or why it ended), as they are done."""
    workers: list[Worker] = []
    idle: dict[tuple[tuple[str, str], ...], list[Worker]] = {}

    def work(number: int, task: Task) -> tuple[int, list[Any] | WorkerError]:
        # One thread each: the tiny products of tiny models, and as many interpreters as cores.
        environ = {"OMP_NUM_THREADS": "1", **task.environ}
        alike = idle.setdefault(tuple(sorted(environ.items())), [])
        try:
            worker = alike.pop()
            worker.name = task.name
        except IndexError:
            workers.append(worker := Worker(task.name, environ=environ))
        try:
            found = worker.call(run_task, plan, task.function, task.name, task.args)
        except WorkerError as failure:
            worker.close(grace_s=0)
            return number, failure
        if plan.on_gpus:  # to start one, and ranks on GPUs, takes longer than most tasks
            alike.append(worker)
        else:
            worker.close()
        return number, found

    with ThreadPoolExecutor(plan.num_workers) as pool:
        futures = [pool.submit(work, number, task) for number, task in enumerate(tasks)]
        try:
            for future in as_completed(futures):
                yield future.result()
            for worker in workers:
                worker.hang_up()  # so that they go all at the same time
            for worker in workers:
                worker.close()
        finally:  # after Ctrl-C some are at work: a worker that is gone ends its call
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close(grace_s=0)


def run_task(state: dict[str, Any], plan: CalibratePlan, function: Callable[..., Iterator[Any]], name: str,
             args: tuple[Any, ...]) -> list[Any]:
    """In a worker: all that the task finds. Ranks stay for the worker's next task, and end with it."""
    if "pools" not in state:
        state["pools"] = plan.pools()
    return list(function(state["pools"], random.Random(name), *args))

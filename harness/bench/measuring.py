"""What the driver calls in a worker, whichever checkout it runs: start a task, measure it round by round, finish it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from harness.bench.ceilings import HardwareMeasurement
from harness.bench.collectives import CollectivesMeasurement
from harness.bench.figures import Figures, Measured
from harness.bench.layers import LayersMeasurement
from harness.bench.loading import LoadMeasurement
from harness.bench.measurement import Measurement, Ready, Task
from harness.bench.serving import ServingMeasurement
from harness.bench.workloads import CollectivesWork, GenerateWork, HardwareWork, LayersWork, LoadWork, Work
from harness.machine import run_info
from reports.records import RunInfo

State = dict[str, Any]
_MEASUREMENTS: dict[type[Work], Callable[[Task], Measurement]] = {
    GenerateWork: ServingMeasurement, LayersWork: LayersMeasurement, CollectivesWork: CollectivesMeasurement,
    LoadWork: LoadMeasurement, HardwareWork: HardwareMeasurement,
}
_CURRENT = "measurement"


def describe(state: State, command: str, started_at: datetime, seed: int | None, argv: list[str]) -> RunInfo:
    """The head of the report, as this worker's checkout and interpreter see it."""
    return run_info(command, started_at=started_at, seed=seed, argv=argv)


def start(state: State, task: Task) -> Ready:
    """Make ready, in place of what there was, or as its next task."""
    current: Measurement | None = state.get(_CURRENT)
    if current is None or not current.take(task):
        if current is not None:
            del state[_CURRENT]
            current.close()
        current = state[_CURRENT] = _MEASUREMENTS[type(task.work)](task)
    return current.ready


def measure(state: State) -> Measured:
    """One round."""
    measured: Measured = state[_CURRENT].measure()
    return measured


def memory(state: State) -> Figures:
    """The most memory that was held."""
    held: Figures = state[_CURRENT].memory()
    return held


def finish(state: State) -> None:
    """Free what the task took, but for what a next one goes on with."""
    if not state[_CURRENT].lasts:
        state.pop(_CURRENT).close()

"""Times of short calls: groups of calls in a row on a CPU, CUDA graphs that hold a group on a GPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Calls timed together. ``run`` does them all once and waits for them."""

    run: Callable[[], float]
    """Seconds that it took."""
    num_calls: int
    calls: Sequence[Call]
    """What is timed. A captured graph reads their tensors, and does not keep them alive by itself."""


def group_of(calls: Sequence[Call], num_calls: int, device: torch.device) -> Group:
    """``num_calls`` calls, going round ``calls``. On a GPU they are captured in one CUDA graph."""
    chosen = list(itertools.islice(itertools.cycle(calls), num_calls))
    return _graph_group(chosen, device) if device.type == "cuda" else _eager_group(calls, num_calls)


def _eager_group(calls: Sequence[Call], num_calls: int) -> Group:
    endless = itertools.cycle(calls)  # goes on from group to group, so that every copy of the weights has its turn

    def run() -> float:
        chosen = list(itertools.islice(endless, num_calls))
        started = time.perf_counter()
        for call in chosen:
            call()
        return time.perf_counter() - started

    return Group(run=run, num_calls=num_calls, calls=calls)


def _graph_group(calls: Sequence[Call], device: torch.device) -> Group:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # libraries pick kernels and make workspaces on the first calls
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return Group(run=run, num_calls=len(calls), calls=calls)


def seconds_of_one(call: Call, device: torch.device, *, least_s: float = 0.002) -> float:
    """About how long one call takes, after two to warm up."""
    call()
    call()
    count, started = 0, time.perf_counter()
    while True:
        call()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (taken := time.perf_counter() - started) >= least_s:
            return taken / count


def fastest(group: Group, num_groups: int) -> float:
    """Seconds of one call in the fastest of ``num_groups`` groups: what interrupts a group makes it slower, never faster."""
    return min(group.run() for _ in range(num_groups)) / group.num_calls

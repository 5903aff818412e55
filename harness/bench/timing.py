"""Times of short calls: groups of calls in a row, or CUDA graphs that hold a group."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[], Tensor]


class Group:
    """``num_calls`` calls timed together, going round ``calls``; ``graph``: captured in one CUDA graph."""

    def __init__(self, calls: Sequence[Call], num_calls: int, device: torch.device, *, graph: bool) -> None:
        self.num_calls = num_calls
        self.device = device
        self._calls = calls  # a captured graph reads their tensors, and does not keep them alive by itself
        self._endless = itertools.cycle(calls)  # goes on from group to group, so that every copy of the weights has its turn
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph:
            wait(device)
            with torch.cuda.stream(torch.cuda.Stream(device)):
                self._run_all()  # libraries pick kernels and make workspaces on the first calls
            wait(device)
            self._endless = itertools.cycle(calls)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                self._run_all()
            self._graph = captured

    def run(self) -> float:
        """Do them all once and wait for them; the seconds that it took."""
        if self._graph is not None:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._graph.replay()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3
        chosen = list(itertools.islice(self._endless, self.num_calls))
        wait(self.device)
        started = time.perf_counter()
        for call in chosen:
            call()
        wait(self.device)
        return time.perf_counter() - started

    def fastest(self, num_runs: int) -> float:
        """Seconds of one call in the fastest of some runs: what interrupts a run makes it slower, never faster."""
        return min(self.run() for _ in range(num_runs)) / self.num_calls

    def _run_all(self) -> None:
        for call in itertools.islice(self._endless, self.num_calls):
            call()


def wait(device: torch.device) -> None:
    """Until the device is done; on a CPU it always is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

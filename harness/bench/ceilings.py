"""What the hardware can do, measured beside every benchmark: a copy, a matrix product, and on GPUs the ways in and across."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch

from engine.config import DTYPES
from engine.ranks.ranks import RankContext
from harness.bench.figures import Figures, Measured
from harness.bench.measurement import OnRanks

_REPEATS = {"cpu": 20, "cuda": 5}  # short and many on a CPU: the fastest is one that nobody interrupted
_AT_ONCE = {"cpu": 1, "cuda": 10}  # in a row on a GPU: what the host needs to start and to notice the end is no part of it
_COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}  # beyond any cache
_MATMUL_SIZE = {"cpu": 512, "cuda": 8192}


class HardwareMeasurement(OnRanks):
    """On one rank."""

    def measure(self) -> Measured:
        work = self.task.work
        return {(work.case, self.task.engine): self.run(measure, self.task.dtype, work.num_threads)[0]}


def measure(rank: RankContext, dtype: str, num_threads: int | None) -> Figures:
    """Job: one round. Random data: zeros are multiplied faster, since they draw less power.

    Args:
        rank: where it runs.
        dtype: of the matrices that are multiplied.
        num_threads: on a CPU; None leaves it at what the engine uses.

    Returns:
        ``copy_gb_per_s`` (read and written bytes), ``matmul_tflop_per_s``; on a GPU ``host_to_device_gb_per_s`` from pinned
        memory, and with a second one ``gpu_to_gpu_gb_per_s``.
    """
    rank.phase = "hardware"
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        return _measure(rank.device, DTYPES[dtype])
    finally:
        torch.set_num_threads(before)
        if rank.device.type == "cuda":
            torch.cuda.empty_cache()  # gigabytes that those who come after may need


def _measure(device: torch.device, dtype: torch.dtype) -> Figures:
    num_bytes, size = _COPY_BYTES[device.type], _MATMUL_SIZE[device.type]
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = _fastest(lambda: target.copy_(source), device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul_s = _fastest(lambda: a @ b, device)
    found = {"copy_gb_per_s": 2 * num_bytes / copy_s / 1e9, "matmul_tflop_per_s": 2 * size**3 / matmul_s / 1e12}
    if device.type == "cuda":
        pinned = torch.ones(num_bytes // 16, dtype=torch.float32, pin_memory=True)
        part = target[: pinned.numel()]
        host_s = _fastest(lambda: part.copy_(pinned, non_blocking=True), device)
        found["host_to_device_gb_per_s"] = pinned.numel() * 4 / host_s / 1e9
        if torch.cuda.device_count() > 1:
            other = torch.empty_like(source, device="cuda:1")
            across_s = _fastest(lambda: other.copy_(source), device)
            found["gpu_to_gpu_gb_per_s"] = num_bytes / across_s / 1e9
    return found


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call in the fastest of a few runs, after one to warm up."""
    def run() -> None:
        for _ in range(_AT_ONCE[device.type]):
            work()
        if device.type == "cuda":
            for number in range(torch.cuda.device_count()):
                torch.cuda.synchronize(number)

    return min(timeit.repeat(run, number=1, repeat=_REPEATS[device.type] + 1)[1:]) / _AT_ONCE[device.type]

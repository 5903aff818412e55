"""Checkpoint to shards: how long it takes, and what a rank reads and holds."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from engine.checkpoint.checkpoint_files import weight_files
from engine.config import EngineConfig, ModelConfig
from engine.execution.runner import Runner
from engine.ranks.ranks import RankContext
from harness.bench.figures import Measured
from harness.bench.measurement import OnRanks
from harness.bench.timing import wait
from harness.bench.workloads import COLD, ENGINE_CASE


class LoadMeasurement(OnRanks):
    """The slowest rank's seconds, what all read together, the bytes of the rank that has most."""

    def prepare(self) -> None:
        on_gpu = self.task.device == "cuda"
        rate = self.task.ceiling(ENGINE_CASE, "host_to_device_gb_per_s" if on_gpu else "copy_gb_per_s")
        if rate is not None:
            # On a CPU every byte that is read is written once more: half of what a copy moves.
            self.ready.bounds = {self.task.work.case: {"read_gb_per_s": rate * self.task.tp_size if on_gpu else rate / 2}}

    def measure(self) -> Measured:
        task = self.task
        seconds, read, held = zip(*self.run(load, task.folder, task.dtype, task.work.case), strict=True)
        return {(task.work.case, task.engine): {
            "load_s": max(seconds), "read_gb_per_s": sum(read) / max(seconds) / 1e9, "rank_read_gib": max(read) / 2**30,
            "rank_parameters_gib": max(held) / 2**30}}


def load(rank: RankContext, folder: Path, dtype: str, case: str) -> tuple[float, int, int]:
    """Job: build the model and load this rank's shards, all ranks at once.

    ``files not in memory`` asks the system to drop the checkpoint's files from its page cache first, which it may refuse.

    Returns:
        seconds, bytes that were read, and bytes of parameters.
    """
    rank.phase = "load"
    rank.state.pop("loaded", None)  # the last round's model goes before the next one comes
    if rank.tp.rank == 0 and case == COLD:
        _drop_from_page_cache(folder)
    model = ModelConfig.from_folder(folder)
    config = EngineConfig(tensor_parallel_size=rank.tp.size, device=rank.device.type, dtype=dtype,
                          max_model_len=min(1024, model.max_position_embeddings)).resolve(model)
    rank.tp.barrier()
    started = time.perf_counter()
    runner = rank.state["loaded"] = Runner(folder, model, config, rank.tp, rank.device)
    wait(rank.device)
    report = runner.load_report
    return time.perf_counter() - started, sum(report.bytes_read.values()), report.parameter_bytes


def _drop_from_page_cache(folder: Path) -> None:
    for path in weight_files(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            with suppress(AttributeError, OSError):  # not on every system
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

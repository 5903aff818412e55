"""Checkpoint to shards: how long it takes, and what a rank reads and holds."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.checkpoint_files import weight_files
from engine.config import EngineConfig, ModelConfig
from engine.execution.runner import Runner
from engine.ranks.ranks import RankContext

COLD, WARM = "files not in memory", "files in memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What one rank did."""

    seconds: float
    read_bytes: int
    parameter_bytes: int


def load(rank: RankContext, folder: Path, dtype: str, case: str) -> Loaded:
    """Job: build the model and load this rank's shards, all ranks at once.

    ``files not in memory`` asks the system to drop the checkpoint's files from its page cache first, which it may refuse.
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
    runner = Runner(folder, model, config, rank.tp, rank.device)
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)
    seconds = time.perf_counter() - started
    rank.state["loaded"] = runner
    report = runner.load_report
    return Loaded(seconds=seconds, read_bytes=sum(report.bytes_read.values()), parameter_bytes=report.parameter_bytes)


def _drop_from_page_cache(folder: Path) -> None:
    for path in weight_files(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            with suppress(AttributeError, OSError):  # not on every system
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

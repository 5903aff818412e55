"""What runs inside the ranks: sums over them in another order, an error in one rank's part, and a model's logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.parallel.group import TPGroup
from engine.ranks.ranks import RankContext
from harness.studies.calibrate.groups import RingGroup, SpoilingGroup
from harness.subjects.base import Loaded, Schedule
from harness.subjects.engine_rank import EngineRank
from harness.subjects.on_ranks import load_on

ORDERS = ("flat", "ring")
"""Of summation over the ranks: in float32 and rounded once, as threads do; or along a ring and rounded at every step, as gloo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoiled:
    """A planted error: this rank's part is too large by this much, relatively."""

    tp_rank: int
    error: float


def arrange(rank: RankContext, order: str, spoiled: Spoiled | None = None) -> None:
    """Job: from now on the rank sums in that order, with that error in its part of every sum."""
    own: TPGroup = rank.state.setdefault("own_group", rank.tp)
    group = RingGroup(own) if order == "ring" else own
    rank.tp = group if spoiled is None else SpoilingGroup(group, tp_rank=spoiled.tp_rank, error=spoiled.error)


def load_model(rank: RankContext, folder: Path, dtype: str, options: dict[str, int]) -> None:
    """Job: load the engine, with the sums that are arranged."""
    load_on(rank, EngineRank, Loaded(folder=folder, dtype=dtype, options=options))


def run_logits(rank: RankContext, schedule: Schedule, path: str | None = None, planted: Spoiled | None = None) -> list[Tensor]:
    """Job: the loaded model's logits, from rank 0. ``path``: of the one module whose sum is spoiled."""
    subject = rank.state["subject"]
    if path is None or planted is None:
        return _from_first(rank, subject.logits(schedule))
    module = subject.runner.model.get_submodule(path)
    clean = module.tp
    try:
        module.tp = SpoilingGroup(clean, tp_rank=planted.tp_rank, error=planted.error)
        return _from_first(rank, subject.logits(schedule))
    finally:
        module.tp = clean


def _from_first(rank: RankContext, logits: list[Tensor]) -> list[Tensor]:
    return [torch.cat(logits)] if rank.tp.rank == 0 else []

"""Lifts an implementation that lives inside ranks onto this project's live ranks: a subject by one class, a ``LiveRank``."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.ranks.ranks import RankContext, RankFailure, Ranks, choose_fabric
from harness.checks import PRELOAD
from harness.errors import refusal_of
from harness.subjects.base import Loaded, Placement, Schedule, Subject, SubjectFailure
from harness.subjects.rank import Rank
from reference.checkpoints import CheckpointError
from reference.hf import Activations
from reference.shards import Ownership

BATCH_BYTES = 2**28
"""Shards travel in batches of about so many bytes."""


class LiveRank(Rank):
    """An implementation inside one of ``engine.ranks.Ranks``, made of the context that its jobs get."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.tp_rank, self.tp_size, self.device = context.tp.rank, context.tp.size, context.device

    @property
    def phase(self) -> str:
        return self.context.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self.context.phase = phase


class OnRanks(Subject):
    """A subject whose ranks are ``engine.ranks.Ranks``. Ranks in place of failed ones load again what was loaded."""

    takes_ranks: ClassVar[bool] = True
    rank_class: ClassVar[type[LiveRank]]
    """Importable: it is made inside each rank."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.tp_size = placement.tp_size
        with as_subject_failure():
            self.ranks: Ranks = placement.ranks or Ranks(
                placement.tp_size, fabric=placement.fabric, device=placement.device, job_timeout_s=placement.job_timeout_s,
                collective_timeout_s=placement.collective_timeout_s, auto_restart=placement.auto_restart,
                preload=(*PRELOAD, type(self).__module__))
        self.fabric = self.ranks.fabric

    @classmethod
    def fabric_of(cls, placement: Placement) -> str:
        if placement.ranks is not None:
            return str(placement.ranks.fabric)
        return choose_fabric(placement.tp_size, placement.fabric, torch.device(placement.device))[0]

    @property
    def is_healthy(self) -> bool:
        return self.ranks.healthy

    @property
    def is_usable(self) -> bool:
        return self.ranks.healthy or self.ranks.can_restart

    def find(self, folder: Path) -> None:
        with as_subject_failure():
            self.ranks.run(_find, folder)

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self.loaded = Loaded(folder=folder, dtype=dtype, options=options)
        self._load()

    @contextmanager
    def beside(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> Iterator[None]:
        """Without loading twice what is loaded: it stays in memory meanwhile."""
        before = self.loaded
        if self.ranks.healthy:
            self.ranks.run(_put_aside)
        try:
            self.load(folder, dtype=dtype, options=options)
            yield
        finally:
            self.loaded = before
            if self.ranks.healthy:
                self.ranks.run(_put_back)

    def unload(self) -> None:
        """Free the ranks' memory. The next call that needs the model loads it again."""
        if self.ranks.healthy:
            self.ranks.run(_unload)

    def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Ownership:
        return self.rank_class.layout(config, name, shape, self.tp_size)

    def shards(self) -> Iterator[tuple[str, list[Tensor | None]]]:
        sizes: list[dict[str, int]] = self._ask(_shard_sizes)
        names = list(dict.fromkeys(name for held in sizes for name in held))
        batch: list[str] = []
        for name in names:
            batch.append(name)
            if name == names[-1] or sum(held.get(one, 0) for held in sizes for one in batch) > BATCH_BYTES:
                by_rank = self._ask(_shards, tuple(batch))
                yield from ((one, [held.get(one) for held in by_rank]) for one in batch)
                batch = []

    def logits(self, schedule: Schedule) -> list[list[Tensor]]:
        return self._ask("logits", schedule)

    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        return self._ask("activations", schedule, sequence)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 options: Mapping[str, Any] | None = None) -> list[list[int]]:
        """By each rank's own ``generate``, with the cache that was loaded."""
        by_rank: list[list[list[int]]] = self._ask("generate", prompts, params)
        if differing := [rank for rank, ids in enumerate(by_rank) if ids != by_rank[0]]:
            raise SubjectFailure(f"ranks {differing} generated other tokens than rank 0")
        return by_rank[0]

    def run(self, job: Callable[..., Any] | str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """As ``Subject.run``; ``job`` may also name a method of the ranks."""
        with as_subject_failure():
            return self.ranks.run(OnRank(self.rank_class, job), *args, timeout_s=timeout_s)

    def restart(self) -> None:
        with as_subject_failure():
            self.ranks.restart()

    def close(self) -> None:
        if self.placement.ranks is None:
            self.ranks.close()

    def _ask(self, job: Callable[..., Any] | str, *args: Any) -> list[Any]:
        """``run`` with what was loaded there."""
        with as_subject_failure():
            if self.loaded is not None and not all(self.ranks.run(_is_loaded)):
                self._load()
        return self.run(job, *args)

    def _load(self) -> None:
        assert self.loaded is not None, "load before"
        try:
            self.ranks.run(load_on, self.rank_class, self.loaded)
        except RankFailure as failure:
            if (refusal := refusal_of(failure)) is not None:
                raise CheckpointError(refusal) from failure
            raise subject_failure(failure) from failure


@contextmanager
def as_subject_failure() -> Iterator[None]:
    """A rank's failure in the words of subjects."""
    try:
        yield
    except RankFailure as failure:
        raise subject_failure(failure) from failure


def subject_failure(failure: RankFailure) -> SubjectFailure:
    """The same failure as checks know it."""
    return SubjectFailure(str(failure), failures=failure.failures, divergence=failure.divergence, job=failure.job)


# Jobs: what runs inside a rank.


@dataclass(frozen=True, slots=True)
class OnRank:
    """A job that gets this rank's implementation, loaded or not, in place of its context. Goes by the name of what it runs.

    ``job`` may be the name of a method of the implementation.
    """

    rank_class: type[LiveRank]
    job: Callable[..., Any] | str

    @property
    def __name__(self) -> str:
        return self.job if isinstance(self.job, str) else str(getattr(self.job, "__name__", "job"))

    def __call__(self, context: RankContext, *args: Any) -> Any:
        rank: Rank = context.state.get("subject") or self.rank_class(context)
        return getattr(rank, self.job)(*args) if isinstance(self.job, str) else self.job(rank, *args)


def load_on(context: RankContext, rank_class: type[LiveRank], loaded: Loaded) -> None:
    """Job: load; what was there before is let go first, or both would be in memory."""
    context.phase = "load"
    context.state.pop("subject", None)
    rank = rank_class(context)
    rank.load(loaded.folder, dtype=loaded.dtype, options=loaded.options)
    context.state["subject"] = rank


def _is_loaded(context: RankContext) -> bool:
    return context.state.get("subject") is not None


def _unload(context: RankContext) -> None:
    context.state.pop("subject", None)


def _put_aside(context: RankContext) -> None:
    context.state["aside"] = context.state.pop("subject", None)


def _put_back(context: RankContext) -> None:
    context.state["subject"] = context.state.pop("aside", None)


def _find(context: RankContext, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"rank {context.tp.rank} on host {socket.gethostname()} finds no checkpoint at {folder}: it must "
                              "be readable at the same path on every host")


def _shard_sizes(rank: Rank) -> dict[str, int]:
    return {name: shard.numel() * shard.element_size() for name, shard in rank.shards().items()}


def _shards(rank: Rank, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: shard.cpu() for name, shard in rank.shards().items() if name in names}

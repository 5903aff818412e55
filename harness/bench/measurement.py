"""What a participant is to measure, and what it answers once it is ready: sent to its worker and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.ranks.ranks import Ranks
from harness.bench.figures import Figures, Measured
from harness.bench.workloads import Requests

JOB_TIMEOUT_S = 300.0
_PRELOAD = (*(f"harness.bench.{name}" for name in ("layers", "collectives", "loading", "ceilings")),
            "transformers.models.llama.configuration_llama")
"""What ranks run, imported once for all that are forked from one server; and what opening a model's config imports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One participant's part of a work.

    engine          whose name the rows bear
    requests        of a ``GenerateWork``, in the model's vocabulary
    sequence_lens   lengths that must fit into an engine's cache at once; engines that size it themselves get ``memory_share``
    memory_share    of a GPU's memory, where several engines take turns on it
    hardware        the best figures of the hardware's own rows in this run, by case; empty if they could not be measured
    slower          layer -> share of its work that is done on top, to see whether a comparison finds it
    """

    work: Any
    engine: str
    folder: Path
    tp_size: int
    fabric: str
    device: str
    dtype: str
    requests: Requests = field(default_factory=list)
    sequence_lens: tuple[int, ...] = ()
    memory_share: float = 0.9
    hardware: dict[str, Figures] = field(default_factory=dict)
    slower: dict[str, float] = field(default_factory=dict)

    def ceiling(self, case: str, metric: str) -> float | None:
        """The best of a metric of the hardware; None if it was not measured."""
        return self.hardware.get(case, {}).get(metric)


@dataclass(slots=True, kw_only=True)
class Ready:
    """A participant that can begin.

    fabric     what joins its ranks
    bounds     case -> what the hardware could do at best, of those metrics for which that is known
    problems   (engine, case; None for all cases) -> why it can't run here
    """

    fabric: str = ""
    bounds: dict[str, Figures] = field(default_factory=dict)
    problems: dict[tuple[str, str | None], str] = field(default_factory=dict)


class Measurement:
    """Base: a task that is made ready in a worker; what that costs is no part of any round.

    lasts   whether it stays once the task is done, for the next one to go on with
    """

    ready: Ready
    lasts = False

    def take(self, task: Task) -> bool:
        """Go on with another task. False if that takes a start of its own."""
        return False

    def measure(self) -> Measured:
        """One round."""
        raise NotImplementedError

    def memory(self) -> Figures:
        """``memory_gib``, the most that all of the engine's ranks have held together; empty if unknown."""
        return {}

    def close(self) -> None:
        """Free what was taken."""


class OnRanks(Measurement):
    """Base: on fresh ranks, without an engine."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.renew_ranks()

    def renew_ranks(self) -> None:
        """Ranks in place of those that there were, and on them what is to be measured."""
        self.ranks = Ranks(self.task.tp_size, fabric=self.task.fabric, device=self.task.device, preload=_PRELOAD)
        self.ready = Ready(fabric=str(self.ranks.fabric))
        try:
            self.prepare()
        except BaseException:
            self.ranks.close()
            raise

    def prepare(self) -> None:
        """Jobs that come before the first round."""

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Each rank's answer to a job."""
        return self.ranks.run(job, *args, timeout_s=JOB_TIMEOUT_S)

    def close(self) -> None:
        self.ranks.close()

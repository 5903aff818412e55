"""What ``Ranks`` asks of ranks, whatever they are: threads, processes or the caller itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engine.ranks.channel import Kind
from engine.ranks.failures import RankReport
from engine.ranks.jobs import Job

Deliver = Callable[[int, Kind, int, Any], None]
"""Called with (rank, kind, job number, payload):

    EVENT   what the job emitted
    DONE    (the log's counts, the result)
    RAISED  (a RankError, the exception itself or None if it stayed in another process)
    DIED    a RankError; job number 0, for whatever the rank was doing
"""


class Pool(Protocol):
    """tp_size ranks. One driver thread calls all of this, but for ``wake``."""

    def start(self) -> None:
        """Begin to start the ranks. Each delivers DONE for job number 0 when it is ready."""

    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None:
        """Queue a job on every rank. Never blocks on a rank. Raises TypeError for what can't be sent."""

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        """Wait for messages, at most ``timeout_s``, and deliver what is there; maybe nothing."""

    def wake(self) -> None:
        """End a ``poll`` that waits, or the next one. From any thread, also when the ranks are gone."""

    def inspect(self, ranks: Sequence[int], timeout_s: float, deliver: Deliver, *, insist: bool = False) -> dict[int, RankReport]:
        """Where these ranks are now, those that can say so within ``timeout_s``.

        Messages that come in meanwhile are delivered. ``insist``: get at least the stacks of the others.
        """

    def rejoin(self) -> None:
        """A job failed, but all ranks answered and are in step: the next one can run."""

    def stop(self, exit_code: int = 0) -> None:
        """End idle ranks in good order. ``kill`` must follow. ``exit_code``: of processes that are not our own."""

    def kill(self, reason: str) -> None:
        """End the ranks at once, whatever they do, and give back everything. Twice does no harm."""

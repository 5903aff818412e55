"""A job under way: what each rank has answered so far, and what that means."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.parallel.collective_log import LogSnapshot
from engine.ranks.channel import Kind
from engine.ranks.failures import RankError, RankFailure, RankReport, make_failure, stuck_error

OnEvent = Callable[[int, Any], None]


@dataclass(slots=True, kw_only=True)
class PendingJob:
    """Filled by ``deliver``. ``logs`` holds the collective counts of ranks that answered, where known."""

    name: str
    tp_size: int
    on_event: OnEvent | None = None
    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, RankError] = field(default_factory=dict)
    logs: dict[int, LogSnapshot] = field(default_factory=dict)
    cause: BaseException | None = None  # the exception itself, where the rank shares our process
    answered_at: float = math.inf  # when the first rank answered
    failed_at: float = math.inf  # when the first rank failed

    @property
    def unanswered(self) -> list[int]:
        return [rank for rank in range(self.tp_size) if rank not in self.results and rank not in self.errors]

    @property
    def succeeded(self) -> bool:
        return not self.errors and not self.unanswered

    @property
    def agreed(self) -> bool:
        """Whether the ranks that told of their collectives entered the same ones, as far as they got."""
        return len({(log.entered, log.digest) for log in self.logs.values()}) <= 1

    @property
    def in_step(self) -> bool:
        """Whether every rank answered, and all entered and left the same collectives."""
        return (
            not self.unanswered
            and len(self.logs) == self.tp_size
            and self.agreed
            and not any(log.inside for log in self.logs.values())
        )

    def deliver(self, rank: int, kind: Kind, payload: Any) -> None:
        """Take in one message from a rank, as ``pool.Deliver`` describes them."""
        if kind is Kind.EVENT:
            if self.on_event is not None:
                self.on_event(rank, payload)
            return
        if rank in self.results or rank in self.errors:
            return  # the first answer counts
        now = time.monotonic()
        self.answered_at = min(self.answered_at, now)
        if kind is Kind.DONE:
            self.logs[rank], self.results[rank] = payload
            return
        self.failed_at = min(self.failed_at, now)
        if kind is Kind.DIED:
            self.errors[rank] = replace(payload, phase=payload.phase or self.name)
        else:
            self.errors[rank], raised = payload
            self.cause = self.cause or raised
            log = self.errors[rank].log
            if log is not None:
                self.logs[rank] = log

    def waits_for_nobody(self, reports: Mapping[int, RankReport]) -> bool:
        """Whether a rank has entered a collective that a rank that is done with the job never will.

        Certain only while no other job is in flight.
        """
        final = min((log.entered for log in self.logs.values()), default=math.inf)
        return any(
            report.log is not None and report.log.entered > final for rank, report in reports.items() if rank not in self.logs
        )

    def failure(self, reports: Mapping[int, RankReport], *, fabric: str, reason: str) -> RankFailure:
        """The whole story. ``reports`` are from ranks that could be asked, also ranks that are done."""
        for rank in self.unanswered:
            self.errors[rank] = stuck_error(rank, self.name, reports.get(rank))
        logs = {rank: error.log for rank, error in self.errors.items() if error.log is not None}
        logs |= {rank: report.log for rank, report in reports.items() if report.log is not None}
        return make_failure(self.name, self.errors, logs, tp_size=self.tp_size, fabric=fabric, reason=reason)

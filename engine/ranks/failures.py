"""What went wrong on which rank, told with the cause before its consequences."""

from __future__ import annotations

import functools
import re
import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from engine.parallel.collective_log import LogSnapshot, compare_logs, name_ranks
from engine.parallel.group import CollectiveAborted

# What a rank says that only saw another one go: sockets closed on it (gloo, the store), or NCCL's words for
# the same. A time-out belongs here too: that rank waited for one that did not come.
_SAW_ANOTHER_FAIL = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed out waiting|socket (closed|timeout)"
    r"|ncclremoteerror|remote process exited|communicator was aborted|failed to (recv|send), got 0 bytes",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankError:
    """What happened to one rank.

    kind         ``raised``: the job raised; ``died``: its process is gone; ``stuck``: it did not answer
    phase        what the job said it was doing (``RankContext.phase``), by default the job's name
    summary      one line: the exception, the signal or exit code, or where the rank is stuck
    traceback    of the exception, or of the signal that killed it; empty when there is none
    stacks       of all the rank's threads, when it was stuck
    consequence  True when another rank's failure explains this one
    """

    rank: int
    kind: Literal["raised", "died", "stuck"]
    phase: str
    summary: str
    traceback: str = ""
    stacks: str = ""
    log: LogSnapshot | None = None
    consequence: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Where a live rank is, as its control thread sees it."""

    phase: str
    stacks: str
    log: LogSnapshot | None  # None when the interpreter itself did not answer


class RankFailure(RuntimeError):  # noqa: N818
    """A job did not succeed on every rank.

    failures    what happened to each rank that failed, causes before consequences
    divergence  sentences on where the ranks' collectives part; empty when they agree
    """

    def __init__(
        self,
        job: str,
        failures: Mapping[int, RankError],
        *,
        tp_size: int,
        fabric: str,
        divergence: tuple[str, ...] = (),
        reason: str = "",
    ) -> None:
        self.job = job
        self.failures = dict(failures)
        self.tp_size = tp_size
        self.fabric = fabric
        self.divergence = divergence
        self.reason = reason
        super().__init__(self._message())

    def __reduce__(self) -> tuple[object, ...]:
        make = functools.partial(RankFailure, self.job, self.failures, tp_size=self.tp_size, fabric=self.fabric,
                                 divergence=self.divergence, reason=self.reason)
        return make, ()

    def _message(self) -> str:
        failed = f"{name_ranks(sorted(self.failures))} of {self.tp_size}" if self.failures else "all ranks together"
        lines = [f"job {self.job!r} failed on {failed} ({self.fabric})"]
        if self.reason:
            lines[0] += f": {self.reason}"
        for error in self.failures.values():
            note = " (a consequence)" if error.consequence else ""
            lines.append(f"  rank {error.rank}{note}, in phase {error.phase!r}: {error.summary}")
        lines += [f"  collectives: {sentence}" for sentence in self.divergence]
        for error in self.failures.values():
            for title, text in (("traceback", error.traceback), ("stacks", error.stacks)):
                if text:
                    lines += ["", f"--- rank {error.rank}: {title} ---", text.rstrip()]
        return "\n".join(lines)


def error_from_exception(rank: int, phase: str, failure: BaseException, log: LogSnapshot | None) -> RankError:
    """A rank's exception as plain data. Frames of the rank's own machinery are cut off at the top."""
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_name == "run_job":
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(failure), failure, trace))
    first_line = str(failure).strip().split("\n", 1)[0]
    saw_another = isinstance(failure, CollectiveAborted) or (
        isinstance(failure, (RuntimeError, ConnectionError)) and saw_another_fail(str(failure))
    )
    return RankError(
        rank=rank,
        kind="raised",
        phase=phase,
        summary=f"{type(failure).__qualname__}: {first_line}" if first_line else type(failure).__qualname__,
        traceback=text,
        log=log,
        consequence=saw_another,
    )


def saw_another_fail(said: str) -> bool:
    """Whether a rank says no more than that another one is gone."""
    return _SAW_ANOTHER_FAIL.search(said) is not None


def describe_exit(exit_code: int | None) -> str:
    """``killed by SIGKILL`` or ``exited with code 7``."""
    if exit_code is None:
        return "is gone, and nobody knows its exit code"
    if exit_code < 0:
        try:
            return f"killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"killed by signal {-exit_code}"
    return f"exited with code {exit_code}"


def make_failure(
    job: str,
    errors: Mapping[int, RankError],
    logs: Mapping[int, LogSnapshot],
    *,
    tp_size: int,
    fabric: str,
    reason: str = "",
) -> RankFailure:
    """Put the causes first. ``logs`` are those of all ranks that could be asked, failed or not."""
    causes = {rank for rank, error in errors.items() if error.kind != "stuck" and not error.consequence}
    if not causes:
        # Nobody died or raised on its own: the ranks that are behind in their collectives hold up the others.
        behind = min((log.entered for log in logs.values()), default=0)
        ahead = max((log.entered for log in logs.values()), default=0)
        if behind < ahead:
            causes = {rank for rank in errors if rank not in logs or logs[rank].entered == behind}
        if not causes & errors.keys():
            causes = set(errors)
    marked = {rank: replace(error, consequence=rank not in causes) for rank, error in sorted(errors.items())}
    ordered = dict(sorted(marked.items(), key=lambda item: (item[1].consequence, item[0])))
    return RankFailure(job, ordered, tp_size=tp_size, fabric=fabric, divergence=tuple(compare_logs(logs)), reason=reason)


def stuck_error(rank: int, job: str, report: RankReport | None) -> RankError:
    """A rank that did not answer in time, with what is known of where it is."""
    if report is None:
        return RankError(rank=rank, kind="stuck", phase=job, summary="does not answer at all")
    log = report.log
    if log is None:
        summary = "stuck where its interpreter can't run: in native code, or stopped"
    elif log.last is None:
        summary = "stuck before its first collective"
    elif log.inside:
        summary = f"stuck in {log.last}"
    else:
        summary = f"stuck outside any collective; the last it finished was {log.last}"
    return RankError(rank=rank, kind="stuck", phase=report.phase or job, summary=summary, stacks=report.stacks, log=log)


def overdue_error(rank: int, what: str, report: RankReport) -> RankError:
    """A rank that waits for its device, and said for how long at most: another one holds it up."""
    assert report.log is not None, "it is the rank that tells"
    # The host has gone on from the collectives that the device is still in.
    log = replace(report.log, finished=report.log.finished - 1)
    return RankError(rank=rank, kind="stuck", phase=report.phase, summary=what, stacks=report.stacks, log=log, consequence=True)

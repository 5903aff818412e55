"""A job: how it travels, what it sees on its rank, how it is run there, and what has come home of it."""

from __future__ import annotations

import io
import math
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal

import torch

from engine.parallel.collective_log import LogSnapshot
from engine.parallel.group import TPGroup
from engine.ranks.failures import RankError, RankFailure, RankReport, error_from_exception, make_failure, stuck_error

Job = Callable[..., Any]
OnEvent = Callable[[int, Any], None]
Kind = Literal["job", "stop", "inspect", "phase", "event", "done", "raised", "report", "died"]
"""To the rank:

    job      the pickled (job, args)
    stop     leave in good order; the payload is the exit code
    inspect  say where you are

From the rank:

    phase    what the job says it is doing
    event    what the job emitted, pickled
    done     (the log's counts, the pickled result)
    raised   RankError
    report   RankReport, or None from a rank that has not joined yet

Made by the driver:

    died     RankError
"""


class RankContext:
    """One rank, as its jobs see it: the first argument of each.

    tp      this rank's place in its tensor-parallel group
    device  where this rank's tensors live
    state   whatever jobs want to keep for later jobs; gone when the rank is restarted
    """

    def __init__(self, *, tp: TPGroup, device: torch.device) -> None:
        self.tp = tp
        self.device = device
        self.state: dict[str, Any] = {}
        self.send_event: Callable[[Any], None] = _drop
        self.send_phase: Callable[[str], None] = _drop
        self._phase = "idle"
        self._deadline: tuple[float, str] | None = None

    def __repr__(self) -> str:
        return f"RankContext(tp={self.tp}, device={str(self.device)!r}, phase={self._phase!r})"

    def emit(self, payload: Any) -> None:
        """Send something to the driver while the job runs: ``on_event`` gets (rank, payload), in order."""
        self.send_event(payload)

    @property
    def phase(self) -> str:
        """What the job is doing, for the report if it fails. By default the job's name; a job may set it."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self.send_phase(phase)  # at once: a rank that is killed says nothing any more

    @contextmanager
    def at_most(self, seconds: float, what: str) -> Iterator[None]:
        """Fail the job if what runs inside, ``what`` in its report, takes longer, even where nothing interrupts it.

        For waits for a device, which may wait for other ranks itself. A thread beside this one tells the driver, which ends the
        ranks: those that are processes. For others nobody looks.
        """
        self._deadline = (time.monotonic() + seconds, what)
        try:
            yield
        finally:
            self._deadline = None

    @property
    def overdue(self) -> str | None:
        """What takes longer than it may, if anything does."""
        deadline = self._deadline
        return deadline[1] if deadline is not None and time.monotonic() > deadline[0] else None

    def enter_phase(self, phase: str) -> None:
        """Set the phase without telling the driver, who knows it."""
        self._phase = phase


def _drop(payload: Any) -> None:
    """Where events go while no job runs."""


class _Pickler(pickle.Pickler):
    """Tensors travel by value, to the CPU, and a view as its own elements, not with all of its storage."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) not in (torch.Tensor, torch.nn.Parameter):
            return NotImplemented
        if obj.layout is not torch.strided or obj.is_meta:
            return NotImplemented
        small = obj.untyped_storage().nbytes() <= obj.numel() * obj.element_size()
        if obj.device.type == "cpu" and small:
            return NotImplemented
        with torch.no_grad():
            moved = obj.detach().cpu() if obj.device.type != "cpu" else obj.detach().clone()
        if type(obj) is torch.nn.Parameter:
            return torch.nn.Parameter, (moved, obj.requires_grad)
        moved.requires_grad_(obj.requires_grad)
        return moved.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dumps(value: Any) -> bytes:
    """Pickle ``value``. Not with multiprocessing's pickler: it would put tensors in shared memory."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


loads = pickle.loads


def job_name(job: Job) -> str:
    """The job's name in reports."""
    function = getattr(job, "func", job)  # inside a functools.partial
    return str(getattr(function, "__name__", type(function).__name__))


def pack_job(job: Job, args: tuple[Any, ...], *, with_job: bool = True) -> bytes:
    """(job, args) as bytes, or the args alone. TypeError when they can't be sent."""
    try:
        return dumps((job, args) if with_job else args)
    except Exception as failure:
        raise TypeError(
            f"job {job_name(job)!r} or its arguments can't be sent to the ranks "
            f"({type(failure).__name__}: {failure}): use a function that can be imported, and plain arguments"
        ) from failure


def run_job(context: RankContext, receive: Callable[[], tuple[Job, tuple[Any, ...]]],
            pack: Callable[[Any], Any] = lambda result: result) -> tuple[Any, BaseException | None]:
    """((the log's counts, the packed result), None), or (RankError, what was raised).

    What test frameworks raise to fail or to skip is no ``Exception``, so all is caught.
    """
    context.enter_phase("receiving the job")
    try:
        job, args = receive()
        context.enter_phase(job_name(job))
        result = job(context, *args)
        context.enter_phase("sending the result")
        return (context.tp.log.snapshot(0), pack(result)), None
    except BaseException as failure:
        return error_from_exception(context.tp.rank, context.phase, failure, context.tp.log.snapshot()), failure


def _format_stack(frame: FrameType) -> str:
    """The thread's stack, without the rank's own machinery above the job."""
    stack = traceback.extract_stack(frame)
    above = [index for index, entry in enumerate(stack) if (entry.filename, entry.name) == (__file__, "run_job")]
    return "".join(traceback.format_list(stack[above[-1] + 1 :] if above else stack))


def report(context: RankContext, thread_ids: Iterable[int] | None = None) -> RankReport:
    """Where the rank is now, asked from another thread: phase, collectives and the stacks of its threads.

    ``thread_ids``: whose stacks to give; by default of all threads but the asking one.
    """
    frames = sys._current_frames()
    if thread_ids is None:
        thread_ids = [ident for ident in frames if ident != threading.get_ident()]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [f"thread {names.get(ident, ident)}:\n" + _format_stack(frames[ident]) for ident in thread_ids if ident in frames]
    return RankReport(phase=context.phase, stacks="\n".join(stacks), log=context.tp.log.snapshot())


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
        if kind == "event":
            if self.on_event is not None:
                self.on_event(rank, payload)
            return
        if rank in self.results or rank in self.errors:
            return  # the first answer counts
        now = time.monotonic()
        self.answered_at = min(self.answered_at, now)
        if kind == "done":
            self.logs[rank], self.results[rank] = payload
            return
        self.failed_at = min(self.failed_at, now)
        if kind == "died":
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

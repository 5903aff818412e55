"""What a job sees on its rank, and how one is run there: the same for every fabric."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch

from engine.parallel.group import TPGroup
from engine.ranks.channel import dumps
from engine.ranks.failures import RankError, RankReport, error_from_exception

Job = Callable[..., Any]


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

    def enter_phase(self, phase: str) -> None:
        """Set the phase without telling the driver, who knows it."""
        self._phase = phase


def _drop(payload: Any) -> None:
    """Where events go while no job runs."""


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


def run_job(context: RankContext, job: Job, args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """(result, None), or (None, what the job raised).

    What test frameworks raise to fail or to skip is no ``Exception``, so all is caught but Ctrl-C.
    """
    context.enter_phase(job_name(job))
    try:
        return job(context, *args), None
    except KeyboardInterrupt:
        raise
    except BaseException as failure:
        return None, failure


def rank_error(context: RankContext, failure: BaseException) -> RankError:
    """What the job raised, as plain data."""
    return error_from_exception(context.tp.rank, context.phase, failure, context.tp.log.snapshot())


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

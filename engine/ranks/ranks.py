"""Start, feed, watch and stop live ranks: the one place of the engine that owns processes.

``Ranks`` keeps tp_size ranks alive and runs jobs on them. What a rank is depends on the fabric: the calling
thread (``solo``), threads (``threads``), or processes joined by gloo on the CPU or NCCL on GPUs: of our own, or
torchrun's. Every wait covers all ranks at once, has a deadline where one was given, and sees a rank's
death at once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from engine.ranks.failures import RankError, RankFailure
from engine.ranks.forking import start_fork_server
from engine.ranks.jobs import Job, Kind, OnEvent, PendingJob, RankContext, job_name
from engine.ranks.pool import Pool
from engine.ranks.process_ranks import ProcessPool
from engine.ranks.thread_ranks import SoloPool, ThreadPool
from engine.ranks.torchrun import Launch, TorchrunPool, check_launch

__all__ = ["JobHandle", "RankContext", "RankError", "RankFailure", "Ranks", "RanksClosed"]

Fabric = Literal["auto", "solo", "threads", "gloo", "nccl"]
"""What a rank is, and what carries its collectives."""

_GRACE_S = 2.0  # after the first failure: how long the other ranks get to finish or fail by themselves
_FIRST_CHECK_S = 0.25  # after the first answer: when to look whether others wait for that rank in vain
_INSPECT_S = 1.5  # how long ranks get to say where they are, before they are killed


class RanksClosed(RuntimeError):  # noqa: N818
    """The ranks were closed: before the call, or by another thread while it waited for them."""


@dataclass(frozen=True, slots=True)
class JobHandle:
    """A job that was submitted."""

    number: int
    job: str


class Ranks(AbstractContextManager["Ranks"]):
    """tp_size live ranks. A context manager; ``close`` leaves no process, port or thread behind.

    tp_size               number of ranks, at least 1
    fabric                ``solo`` (tp_size 1 only), ``threads``, ``gloo``, ``nccl``; ``auto``: solo for one
                          rank, on the CPU gloo, on CUDA nccl if there are enough GPUs, else threads on one
    device                ``cpu`` or ``cuda``; with nccl, rank i gets ``cuda:i``
    start_timeout_s       how long all ranks together may take to start
    collective_timeout_s  how long one collective may wait for a rank before it fails
    job_timeout_s         how long a job may take where ``run`` is not told; None: for ever. A hang in a CUDA graph ends with it,
                          unless the job bounds its wait for the device (``RankContext.at_most``), as the engine's do
    auto_restart          whether ``run`` on ranks that broke starts new ones instead of raising
    launch                what torchrun told rank 0's process, where this is (``torchrun.launched``): the ranks are torchrun's,
                          ``solo`` and ``threads`` are refused, nothing can be restarted
    preload               modules that jobs need and that take long to import: loaded once for all ranks that are forked from
                          one server, if this is the process's first start of such ranks. They may not touch a GPU.

    Process ranks take arguments and give results by value (pickled; tensors arrive on the CPU). Thread ranks
    get copies of the arguments too; a solo rank gets the arguments themselves. One thread at a time drives all ranks: calls
    from others wait for their turn, but for ``close``, which ends whatever the ranks are doing.
    No deadline can stop a solo rank, and a thread that hangs outside a collective is left behind.

    A script that makes process ranks must have ``if __name__ == "__main__":`` around what it runs, as with
    multiprocessing.
    """

    def __init__(
        self,
        tp_size: int,
        *,
        fabric: Fabric | str = "auto",
        device: str | torch.device = "cpu",
        start_timeout_s: float = 120.0,
        collective_timeout_s: float = 600.0,
        job_timeout_s: float | None = None,
        auto_restart: bool = False,
        launch: Launch | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        self.tp_size = tp_size
        if launch is None:
            self.fabric, self.device = choose_fabric(tp_size, fabric, torch.device(device))
        else:
            self.fabric, self.device = check_launch(launch, tp_size, fabric, torch.device(device))
        self._launch = launch
        self.auto_restart = auto_restart
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._job_timeout_s = job_timeout_s
        self._preload = tuple(preload)
        self._numbers = itertools.count(1)
        self._running: dict[int, PendingJob] = {}
        self._turn = threading.RLock()  # whose turn it is to use the pool, which knows one thread only
        self._collector: int | None = None  # the thread that waits for ranks
        self._closed = False
        self._broken_by: str | None = None
        self._dead: dict[int, RankError] = {}
        self._start()

    def __exit__(self, kind: object, *exc_info: object) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken_by else "live"
        return f"<Ranks tp_size={self.tp_size} fabric={self.fabric!r} device={str(self.device)!r} {state}>"

    @property
    def healthy(self) -> bool:
        """Whether the next job can run on the ranks that are there. They end with the interpreter, if not before."""
        return not self._closed and self._broken_by is None and self._finalizer.alive

    @property
    def can_restart(self) -> bool:
        """Whether ranks that broke can be replaced: not where torchrun started them."""
        return self._launch is None

    def run(self, job: Job, *args: Any, timeout_s: float | None = None, on_event: OnEvent | None = None) -> list[Any]:
        """``job(context, *args)`` on every rank; the results in rank order.

        Raises RankFailure when the job did not succeed on every rank within ``timeout_s`` (``job_timeout_s``). After that the
        ranks stay usable only if all of them answered and are at the same collective; ``healthy`` says so.
        A job that can't be sent is a TypeError, and harms nothing. That every rank entered the same
        collectives (op, shape, dtype) is part of success.
        """
        return self.collect(self.submit(job, *args, on_event=on_event), timeout_s=timeout_s)

    def submit(self, job: Job, *args: Any, on_event: OnEvent | None = None) -> JobHandle:
        """Hand a job to every rank and return at once. Each rank runs its jobs in the order of submission."""
        with self._turn:
            self._check_open()
            if self._broken_by is not None:
                if not self.auto_restart and self.can_restart:
                    raise RuntimeError(f"these ranks broke and need restart(): {self._broken_by}")
                self.restart()
            number = next(self._numbers)
            self._pool.send(number, job, args)
            self._expect(number, job_name(job), on_event)
            return JobHandle(number, job_name(job))

    def collect(self, handle: JobHandle, timeout_s: float | None = None) -> list[Any]:
        """Wait for a submitted job; the results in rank order. Raises as ``run`` does; RanksClosed if that comes first."""
        with self._turn:
            before, self._collector = self._collector, threading.get_ident()
            try:
                return self._collect(handle, timeout_s)
            finally:
                self._collector = before
                if self._closed and before is None:
                    self._end()

    def _collect(self, handle: JobHandle, timeout_s: float | None) -> list[Any]:
        self._check_open()
        if handle.number not in self._running:
            why = f": {self._broken_by}" if self._broken_by else ""
            raise RuntimeError(f"{handle} was collected before, or was lost with the ranks it ran on{why}")
        job = self._running[handle.number]
        if timeout_s is None:
            timeout_s = self._job_timeout_s
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            reason = self._wait(job, deadline)
            if job.succeeded and not job.agreed:
                reason = "the ranks entered different collectives and did not notice"
            if reason or not job.succeeded:
                if timeout_s is not None and not job.errors and not reason:
                    reason = f"no answer within timeout_s={timeout_s:g}"
                raise self._give_up(job, reason) from job.cause
        except RankFailure:
            raise
        except BaseException as failure:
            # Closed meanwhile, Ctrl-C, or an on_event that raised: the ranks are in the middle of a job that nobody waits for.
            self._break(f"{type(failure).__name__} while job {handle.job!r} ran")
            raise
        finally:
            self._running.pop(handle.number, None)
        return [job.results[rank] for rank in range(self.tp_size)]

    def restart(self) -> None:
        """Replace all ranks by new ones, with empty state. Jobs under way are lost."""
        with self._turn:
            self._check_open()
            if not self.can_restart:
                raise RuntimeError(f"ranks that torchrun started can't be replaced: {self._broken_by or 'start anew'}")
            self._break("restarted")
            self._start()
            self._broken_by = None

    def close(self, *, exit_code: int = 0) -> None:
        """End the ranks: in good order if they are idle, at once if not. Closing twice does nothing.

        From any thread: a call of another that waits for the ranks ends with RanksClosed, a solo rank's once its job is done.

        ``exit_code``: what ``serve`` returns in torchrun's other processes, for each host to know how it went.
        """
        self._closed = True
        self._pool.wake()
        if self._collector == threading.get_ident():
            return  # from a signal handler, or an on_event: the wait that this has interrupted ends the ranks
        with self._turn:
            self._end(exit_code)

    def _end(self, exit_code: int = 0) -> None:
        if not self._finalizer.alive:
            return  # ended before
        if self._broken_by is None and not self._running:
            self._pool.stop(exit_code)
        self._pool.kill("the ranks were closed")
        self._finalizer.detach()
        self._running.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise RanksClosed(f"these ranks (tp_size={self.tp_size}, fabric={self.fabric!r}) are closed")

    def _start(self) -> None:
        self._pool = self._make_pool()
        # Must not know self, or self would never be collected. Runs at exit too.
        self._finalizer = weakref.finalize(self, self._pool.kill, "the ranks were never closed")
        self._dead = {}
        # Starting is job 0: each rank answers it once it has joined the group.
        self._expect(0, "start", None)
        try:
            self._pool.start()
            self.collect(JobHandle(0, "start"), timeout_s=self._start_timeout_s)
        except BaseException as failure:
            self._break(f"{type(failure).__name__} while starting")
            raise

    def _make_pool(self) -> Pool:
        if self.fabric == "solo":
            return SoloPool(self.device)
        if self.fabric == "threads":
            return ThreadPool(self.tp_size, self.device, self._collective_timeout_s)
        timeouts = {"start_timeout_s": self._start_timeout_s, "collective_timeout_s": self._collective_timeout_s}
        if self._launch is not None:
            return TorchrunPool(self._launch, self.device.type, **timeouts)
        return ProcessPool(self.tp_size, self.fabric, **timeouts, preload=self._preload)

    def _break(self, reason: str) -> None:
        self._broken_by = reason
        self._running.clear()
        self._pool.kill(reason)
        self._finalizer.detach()

    def _expect(self, number: int, name: str, on_event: OnEvent | None) -> None:
        job = self._running[number] = PendingJob(name=name, tp_size=self.tp_size, on_event=on_event)
        for rank, death in self._dead.items():
            job.deliver(rank, "died", death)

    def _deliver(self, rank: int, kind: Kind, number: int, payload: Any) -> None:
        if kind == "died":
            self._dead[rank] = payload
            for job in self._running.values():  # whichever it was in, it will finish none of them
                job.deliver(rank, kind, payload)
        elif number in self._running:
            self._running[number].deliver(rank, kind, payload)

    def _wait(self, job: PendingJob, deadline: float) -> str:
        """Until all ranks answered, the deadline, or until the rest won't answer. Returns why it gave up."""
        next_check, pause = math.inf, _FIRST_CHECK_S
        while job.unanswered:
            self._check_open()
            now = time.monotonic()
            limit = min(deadline, job.failed_at + _GRACE_S)
            if now >= limit:
                break
            if next_check == math.inf and job.answered_at < math.inf:
                next_check = now + pause
            if now >= next_check:
                # A rank may wait in a collective for one that is done: no need to wait for a deadline then.
                pause *= 2
                next_check = now + pause
                if len(self._running) == 1:
                    reports = self._pool.inspect(job.unanswered, _FIRST_CHECK_S, self._deliver)
                    if job.waits_for_nobody(reports):
                        return "" if job.errors else "a rank is done while others wait for it"
                continue
            left = min(limit, next_check) - now
            self._pool.poll(self._deliver, None if left == math.inf else left)
        return ""

    def _give_up(self, job: PendingJob, reason: str) -> RankFailure:
        """Find out what happened to every rank, and end the ranks unless all are surely in step."""
        if job.in_step and not self._dead and len(self._running) == 1:
            self._pool.rejoin()
            return job.failure({}, fabric=self.fabric, reason=reason)
        alive = [rank for rank in range(self.tp_size) if rank not in self._dead and rank not in job.errors]
        reports = self._pool.inspect(alive, _INSPECT_S, self._deliver, insist=True)
        failure = job.failure(reports, fabric=self.fabric, reason=reason)
        self._break(str(failure).split("\n\n", 1)[0])
        return failure


def make_ready(tp_size: int, fabric: str, device: str, *, preload: Sequence[str] = ()) -> None:
    """Begin to load what ranks with these arguments will be forked from, where they are; returns at once.

    Whoever has more to do before it makes :class:`Ranks` saves the seconds that loading takes. What is wrong is left to those.
    """
    with contextlib.suppress(ValueError, RuntimeError):
        if choose_fabric(tp_size, fabric, torch.device(device))[0] in ("gloo", "nccl"):
            start_fork_server(tp_size, preload)


def choose_fabric(tp_size: int, fabric: str, device: torch.device) -> tuple[str, torch.device]:
    """The fabric that ``auto`` stands for, and the device with its index where all ranks share one.

    Raises ValueError for combinations that can't work.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size} must be at least 1")
    if fabric not in get_args(Fabric):
        raise ValueError(f"fabric={fabric!r} is not one of {', '.join(get_args(Fabric))}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not supported: ranks run on cpu or cuda")
    index: int | None = device.index
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and num_gpus == 0:
        raise ValueError(f"device={str(device)!r}, but torch sees no GPU")
    chosen = fabric
    if fabric == "auto":
        if tp_size == 1:
            chosen = "solo"
        elif device.type == "cpu":
            chosen = "gloo"
        else:
            chosen = "nccl" if num_gpus >= tp_size and index is None else "threads"
    if chosen == "solo" and tp_size != 1:
        raise ValueError(f"fabric='solo' is one rank, got tp_size={tp_size}")
    if chosen == "gloo" and device.type != "cpu":
        raise ValueError(f"fabric='gloo' needs device='cpu', got device={str(device)!r}")
    if chosen == "nccl":
        if device.type != "cuda" or index is not None:
            raise ValueError(f"fabric='nccl' needs device='cuda' without an index, got device={str(device)!r}")
        if num_gpus < tp_size:
            raise ValueError(f"fabric='nccl' needs a GPU for each of tp_size={tp_size} ranks, torch sees {num_gpus}")
        return chosen, device
    if device.type == "cuda" and index is None:
        device = torch.device("cuda", 0)
    return chosen, device

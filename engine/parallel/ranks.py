"""Start, feed, watch and stop live ranks: the one place of the engine that owns processes.

``Ranks`` keeps tp_size ranks alive and runs jobs on them. What a rank is depends on the fabric: the calling
thread (``solo``), threads (``threads``), or processes joined by gloo on the CPU or NCCL on GPUs. Every wait
covers all ranks at once, has a deadline where one was given, and sees a rank's death at once.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch leaves it out of __all__

from engine.parallel import rank_process
from engine.parallel.channel import Channel, Kind, loads
from engine.parallel.fabric import Fabric, choose_fabric
from engine.parallel.failures import RankError, RankFailure, RankReport, describe_exit
from engine.parallel.links import Link, open_frame
from engine.parallel.pending_job import OnEvent, PendingJob
from engine.parallel.pool import Deliver, Pool
from engine.parallel.rank_job import Job, RankContext, job_name, pack_job
from engine.parallel.rank_process import RankSetup
from engine.parallel.rank_threads import SoloPool, ThreadPool
from engine.parallel.rendezvous import make_store

__all__ = ["RankContext", "RankError", "RankFailure", "Ranks", "Ticket"]

_GRACE_S = 2.0  # after the first failure: how long the other ranks get to finish or fail by themselves
_FIRST_CHECK_S = 0.25  # after the first answer: when to look whether others wait for that rank in vain
_DUMP_S = 0.3  # how long faulthandler gets to write the stacks of a rank that does not answer
_INSPECT_S = 1.5  # how long ranks get to say where they are, before they are killed


@dataclass(frozen=True, slots=True)
class Ticket:
    """A job that was submitted."""

    number: int
    job: str


class Ranks:
    """tp_size live ranks. A context manager; ``close`` leaves no process, port or thread behind.

    tp_size               number of ranks, at least 1
    fabric                ``solo`` (tp_size 1 only), ``threads``, ``gloo``, ``nccl``; ``auto``: solo for one
                          rank, on the CPU gloo, on CUDA nccl if there are enough GPUs, else threads on one
    device                ``cpu`` or ``cuda``; with nccl, rank i gets ``cuda:i``
    start_timeout_s       how long all ranks together may take to start
    collective_timeout_s  how long one collective may wait for a rank before it fails
    auto_restart          whether ``run`` on ranks that broke starts new ones instead of raising
    preload               modules that jobs need and that take long to import: loaded once for all ranks that are forked from
                          one server, if this is the process's first start of such ranks. They may not touch a GPU.

    Process ranks take arguments and give results by value (pickled; tensors arrive on the CPU). Thread ranks
    get copies of the arguments too; a solo rank gets the arguments themselves. One thread drives all ranks.
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
        auto_restart: bool = False,
        preload: Sequence[str] = (),
    ) -> None:
        self.tp_size = tp_size
        self.fabric, self.device = choose_fabric(tp_size, fabric, torch.device(device))
        self.auto_restart = auto_restart
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._preload = tuple(preload)
        self._numbers = itertools.count(1)
        self._running: dict[int, PendingJob] = {}
        self._closed = False
        self._broken_by: str | None = None
        self._dead: dict[int, RankError] = {}
        self._start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._broken_by else "live"
        return f"<Ranks tp_size={self.tp_size} fabric={self.fabric!r} device={str(self.device)!r} {state}>"

    @property
    def healthy(self) -> bool:
        """Whether the next job can run on the ranks that are there."""
        return not self._closed and self._broken_by is None

    def run(self, job: Job, *args: Any, timeout_s: float | None = None, on_event: OnEvent | None = None) -> list[Any]:
        """``job(context, *args)`` on every rank; the results in rank order.

        Raises RankFailure when the job did not succeed on every rank within ``timeout_s``. After that the
        ranks stay usable only if all of them answered and are at the same collective; ``healthy`` says so.
        A job that can't be sent is a TypeError, and harms nothing. That every rank entered the same
        collectives (op, shape, dtype) is part of success.
        """
        return self.collect(self.submit(job, *args, on_event=on_event), timeout_s=timeout_s)

    def submit(self, job: Job, *args: Any, on_event: OnEvent | None = None) -> Ticket:
        """Hand a job to every rank and return at once. Each rank runs its jobs in the order of submission."""
        if self._closed:
            raise RuntimeError(f"these ranks (tp_size={self.tp_size}, fabric={self.fabric!r}) are closed")
        if self._broken_by is not None:
            if not self.auto_restart:
                raise RuntimeError(f"these ranks broke and need restart(): {self._broken_by}")
            self.restart()
        number = next(self._numbers)
        self._pool.send(number, job, args)
        self._expect(number, job_name(job), on_event)
        return Ticket(number, job_name(job))

    def collect(self, ticket: Ticket, timeout_s: float | None = None) -> list[Any]:
        """Wait for a submitted job; the results in rank order. Raises as ``run`` does."""
        if ticket.number not in self._running:
            why = f": {self._broken_by}" if self._broken_by else ""
            raise RuntimeError(f"{ticket} was collected before, or was lost with the ranks it ran on{why}")
        job = self._running[ticket.number]
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            reason = self._wait(job, deadline)
            if job.succeeded and not job.agreed:
                reason = "the ranks entered different collectives and did not notice"
            if reason or not job.succeeded:
                if timeout_s is not None and not job.errors and not reason:
                    reason = f"no answer within timeout_s={timeout_s:g}"
                raise self._settle(job, reason) from job.cause
        except RankFailure:
            raise
        except BaseException as failure:
            # Ctrl-C, or an on_event that raised: the ranks are in the middle of a job that nobody waits for.
            self._break(f"{type(failure).__name__} while job {ticket.job!r} ran")
            raise
        finally:
            self._running.pop(ticket.number, None)
        return [job.results[rank] for rank in range(self.tp_size)]

    def restart(self) -> None:
        """Replace all ranks by new ones, with empty state. Jobs under way are lost."""
        if self._closed:
            raise RuntimeError(f"these ranks (tp_size={self.tp_size}, fabric={self.fabric!r}) are closed")
        self._break("restarted")
        self._start()
        self._broken_by = None

    def close(self) -> None:
        """End the ranks: in good order if they are idle, at once if not. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._broken_by is None and not self._running:
            self._pool.stop()
        self._pool.kill("the ranks were closed")
        self._finalizer.detach()
        self._running.clear()

    def _start(self) -> None:
        self._pool = self._make_pool()
        # Must not know self, or self would never be collected. Runs at exit too.
        self._finalizer = weakref.finalize(self, self._pool.kill, "the ranks were never closed")
        self._dead = {}
        # Starting is job 0: each rank answers it once it has joined the group.
        self._expect(0, "start", None)
        try:
            self._pool.start()
            self.collect(Ticket(0, "start"), timeout_s=self._start_timeout_s)
        except BaseException as failure:
            self._break(f"{type(failure).__name__} while starting")
            raise

    def _make_pool(self) -> Pool:
        if self.fabric == "solo":
            return SoloPool(self.device)
        if self.fabric == "threads":
            return ThreadPool(self.tp_size, self.device, self._collective_timeout_s)
        return _ProcessPool(
            self.tp_size,
            self.fabric,
            start_timeout_s=self._start_timeout_s,
            collective_timeout_s=self._collective_timeout_s,
            preload=self._preload,
        )

    def _break(self, reason: str) -> None:
        self._broken_by = reason
        self._running.clear()
        self._pool.kill(reason)
        self._finalizer.detach()

    def _expect(self, number: int, name: str, on_event: OnEvent | None) -> None:
        job = self._running[number] = PendingJob(name=name, tp_size=self.tp_size, on_event=on_event)
        for rank, death in self._dead.items():
            job.deliver(rank, Kind.DIED, death)

    def _deliver(self, rank: int, kind: Kind, number: int, payload: Any) -> None:
        if kind is Kind.DIED:
            self._dead[rank] = payload
            for job in self._running.values():  # whichever it was in, it will finish none of them
                job.deliver(rank, kind, payload)
        elif number in self._running:
            self._running[number].deliver(rank, kind, payload)

    def _wait(self, job: PendingJob, deadline: float) -> str:
        """Until all ranks answered, the deadline, or until the rest won't answer. Returns why it gave up."""
        next_check, pause = math.inf, _FIRST_CHECK_S
        while job.unanswered:
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
                    if job.waits_in_vain(reports):
                        return "" if job.errors else "a rank is done while others wait for it"
                continue
            left = min(limit, next_check) - now
            self._pool.poll(self._deliver, None if left == math.inf else left)
        return ""

    def _settle(self, job: PendingJob, reason: str) -> RankFailure:
        """Find out what happened to every rank, and end the ranks unless all are surely in step."""
        if job.in_step and not self._dead and len(self._running) == 1:
            self._pool.forgive()
            return job.failure({}, fabric=self.fabric, reason=reason)
        alive = [rank for rank in range(self.tp_size) if rank not in self._dead and rank not in job.errors]
        reports = self._pool.inspect(alive, _INSPECT_S, self._deliver, insist=True)
        failure = job.failure(reports, fabric=self.fabric, reason=reason)
        self._break(str(failure).split("\n\n", 1)[0])
        return failure


class _ProcessPool:
    """One process a rank, forked from a server that has torch loaded."""

    def __init__(self, tp_size: int, backend: str, *, start_timeout_s: float, collective_timeout_s: float,
                 preload: Sequence[str] = ()) -> None:
        self._preload = preload
        self._tp_size = tp_size
        self._backend = backend
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._owner_pid = os.getpid()
        self._links: list[Link] = []
        self._selector = selectors.DefaultSelector()
        self._store: TCPStore | None = None

    def start(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "this script starts ranks while it is imported by a rank that it started: "
                'put what it runs under `if __name__ == "__main__":`'
            )
        self._store = make_store()
        # Also for CUDA: the server never touches a GPU, so its forks may, and start in a quarter of spawn's time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_preload(), *self._preload])
        for rank in range(self._tp_size):
            setup = RankSetup(
                rank=rank,
                tp_size=self._tp_size,
                backend=self._backend,
                device=f"cuda:{rank}" if self._backend == "nccl" else "cpu",
                store_port=self._store.port,
                driver_pid=self._owner_pid,
                start_timeout_s=self._start_timeout_s,
                collective_timeout_s=self._collective_timeout_s,
                num_threads=max(1, torch.get_num_threads() // self._tp_size),
                environ=dict(os.environ),
            )
            jobs, control, dump = (socket.socketpair() for _ in range(3))
            theirs = (jobs[1], control[1], dump[1])
            process = context.Process(target=rank_process.main, args=(setup, *theirs), name=f"rank-{rank}", daemon=True)
            link = Link(rank, process, Channel(jobs[0]), Channel(control[0]), dump[0])
            self._links.append(link)
            try:
                process.start()
            finally:
                for sock in theirs:
                    sock.close()
            self._selector.register(link.jobs, selectors.EVENT_READ, (link, link.jobs))
            self._selector.register(link.control, selectors.EVENT_READ, (link, link.control))
            self._selector.register(process.sentinel, selectors.EVENT_READ, (link, None))

    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None:
        body = pack_job(job, args)
        for link in self._links:
            link.jobs.send(Kind.JOB, number, body)
            self._watch_unsent(link)

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        for key, mask in self._selector.select(timeout_s):
            link, channel = key.data
            if channel is None:
                self._bury(link, deliver)
                continue
            if channel.closed:
                continue  # its rank was buried in this very round
            if mask & selectors.EVENT_WRITE:
                channel.flush()
                self._watch_unsent(link)
            if mask & selectors.EVENT_READ:
                self._read(link, channel, deliver)

    def _watch_unsent(self, link: Link) -> None:
        if not link.jobs.closed:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.jobs.has_unsent else 0)
            self._selector.modify(link.jobs, wanted, (link, link.jobs))

    def _read(self, link: Link, channel: Channel, deliver: Deliver) -> None:
        for frame in channel.receive():
            if frame.kind is Kind.REPORT:
                link.report = loads(frame.body) if frame.body else None
            elif frame.kind is Kind.PHASE:
                link.phase = frame.body.decode()
            else:
                if frame.kind is not Kind.EVENT:
                    link.phase = ""
                deliver(link.rank, *open_frame(link.rank, frame))
        if channel.closed:
            self._selector.unregister(channel)

    def _bury(self, link: Link, deliver: Deliver) -> None:
        """Read what the dead rank still said, then tell how it ended."""
        self._selector.unregister(link.process.sentinel)
        if not link.jobs.closed:
            self._read(link, link.jobs, deliver)
        link.process.join(1.0)  # at once: the sentinel has fired
        error = RankError(
            rank=link.rank,
            kind="died",
            phase=link.phase,
            summary=describe_exit(link.process.exitcode),
            traceback=link.read_dump(),
        )
        deliver(link.rank, Kind.DIED, 0, error)

    def inspect(self, ranks: Sequence[int], timeout_s: float, deliver: Deliver, *, insist: bool = False) -> dict[int, RankReport]:
        asked = [self._links[rank] for rank in ranks]
        for link in asked:
            link.report = None
            link.control.send(Kind.INSPECT)
        deadline = time.monotonic() + timeout_s
        while any(link.waits_for_report for link in asked) and (left := deadline - time.monotonic()) > 0:
            self.poll(deliver, left)
        # Where the control thread can't run, something holds the interpreter, or the process is stopped.
        silent = [link for link in asked if insist and link.waits_for_report]
        for link in silent:
            os.kill(link.pid, signal.SIGUSR1)
        if silent:
            time.sleep(_DUMP_S)
        for link in silent:
            link.report = RankReport(phase=link.phase, stacks=link.read_dump(), log=None)
        return {link.rank: link.report for link in asked if link.report is not None}

    def forgive(self) -> None:
        """Process ranks need nothing: they answered and are in step."""

    def stop(self) -> None:
        for link in self._links:
            link.jobs.send(Kind.STOP)
        deadline = time.monotonic() + 5.0
        for link in self._links:
            link.process.join(max(0.0, deadline - time.monotonic()))

    def kill(self, reason: str) -> None:
        """End all ranks at once and give back every socket and the port."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the driver exits: the ranks are not its own
        for link in self._links:
            link.kill()
        for link in self._links:
            link.close()
        self._links = []
        self._selector.close()
        self._store = None


def _preload() -> list[str]:
    """What the fork server loads once for all ranks, unless someone started it before.

    None of it may touch a GPU: CUDA does not survive a fork.
    """
    names = ["torch", "torch.distributed", "engine.parallel.rank_process"]
    # Seconds of import for each rank that will run the engine, and no use to ranks that will not.
    names += [name for name in ("engine.core",) if name in sys.modules]
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    if main_spec is not None and main_spec.parent:
        names.append(main_spec.parent)  # each rank imports the main module anew: have its package ready
    return names

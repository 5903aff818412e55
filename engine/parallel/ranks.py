"""Start, feed, watch and stop live ranks: the one place of the engine that owns processes.

``Ranks`` keeps tp_size ranks alive and runs jobs on them. What a rank is depends on the fabric: the calling thread
(``solo``), threads (``threads``), or processes joined by gloo on the CPU or NCCL on GPUs. Every wait covers all
ranks at once, has a deadline where one was given, and sees a rank's death at once.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from engine.parallel import rank_process
from engine.parallel.channel import Channel, Frame, Kind, dumps, loads
from engine.parallel.collective_log import LogSnapshot
from engine.parallel.fabric import Fabric, choose_fabric
from engine.parallel.failures import (
    RankError,
    RankFailure,
    RankReport,
    describe_exit,
    error_from_exception,
    make_failure,
    stuck_error,
)
from engine.parallel.rank_job import Job, RankContext, job_name
from engine.parallel.rank_process import RankSetup
from engine.parallel.rank_threads import Deliver, SoloPool, ThreadPool

__all__ = ["RankContext", "RankError", "RankFailure", "Ranks", "Ticket"]

OnEvent = Callable[[int, Any], None]

_GRACE_S = 2.0  # after the first failure: how long the other ranks get to finish or fail by themselves
_INSPECT_S = 1.5  # how long ranks get to say where they are, before they are killed


class _Pool(Protocol):
    def start(self) -> None: ...
    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None: ...
    def poll(self, deliver: Deliver, timeout_s: float | None) -> None: ...
    def inspect(self, ranks: list[int], timeout_s: float) -> dict[int, RankReport]: ...
    def forgive(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Ticket:
    """A job that was submitted."""

    number: int
    job: str


@dataclass(slots=True)
class _Running:
    """A job under way: what each rank has answered so far."""

    name: str
    on_event: OnEvent | None
    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, RankError] = field(default_factory=dict)
    logs: dict[int, LogSnapshot] = field(default_factory=dict)
    cause: BaseException | None = None  # the exception itself, where the rank shares our process
    failed_at: float = math.inf


class Ranks:
    """tp_size live ranks. A context manager; ``close`` leaves no process, port or thread behind.

    tp_size               number of ranks, at least 1
    fabric                ``solo`` (tp_size 1 only), ``threads``, ``gloo``, ``nccl``; ``auto``: solo for one rank, on
                          the CPU gloo, on CUDA nccl if there are enough GPUs and threads on one GPU otherwise
    device                ``cpu`` or ``cuda``; with nccl, rank i gets ``cuda:i``
    start_timeout_s       how long all ranks together may take to start
    collective_timeout_s  how long one collective may wait for a rank before it fails
    auto_restart          whether ``run`` on ranks that broke starts new ones instead of raising

    Process ranks take their jobs' arguments and give their results by value (pickled; tensors arrive on the CPU).
    Thread ranks get copies of the arguments too; a solo rank gets the arguments themselves.

    A script that makes process ranks must have ``if __name__ == "__main__":`` around what it runs, as with
    multiprocessing.
    """

    def __init__(
        self,
        tp_size: int,
        *,
        fabric: Fabric = "auto",
        device: str | torch.device = "cpu",
        start_timeout_s: float = 120.0,
        collective_timeout_s: float = 600.0,
        auto_restart: bool = False,
    ) -> None:
        self.tp_size = tp_size
        self.fabric, self.device = choose_fabric(tp_size, fabric, torch.device(device))
        self.auto_restart = auto_restart
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._closed = False
        self._broken_by: str | None = None
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

    def run(
        self, job: Job, *args: Any, timeout_s: float | None = None, on_event: OnEvent | None = None
    ) -> list[Any]:
        """``job(context, *args)`` on every rank; the results in rank order.

        Raises RankFailure when the job did not succeed on every rank within ``timeout_s``. After that the ranks
        stay usable only if each of them answered and all stand at the same collective; ``healthy`` says so.
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
        self._running[number] = _Running(name=job_name(job), on_event=on_event)
        return Ticket(number, self._running[number].name)

    def collect(self, ticket: Ticket, timeout_s: float | None = None) -> list[Any]:
        """Wait for a submitted job; the results in rank order. Raises as ``run`` does."""
        if ticket.number not in self._running:
            raise ValueError(
                f"ticket={ticket} was collected before, or belongs to ranks that broke or were restarted"
            )
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            job = self._wait(ticket.number, deadline)
            if job.errors or len(job.results) < self.tp_size:
                late = (
                    f"no answer within timeout_s={timeout_s:g}"
                    if timeout_s is not None and not job.errors
                    else ""
                )
                raise self._settle(job, late) from job.cause
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
        # Starting is job 0: each rank answers it once it has joined the group.
        self._running[0] = _Running(name="start", on_event=None)
        try:
            self._pool.start()
            self.collect(Ticket(0, "start"), timeout_s=self._start_timeout_s)
        except BaseException as failure:
            self._break(f"{type(failure).__name__} while starting")
            raise

    def _make_pool(self) -> _Pool:
        if self.fabric == "solo":
            return SoloPool(self.device)
        if self.fabric == "threads":
            return ThreadPool(self.tp_size, self.device, self._collective_timeout_s)
        return _ProcessPool(
            self.tp_size,
            self.fabric,
            start_timeout_s=self._start_timeout_s,
            collective_timeout_s=self._collective_timeout_s,
        )

    def _break(self, reason: str) -> None:
        self._broken_by = reason
        self._running.clear()
        self._pool.kill(reason)
        self._finalizer.detach()

    def _wait(self, number: int, deadline: float) -> _Running:
        """Until every rank answered, the deadline, or some time after the first failure."""
        job = self._running[number]
        while len(job.results) + len(job.errors) < self.tp_size:
            left = min(deadline, job.failed_at + _GRACE_S) - time.monotonic()
            if left <= 0:
                break
            self._pool.poll(self._deliver, None if left == math.inf else left)
        return job

    def _deliver(self, rank: int, kind: Kind, number: int, payload: Any) -> None:
        if kind is Kind.DIED:
            for job in self._running.values():  # whichever it was in, it will finish none of them
                if rank not in job.results and rank not in job.errors:
                    job.errors[rank] = replace(payload, phase=payload.phase or job.name)
                    job.failed_at = min(job.failed_at, time.monotonic())
            return
        known = self._running.get(number)
        if known is None:
            return
        if kind is Kind.EVENT:
            if known.on_event is not None:
                known.on_event(rank, payload)
        elif kind is Kind.DONE:
            known.logs[rank], known.results[rank] = payload
        elif kind is Kind.RAISED:
            error, raised = payload
            known.errors[rank] = error
            known.logs[rank] = error.log
            known.cause = known.cause or raised
            known.failed_at = min(known.failed_at, time.monotonic())

    def _settle(self, job: _Running, reason: str) -> RankFailure:
        """Find out what happened to every rank, and end the ranks unless all are surely in step."""
        answered = job.results.keys() | job.errors.keys()
        alive = [
            rank for rank in range(self.tp_size) if rank not in job.errors or job.errors[rank].kind != "died"
        ]
        in_step = (
            len(self._running) == 1
            and len(answered) == len(alive) == self.tp_size
            and len({log.entered for log in job.logs.values()}) == 1
            and not any(log.inside for log in job.logs.values())
        )
        if in_step:
            self._pool.forgive()
            return make_failure(
                job.name, job.errors, job.logs, tp_size=self.tp_size, fabric=self.fabric, reason=reason
            )
        reports = self._pool.inspect([rank for rank in alive if rank not in job.errors], _INSPECT_S)
        logs = {rank: error.log for rank, error in job.errors.items() if error.log is not None}
        for rank in alive:
            report = reports.get(rank)
            if report is not None and report.log is not None:
                logs[rank] = report.log
            if rank not in answered:
                job.errors[rank] = stuck_error(rank, job.name, report)
        failure = make_failure(
            job.name, job.errors, logs, tp_size=self.tp_size, fabric=self.fabric, reason=reason
        )
        self._break(str(failure).split("\n\n", 1)[0])
        return failure


class _ProcessPool:
    """One process a rank: forked from a server with torch loaded on the CPU, spawned for CUDA."""

    def __init__(
        self, tp_size: int, backend: str, *, start_timeout_s: float, collective_timeout_s: float
    ) -> None:
        self._tp_size = tp_size
        self._backend = backend
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._owner_pid = os.getpid()
        self._links: list[_Link] = []
        self._selector = selectors.DefaultSelector()
        self._store: dist.TCPStore | None = None

    def start(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "this script starts ranks while it is imported by a rank that it started: "
                'put what it runs under `if __name__ == "__main__":`'
            )
        self._store = _make_store(self._start_timeout_s)
        context = multiprocessing.get_context("spawn" if self._backend == "nccl" else "forkserver")
        if self._backend != "nccl":
            context.set_forkserver_preload(_preload())
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
                num_threads=max(1, len(os.sched_getaffinity(0)) // self._tp_size),
                environ=dict(os.environ),
            )
            jobs, control, dump = (socket.socketpair() for _ in range(3))
            theirs = (jobs[1], control[1], dump[1])
            process = context.Process(
                target=rank_process.main, args=(setup, *theirs), name=f"rank-{rank}", daemon=True
            )
            link = _Link(rank, process, Channel(jobs[0]), Channel(control[0]), dump[0])
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
        body = dumps((job, args))
        for link in self._links:
            link.jobs.send(Kind.JOB, number, body)
            self._watch_unsent(link)

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        for key, mask in self._selector.select(timeout_s):
            link, channel = key.data
            if channel is None:
                self._bury(link, deliver)
                continue
            if mask & selectors.EVENT_WRITE:
                channel.flush()
                self._watch_unsent(link)
            if mask & selectors.EVENT_READ:
                self._read(link, channel, deliver)

    def _watch_unsent(self, link: _Link) -> None:
        if not link.jobs.closed:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.jobs.has_unsent else 0)
            self._selector.modify(link.jobs, wanted, (link, link.jobs))

    def _read(self, link: _Link, channel: Channel, deliver: Deliver) -> None:
        for frame in channel.receive():
            if frame.kind is Kind.REPORT:
                link.report = loads(frame.body) if frame.body else None
            elif frame.kind is Kind.PHASE:
                link.phase = frame.body.decode()
            else:
                if frame.kind is not Kind.EVENT:
                    link.phase = ""
                deliver(link.rank, *_open_frame(link.rank, frame))
        if channel.closed:
            self._selector.unregister(channel)

    def _bury(self, link: _Link, deliver: Deliver) -> None:
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

    def inspect(self, ranks: list[int], timeout_s: float) -> dict[int, RankReport]:
        asked = [self._links[rank] for rank in ranks if self._links[rank].process.is_alive()]
        for link in asked:
            link.report = None
            link.control.send(Kind.INSPECT)
        deadline = time.monotonic() + timeout_s
        while any(link.report is None for link in asked) and (left := deadline - time.monotonic()) > 0:
            self.poll(_ignore, left)
        silent = [link for link in asked if link.report is None and link.process.is_alive()]
        for link in silent:  # its control thread can't run: something holds the interpreter, or it is stopped
            os.kill(link.pid, signal.SIGUSR1)
        if silent:
            time.sleep(0.3)
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
        links, self._links = self._links, []
        for link in links:
            if link.pid and link.process.is_alive():
                link.process.kill()
        for link in links:
            link.close()
        self._selector.close()
        self._store = None


@dataclass(slots=True)
class _Link:
    """The driver's hold on one rank."""

    rank: int
    process: Any
    jobs: Channel
    control: Channel
    dump: socket.socket
    phase: str = ""
    report: RankReport | None = None

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def read_dump(self) -> str:
        """What faulthandler wrote since the last time."""
        self.dump.setblocking(False)
        parts = []
        with contextlib.suppress(OSError):
            while part := self.dump.recv(1 << 16):
                parts.append(part)
        return b"".join(parts).decode(errors="replace")

    def close(self) -> None:
        if self.pid:
            self.process.join(5.0)
            if self.process.exitcode is not None:
                self.process.close()
        self.jobs.close()
        self.control.close()
        self.dump.close()


def _ignore(rank: int, kind: Kind, number: int, payload: Any) -> None:
    """For messages that come too late to matter."""


def _open_frame(rank: int, frame: Frame) -> tuple[Kind, int, Any]:
    """A rank's frame as (kind, job number, payload). What can't be unpickled here is the rank's failure."""
    try:
        payload = loads(frame.body)
        if frame.kind is Kind.RAISED:
            return frame.kind, frame.number, (payload, None)
        if frame.kind is Kind.DONE:
            log, result = payload
            return frame.kind, frame.number, (log, loads(result))
        return frame.kind, frame.number, payload
    except Exception as failure:
        error = error_from_exception(rank, "receiving the result", failure, LogSnapshot(0, 0))
        return Kind.RAISED, frame.number, (error, None)


def _make_store(timeout_s: float) -> dist.TCPStore:
    """A store for the rendezvous, on a port of the system's choice that only this machine can reach."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def _preload() -> list[str]:
    """What the fork server loads once for all ranks. It takes effect only when the server is not running yet."""
    names = ["torch", "torch.distributed", "engine.parallel.rank_process"]
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    if main_spec is not None and main_spec.parent:
        names.append(main_spec.parent)  # each rank imports the main module anew: have its package ready
    return names

"""What a rank does whose driver is at the other end of a connection: join the group, run jobs in order, say where it is."""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import queue
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch leaves them out of __all__

from engine.parallel.collective_log import LogSnapshot
from engine.parallel.group import ProcessTPGroup
from engine.ranks.failures import error_from_exception, overdue_error
from engine.ranks.jobs import Kind, RankContext, dumps, loads, report, run_job

_LEAVE_S = 30  # how long a rank that was told to stop may take, if nobody is left to end it
_TICK_S = 0.25  # how often the listener looks whether the job is overdue


class RankServer:
    """Serves the driver.

    A thread of its own reads the connection: the driver gets an answer even while a job hangs, and can send the next job
    whatever this rank is doing. Were it read between jobs alone, a big job and a big result that meet would wait for each
    other.
    """

    def __init__(self, rank: int, connection: Connection, *, on_gone: Callable[[], None], watched: Sequence[int] = (),
                 shares_process: bool = False) -> None:
        """Start to listen.

        Args:
            rank: this one.
            connection: to the driver.
            on_gone: called once the driver is gone, but for a rank that was told to stop.
            watched: files that become readable when the driver is gone, beside the connection.
            shares_process: whether reports show the stack of the calling thread alone.
        """
        self._rank = rank
        self._connection = connection
        self._context: RankContext | None = None
        self._job_number = 0
        self._send_lock = threading.Lock()  # a job may emit from threads of its own
        self._inbox: queue.SimpleQueue[tuple[Kind, int, Any] | None] = queue.SimpleQueue()
        self._thread_ids = [threading.get_ident()] if shares_process else None
        threading.Thread(target=self._listen, args=(watched, on_gone), name=f"rank-{rank}-listener", daemon=True).start()

    def serve(self, join: Callable[[], RankContext]) -> int:
        """Join the group and run jobs until the driver says stop. Returns the exit code that it asks for.

        Raises EOFError or OSError when the driver is gone, and SystemExit when a job did.
        """
        try:
            self._context = join()
        except Exception as failure:
            self._send("raised", 0, error_from_exception(self._rank, "start", failure, LogSnapshot(0, 0)))
            self._inbox.get()  # leaving now would look like a death
            raise EOFError("the driver gave up a rank that could not join") from failure
        self._send("done", 0, (self._context.tp.log.snapshot(0), dumps(None)))
        return self._run_jobs(self._context)

    def leave(self) -> None:
        """Leave the group and hang up.

        A group that something still holds when the interpreter ends would abort it, and NCCL lets none go before the graphs
        that captured its collectives are gone.
        """
        self._context = None
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        # Not close alone: the other end would not hear of it while the listener waits here.
        sock = socket.socket(fileno=self._connection.fileno())
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.detach()

    def _send(self, kind: Kind, number: int, payload: Any) -> None:
        with self._send_lock:
            self._connection.send((kind, number, payload))

    def _listen(self, watched: Sequence[int], on_gone: Callable[[], None]) -> None:
        poller = select.poll()
        for fd in (self._connection.fileno(), *watched):
            poller.register(fd, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poller.poll(1000 * _TICK_S)}
                self._tell_if_overdue()
                if not ready:
                    continue
                if self._connection.fileno() not in ready:
                    raise EOFError("the driver is gone")
                kind, number, payload = self._connection.recv()
                if kind == "inspect":
                    context = self._context
                    self._send("report", 0, None if context is None else report(context, self._thread_ids))
                    continue
                self._inbox.put((kind, number, payload))
                if kind == "stop":
                    return
        except (EOFError, OSError):
            on_gone()
            self._inbox.put(None)

    def _tell_if_overdue(self) -> None:
        """The driver counts the first answer of a rank: from now on it has failed, whatever the job still does."""
        context = self._context
        if context is not None and (what := context.overdue) is not None:
            error = overdue_error(self._rank, what, report(context, self._thread_ids))
            self._send("raised", self._job_number, error)

    def _run_jobs(self, context: RankContext) -> int:
        while (message := self._inbox.get()) is not None:
            kind, number, payload = message
            if kind == "stop":
                context.state.clear()
                return int(payload)
            self._job_number = number
            context.send_event = functools.partial(self._emit, number)
            context.send_phase = functools.partial(self._send, "phase", number)
            answer, raised = run_job(context, functools.partial(loads, payload), dumps)
            if isinstance(raised, (SystemExit, KeyboardInterrupt)):
                raise raised  # the process ends with the code that the job asked for, and the driver sees that
            self._send("done" if raised is None else "raised", number, answer)
            context.enter_phase("idle")
        raise EOFError("the driver is gone")

    def _emit(self, number: int, event: Any) -> None:
        self._send("event", number, dumps(event))


def connect_store(port: int, start_timeout_s: float) -> TCPStore:
    """A rank's end of the driver's store. The driver holds it, so it outlives every rank and goes with the driver."""
    # The driver's deadline ends this wait, with a report on all ranks: a rank that gives up by itself would spoil that.
    return TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=start_timeout_s + 10))


def join_group(*, rank: int, tp_size: int, backend: str, device: torch.device, open_store: Callable[[], Store],
               interface: str | None, collective_timeout_s: float) -> RankContext:
    """Join the group of ranks; returns when all have joined.

    Args:
        rank: this one, of ``tp_size``.
        tp_size: ranks in the group.
        backend: torch's name of it: gloo or nccl.
        device: this rank's own.
        open_store: gives the store through which ranks find each other.
        interface: the network interface for gloo, which would look up the host's own name otherwise, and that not every machine
            can resolve.
        collective_timeout_s: how long a collective may wait for the other ranks.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # torch waits four times this, a minute by default, before it ends a rank whose collective timed out: for a dump of its
        # own, where the driver tells more.
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "250")
    elif interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(backend, store=open_store(), rank=rank, world_size=tp_size,
                            timeout=timedelta(seconds=collective_timeout_s),
                            device_id=device if device.type == "cuda" else None)
    group = dist.group.WORLD
    assert group is not None, "the group exists after init_process_group"
    tp = ProcessTPGroup(group, device)
    if device.type == "cuda":
        tp.connect_peers()
    return RankContext(tp=tp, device=device)


def main(rank: int, connection: Connection, dump: Connection, join: Callable[[], RankContext], *, driver_pid: int,
         num_threads: int, environ: Mapping[str, str]) -> None:
    """The life of a rank that is a process of the driver's: until the driver says stop or is gone.

    ``dump`` is where faulthandler writes when Python itself no longer answers, or dies.
    """
    gc.freeze()  # what the fork server loaded is never garbage: not worth looking through
    # Ctrl-C reaches the whole terminal; the driver decides what becomes of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(file=dump.fileno(), all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=dump.fileno(), all_threads=True)
    # A fork server keeps the environment that it was started with.
    os.environ.clear()
    os.environ.update(environ)
    watched: list[int] = []
    # A process that the driver forked may hold the connection open after the driver's death: watch that too.
    with suppress(AttributeError, OSError):
        watched.append(os.pidfd_open(driver_pid))
    server = RankServer(rank, connection, on_gone=functools.partial(os._exit, 1), watched=watched)
    torch.set_num_threads(num_threads)
    try:
        server.serve(join)
    except (EOFError, OSError):
        os._exit(1)  # the driver is gone: nobody is left to tell
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_LEAVE_S)
    server.leave()

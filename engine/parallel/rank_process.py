"""The life of one rank that is a process: join the group, run jobs in order, leave with the driver.

Three sockets lead to the driver. ``jobs``: jobs in, events and answers out. ``control``: a thread of its own
answers questions even while a job hangs, and takes the process down when the driver is gone. ``dumps``: where
faulthandler writes when Python itself no longer answers, or dies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import select
import signal
import socket
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.channel import Kind, dumps, loads, receive_frame, send_frame
from engine.parallel.collective_log import LogSnapshot
from engine.parallel.failures import error_from_exception
from engine.parallel.rank_job import RankContext, rank_error, report, run_job
from engine.parallel.rendezvous import join_group


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSetup:
    """What a rank must know to start. Plain data."""

    rank: int
    tp_size: int
    backend: str
    device: str
    store_port: int
    driver_pid: int
    start_timeout_s: float
    collective_timeout_s: float
    num_threads: int
    environ: dict[str, str]


def main(setup: RankSetup, jobs: socket.socket, control: socket.socket, dump: socket.socket) -> None:
    """Run until the driver says stop or is gone."""
    # Ctrl-C reaches the whole terminal; the driver decides what becomes of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(file=dump.fileno(), all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=dump.fileno(), all_threads=True)
    # A fork server keeps the environment that it was started with.
    os.environ.clear()
    os.environ.update(setup.environ)
    box: list[RankContext] = []
    threading.Thread(target=_serve_control, args=(control, setup.driver_pid, box), name="rank-control", daemon=True).start()
    torch.set_num_threads(setup.num_threads)
    try:
        device = torch.device(setup.device)
        group = join_group(
            rank=setup.rank,
            tp_size=setup.tp_size,
            backend=setup.backend,
            device=device,
            store_port=setup.store_port,
            start_timeout_s=setup.start_timeout_s,
            collective_timeout_s=setup.collective_timeout_s,
        )
        context = RankContext(tp=group, device=device)
    except Exception as failure:
        error = error_from_exception(setup.rank, "start", failure, LogSnapshot(0, 0))
        send_frame(jobs, Kind.RAISED, 0, dumps(error))
        return
    box.append(context)
    send_lock = threading.Lock()

    def send(kind: Kind, number: int, body: bytes) -> None:
        with send_lock:  # a job may emit from threads of its own
            send_frame(jobs, kind, number, body)

    def emit(number: int, payload: Any) -> None:
        send(Kind.EVENT, number, dumps(payload))

    def tell_phase(number: int, phase: str) -> None:
        send(Kind.PHASE, number, phase.encode())

    try:
        send(Kind.DONE, 0, dumps((context.tp.log.snapshot(0), dumps(None))))
        while (frame := receive_frame(jobs)).kind is Kind.JOB:
            number = frame.number
            context.send_event = functools.partial(emit, number)
            context.send_phase = functools.partial(tell_phase, number)
            kind, body = _answer(context, frame.body)
            send(kind, number, body)
            context.enter_phase("idle")
    except (EOFError, OSError):
        os._exit(1)  # the driver is gone: nobody is left to tell
    context.state.clear()
    dist.destroy_process_group()


def _answer(context: RankContext, body: bytes | bytearray) -> tuple[Kind, bytes]:
    context.enter_phase("receiving the job")
    try:
        job, args = loads(body)
    except Exception as failure:
        return Kind.RAISED, dumps(rank_error(context, failure))
    result, raised = run_job(context, job, args)
    if isinstance(raised, SystemExit):
        raise raised  # the process ends with the code that the job asked for, and the driver sees that
    if raised is None:
        context.enter_phase("sending the result")
        try:
            return Kind.DONE, dumps((context.tp.log.snapshot(0), dumps(result)))
        except Exception as failure:
            raised = failure
    return Kind.RAISED, dumps(rank_error(context, raised))


def _serve_control(control: socket.socket, driver_pid: int, box: list[RankContext]) -> None:
    poller = select.poll()
    poller.register(control, select.POLLIN)
    # A process that the driver forked may hold the sockets open after the driver's death: watch that too.
    with contextlib.suppress(AttributeError, OSError):
        poller.register(os.pidfd_open(driver_pid), select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if control.fileno() not in ready:
            os._exit(1)
        try:
            receive_frame(control)
            answer = dumps(report(box[0])) if box else b""
            send_frame(control, Kind.REPORT, 0, answer)
        except (EOFError, OSError):
            os._exit(1)

"""The life of one rank that is a process: join the group, run jobs in order, answer its driver, leave with it.

Three sockets lead to the driver. ``jobs``: jobs in, events and answers out. ``control``: a thread of its own
answers questions even while a job hangs, and takes the process down when the driver is gone. ``dumps``: where
faulthandler writes when Python itself no longer answers, or dies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.parallel.channel import Kind, dumps, loads, receive_frame, send_frame
from engine.parallel.collective_log import LogSnapshot
from engine.parallel.failures import error_from_exception
from engine.parallel.group import ProcessTPGroup
from engine.parallel.rank_job import RankContext, rank_error, report, run_job


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
    threading.Thread(
        target=_serve_control, args=(control, setup.driver_pid, box), name="rank-control", daemon=True
    ).start()
    torch.set_num_threads(setup.num_threads)
    try:
        context = RankContext(tp=_join_group(setup), device=torch.device(setup.device))
    except Exception as failure:
        error = error_from_exception(setup.rank, "start", failure, LogSnapshot(0, 0))
        send_frame(jobs, Kind.RAISED, 0, dumps(error))
        return
    box.append(context)
    send_lock = threading.Lock()

    def send(kind: Kind, number: int, body: bytes) -> None:
        with send_lock:  # a job may emit from threads of its own
            send_frame(jobs, kind, number, body)

    try:
        send(Kind.DONE, 0, dumps((context.tp.log.snapshot(0), dumps(None))))
        while (frame := receive_frame(jobs)).kind is Kind.JOB:
            context.send_event = lambda payload, number=frame.number: send(Kind.EVENT, number, dumps(payload))
            context.send_phase = lambda phase, number=frame.number: send(Kind.PHASE, number, phase.encode())
            kind, body = _answer(context, frame.body)
            send(kind, frame.number, body)
            context.enter_phase("idle")
    except (EOFError, OSError):
        os._exit(1)  # the driver is gone: nobody is left to tell
    context.state.clear()
    dist.destroy_process_group()


def _join_group(setup: RankSetup) -> ProcessTPGroup:
    # The driver holds the store, so it outlives every rank and goes with the driver.
    store = dist.TCPStore(
        "127.0.0.1", setup.store_port, is_master=False, timeout=timedelta(seconds=setup.start_timeout_s)
    )
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # gloo looks up the host's own name otherwise, which not every machine can resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        setup.backend,
        store=store,
        rank=setup.rank,
        world_size=setup.tp_size,
        timeout=timedelta(seconds=setup.collective_timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    group = dist.group.WORLD
    assert group is not None, "the group exists after init_process_group"
    return ProcessTPGroup(group, device)


def _answer(context: RankContext, body: bytes | bytearray) -> tuple[Kind, bytes]:
    context.enter_phase("receiving the job")
    try:
        job, args = loads(body)
    except Exception as failure:
        return Kind.RAISED, dumps(rank_error(context, failure))
    result, raised = run_job(context, job, args)
    if raised is None:
        context.enter_phase("sending the result")
        try:
            return Kind.DONE, dumps((context.tp.log.snapshot(0), dumps(result)))
        except Exception as failure:
            raised = failure
    return Kind.RAISED, dumps(rank_error(context, raised))


def _serve_control(control: socket.socket, driver_pid: int, box: list[Any]) -> None:
    poller = select.poll()
    poller.register(control, select.POLLIN)
    # A process that the driver forked may hold the sockets open after the driver's death, so watch that as well.
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

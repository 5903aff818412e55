"""The life of one rank that is a process of the driver's: join the group, run jobs in order, leave with the driver.

Three sockets lead to the driver. ``jobs``: jobs in, events and answers out. ``control``: a thread of its own
answers questions even while a job hangs, and takes the process down when the driver is gone. ``dumps``: where
faulthandler writes when Python itself no longer answers, or dies.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass

import torch

from engine.parallel.collective_log import LogSnapshot
from engine.ranks.channel import Kind, dumps, send_frame
from engine.ranks.failures import error_from_exception
from engine.ranks.jobs import RankContext
from engine.ranks.rank_loop import serve_control, serve_jobs
from engine.ranks.rendezvous import connect_store, join_group, leave_group


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
    gc.freeze()  # what the fork server loaded is never garbage: not worth looking through
    # Ctrl-C reaches the whole terminal; the driver decides what becomes of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(file=dump.fileno(), all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=dump.fileno(), all_threads=True)
    # A fork server keeps the environment that it was started with.
    os.environ.clear()
    os.environ.update(setup.environ)
    box: list[RankContext] = []
    watched: list[int] = []
    # A process that the driver forked may hold the sockets open after the driver's death: watch that too.
    with contextlib.suppress(AttributeError, OSError):
        watched.append(os.pidfd_open(setup.driver_pid))
    watch = functools.partial(serve_control, control, box, watched=watched, on_gone=functools.partial(os._exit, 1))
    threading.Thread(target=watch, name="rank-control", daemon=True).start()
    torch.set_num_threads(setup.num_threads)
    try:
        device = torch.device(setup.device)
        if device.type == "cpu":
            # gloo looks up the host's own name otherwise, which not every machine can resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        group = join_group(
            rank=setup.rank,
            tp_size=setup.tp_size,
            backend=setup.backend,
            device=device,
            store=connect_store(setup.store_port, setup.start_timeout_s),
            collective_timeout_s=setup.collective_timeout_s,
        )
        box.append(RankContext(tp=group, device=device))
        del group  # the box alone holds it, for leaving
    except Exception as failure:
        error = error_from_exception(setup.rank, "start", failure, LogSnapshot(0, 0))
        send_frame(jobs, Kind.RAISED, 0, dumps(error))
        return
    try:
        serve_jobs(box[0], jobs)
    except (EOFError, OSError):
        os._exit(1)  # the driver is gone: nobody is left to tell
    leave_group(box)

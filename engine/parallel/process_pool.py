"""Ranks as processes of the driver's own, forked from a server that has torch loaded."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch leaves it out of __all__

from engine.parallel import fork_server, rank_process
from engine.parallel.channel import Channel, Kind
from engine.parallel.failures import RankError, RankReport, describe_exit
from engine.parallel.link_pool import LinkPool
from engine.parallel.links import ProcessLink
from engine.parallel.pool import Deliver
from engine.parallel.rank_process import RankSetup
from engine.parallel.rendezvous import make_store

_DUMP_S = 0.3  # how long faulthandler gets to write the stacks of a rank that does not answer


class ProcessPool(LinkPool[ProcessLink]):
    """One process a rank. Its sentinel tells of its death at once."""

    def __init__(self, tp_size: int, backend: str, *, start_timeout_s: float, collective_timeout_s: float,
                 preload: Sequence[str] = ()) -> None:
        super().__init__()
        self._preload = preload
        self._tp_size = tp_size
        self._backend = backend
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._owner_pid = os.getpid()
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
        context.set_forkserver_preload([fork_server.__name__, *_preload(), *self._preload])
        _start_fork_server()
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
            link = ProcessLink(rank=rank, process=process, jobs=Channel(jobs[0]), control=Channel(control[0]), dump=dump[0])
            self._adopt(link)
            try:
                process.start()
            finally:
                for sock in theirs:
                    sock.close()
            self._selector.register(process.sentinel, selectors.EVENT_READ, functools.partial(self._bury, link))

    def _bury(self, link: ProcessLink, deliver: Deliver) -> None:
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

    def _press(self, silent: Sequence[ProcessLink]) -> None:
        # Where the control thread can't run, something holds the interpreter, or the process is stopped.
        for link in silent:
            os.kill(link.pid, signal.SIGUSR1)
        time.sleep(_DUMP_S)
        for link in silent:
            link.report = RankReport(phase=link.phase, stacks=link.read_dump(), log=None)

    def stop(self, exit_code: int = 0) -> None:
        for link in self._links.values():
            link.jobs.send(Kind.STOP)
        deadline = time.monotonic() + 5.0
        for link in self._links.values():
            link.process.join(max(0.0, deadline - time.monotonic()))

    def kill(self, reason: str) -> None:
        """End all ranks at once and give back every socket and the port."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the driver exits: the ranks are not its own
        for link in self._links.values():
            link.kill()
        for link in self._links.values():
            link.close()
        self._links = {}
        self._selector.close()
        self._store = None


def _start_fork_server() -> None:
    """Start it, if it does not run, with the folder that it is to remove in its environment, and the driver's path.

    Left to itself, Python 3.11 has it look in the current folder first, where ``engine`` may be someone else's.
    """
    told = {fork_server.FOLDER: multiprocessing.util.get_temp_dir(), "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _preload() -> list[str]:
    """What the fork server loads once for all ranks, unless someone started it before.

    None of it may touch a GPU: CUDA does not survive a fork.
    """
    names = ["torch", "torch.distributed", "engine.parallel.rank_process"]
    # Seconds of import for each rank that will run the engine, and no use to ranks that will not.
    names += [name for name in ("engine.core",) if name in sys.modules]
    # A model's config comes to every rank as an object of transformers, whose module brings hundreds along.
    names += [name for name in sys.modules if name.startswith("transformers.models.") and ".configuration_" in name]
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    if main_spec is not None and main_spec.parent:
        names.append(main_spec.parent)  # each rank imports the main module anew: have its package ready
    return names

"""Ranks as processes of the driver's own, forked from a server that has torch loaded."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch leaves it out of __all__

from engine.ranks import rank_loop
from engine.ranks.failures import RankError, RankReport, describe_exit
from engine.ranks.forking import importable_main, start_fork_server
from engine.ranks.pool import ConnectedPool, Deliver, RankHandle

_STOP_S = 5.0  # how long idle ranks get to leave in good order
_DUMP_S = 0.3  # how long faulthandler gets to write the stacks of a rank that does not answer


@dataclass(slots=True, kw_only=True)
class ProcessHandle(RankHandle):
    """The hold on a rank that is a process of the driver's own.

    dump  where faulthandler writes when the rank's Python no longer answers, or dies
    """

    process: Any
    dump: Connection

    def signal(self, number: int) -> None:
        """Send a signal, if there is a process to get it: pid 0, of one that never started, is this process and its group."""
        if self.process.pid and self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has died this moment
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def read_dump(self) -> str:
        """What faulthandler wrote since the last time. As bytes: it writes no messages."""
        os.set_blocking(self.dump.fileno(), False)
        parts = []
        with contextlib.suppress(OSError):
            while part := os.read(self.dump.fileno(), 1 << 16):
                parts.append(part)
        return b"".join(parts).decode(errors="replace")

    def close(self) -> None:
        """Give back connections and process of a rank that was ended."""
        if self.process.pid:
            self.process.join(5.0)
            if self.process.exitcode is not None:
                self.process.close()
        RankHandle.close(self)  # slots=True makes the class anew, and super() would look for the old one
        self.dump.close()


class ProcessPool(ConnectedPool[ProcessHandle]):
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
        start_fork_server(self._tp_size, self._preload)
        self._store = _make_store()
        # Also for CUDA: the server never touches a GPU, so its forks may, and start in a quarter of spawn's time.
        context = multiprocessing.get_context("forkserver")
        with importable_main():
            for rank in range(self._tp_size):
                self._start_rank(rank, context, self._store.port)

    def _start_rank(self, rank: int, context: ForkServerContext, store_port: int) -> None:
        join = functools.partial(
            rank_loop.join_group, rank=rank, tp_size=self._tp_size, backend=self._backend,
            device=torch.device("cuda", rank) if self._backend == "nccl" else torch.device("cpu"),
            open_store=functools.partial(rank_loop.connect_store, store_port, self._start_timeout_s),
            interface="lo" if sys.platform == "linux" else "lo0", collective_timeout_s=self._collective_timeout_s)
        options = {"driver_pid": self._owner_pid, "num_threads": max(1, torch.get_num_threads() // self._tp_size),
                   "environ": dict(os.environ)}
        (ours, theirs), (dump, their_dump) = Pipe(), Pipe()
        with theirs, their_dump:
            process = context.Process(target=rank_loop.main, args=(rank, theirs, their_dump, join), kwargs=options,
                                      name=f"rank-{rank}", daemon=True)
            handle = ProcessHandle(rank=rank, connection=ours, process=process, dump=dump)
            self._adopt(handle)
            process.start()
        self._actions[process.sentinel] = functools.partial(self._rank_died, handle)

    def _rank_died(self, handle: ProcessHandle, deliver: Deliver) -> None:
        """Read what the dead rank still said, then tell how it ended."""
        del self._actions[handle.process.sentinel]
        while not handle.connection.closed and handle.connection.poll():
            self._read(handle, deliver)
        handle.process.join(1.0)  # at once: the sentinel has fired
        error = RankError(
            rank=handle.rank,
            kind="died",
            phase=handle.phase,
            summary=describe_exit(handle.process.exitcode),
            traceback=handle.read_dump(),
        )
        deliver(handle.rank, "died", 0, error)

    def _dump_stacks(self, silent: Sequence[ProcessHandle]) -> None:
        # Where the listener can't run, something holds the interpreter, or the process is stopped.
        for handle in silent:
            handle.signal(signal.SIGUSR1)
        time.sleep(_DUMP_S)
        for handle in silent:
            handle.report = RankReport(phase=handle.phase, stacks=handle.read_dump(), log=None)

    def stop(self, exit_code: int = 0) -> None:
        if os.getpid() != self._owner_pid:
            return
        self._tell_all("stop", 0, exit_code)
        deadline = time.monotonic() + _STOP_S
        for handle in self._handles.values():
            handle.process.join(max(0.0, deadline - time.monotonic()))

    def kill(self, reason: str) -> None:
        """End all ranks at once and give back every connection and the port."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the driver exits: the ranks are not its own
        for handle in self._handles.values():
            handle.kill()
        self._release()
        self._store = None


def _make_store() -> TCPStore:
    """A store for the ranks to find each other, on a port of the system's choice that only this machine can reach."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())

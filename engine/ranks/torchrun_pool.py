"""The driver's side of ranks that torchrun started: rank 0 in a thread of this process, the others over TCP."""

from __future__ import annotations

import contextlib
import functools
import selectors
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # torch leaves it out of __all__

from engine.ranks.channel import Channel, Kind, dumps
from engine.ranks.failures import RankError
from engine.ranks.jobs import RankContext
from engine.ranks.link_pool import LinkPool
from engine.ranks.links import Link
from engine.ranks.pool import Deliver
from engine.ranks.rank_loop import serve_control, serve_jobs
from engine.ranks.rendezvous import leave_group
from engine.ranks.torchrun import (
    Launch,
    Purpose,
    Welcome,
    announce,
    interface_of,
    is_same_host,
    join,
    keep_alive,
    open_store,
    read_hello,
)

_TOLD_S = 0.5  # after torchrun asked us to end: how long the death that made it ask gets to show
_STOP_S = 5.0
_LEAVE_S = 3.0  # how long rank 0 gets to notice in its collective that the others are gone


class TorchrunPool(LinkPool[Link]):
    """Ranks of other processes, which torchrun ends and nobody can start anew. A connection that closes is a death."""

    def __init__(self, launch: Launch, device_type: str, *, start_timeout_s: float, collective_timeout_s: float) -> None:
        super().__init__()
        self._launch = launch
        self._start_timeout_s = start_timeout_s
        self._device_type = device_type
        self._collective_timeout_s = collective_timeout_s
        self._listener: socket.socket | None = None
        self._greeted: dict[tuple[int, Purpose], socket.socket] = {}
        self._deaths: set[int] = set()
        self._ending = False
        self._told_to_end: float | None = None
        self._polling = False
        self._restore_signal: Any = None
        self._own_rank: threading.Thread | None = None

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._restore_signal = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._store = open_store(self._start_timeout_s)
        self._listener, self._secret = announce(self._store, self._launch)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        if self._launch.tp_size == 1:
            self._welcome_all()

    def _accept(self, deliver: Deliver) -> None:
        assert self._listener is not None, "it is in the selector only while it is open"
        sock, _ = self._listener.accept()
        hello = read_hello(sock, self._secret, self._launch)
        if hello is None or hello in self._greeted:
            sock.close()
            return
        keep_alive(sock)
        self._greeted[hello] = sock
        if len(self._greeted) == 2 * (self._launch.tp_size - 1):
            self._welcome_all()

    def _welcome_all(self) -> None:
        self._close_listener()
        outward = [sock for sock in self._greeted.values() if not is_same_host(sock)]
        interface = interface_of(next(iter(outward or self._greeted.values()))) if self._greeted else None
        welcome = Welcome(tp_size=self._launch.tp_size, device_type=self._device_type, interface=interface,
                          collective_timeout_s=self._collective_timeout_s)
        self._start_own_rank(welcome)
        for rank in range(1, self._launch.tp_size):
            jobs, control = self._greeted.pop((rank, "jobs")), self._greeted.pop((rank, "control"))
            link = Link(rank=rank, jobs=Channel(jobs), control=Channel(control))
            self._adopt(link)
            link.jobs.send(Kind.JOB, 0, dumps(welcome))

    def _start_own_rank(self, welcome: Welcome) -> None:
        """Rank 0 speaks as the others do, over sockets, from a thread."""
        (jobs, their_jobs), (control, their_control) = socket.socketpair(), socket.socketpair()
        self._adopt(Link(rank=0, jobs=Channel(jobs), control=Channel(control)))
        box: list[RankContext] = []
        thread = threading.Thread(target=_live, args=(self._launch, welcome, self._store, their_jobs, box), name="rank-0",
                                  daemon=True)
        thread.start()
        watch = functools.partial(_watch, their_control, box, thread)
        threading.Thread(target=watch, name="rank-0-control", daemon=True).start()
        self._own_rank = thread

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        self._polling = True
        try:
            if self._told_to_end is not None and not self._deaths:
                left = self._told_to_end + _TOLD_S - time.monotonic()
                if left <= 0:
                    raise SystemExit(_TOLD)
                timeout_s = left if timeout_s is None else min(left, timeout_s)
            super().poll(deliver, timeout_s)
        finally:
            self._polling = False

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        # torchrun ends all ranks of a host when one of them dies. The report on that one is worth the few seconds
        # that torchrun leaves us.
        if not self._polling and not self._deaths:
            raise SystemExit(_TOLD)
        if self._told_to_end is None:
            self._told_to_end = time.monotonic()
        self.wake()

    def _hung_up(self, link: Link, channel: Channel, deliver: Deliver) -> None:
        if channel is not link.jobs or self._ending:
            return
        # torchrun ends the other ranks of the dead one's host: only the first died by itself.
        consequence = bool(self._deaths)
        self._deaths.add(link.rank)
        deliver(link.rank, Kind.DIED, 0, RankError(
            rank=link.rank, kind="died", phase=link.phase, consequence=consequence,
            summary="its connection closed: the process, or its host, is gone; torchrun there says how it ended"))

    def stop(self, exit_code: int = 0) -> None:
        self._ending = True
        for link in self._links.values():
            link.jobs.send(Kind.STOP, exit_code)
        deadline = time.monotonic() + _STOP_S
        while (left := deadline - time.monotonic()) > 0 and any(not link.jobs.closed for link in self._links.values()):
            self.poll(lambda *message: None, left)

    def kill(self, reason: str) -> None:
        """Close all connections: the other ranks end themselves, and torchrun sees that."""
        self._close_listener()
        for sock in self._greeted.values():
            sock.close()
        self._greeted = {}
        for link in self._links.values():
            link.close()
        self._links = {}
        if self._own_rank is not None:
            # An interpreter that ends around a thread inside a collective is aborted, and its exit code lost.
            self._own_rank.join(_LEAVE_S)
        self._release()
        if self._restore_signal is not None and threading.current_thread() is threading.main_thread():
            # Ranks that are given up end with an error, upon which torchrun asks this process to end too. What it has
            # to report is worth more than the haste: torchrun waits 30 s before it insists.
            signal.signal(signal.SIGTERM, self._restore_signal if self._ending else signal.SIG_IGN)
            self._restore_signal = None

    def _close_listener(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None


_TOLD = "torchrun asked rank 0 to end (SIGTERM), and no rank was seen to die: it was stopped from outside, or failed to start"


def _live(launch: Launch, welcome: Welcome, store: Store, jobs: socket.socket, box: list[RankContext]) -> None:
    """The life of rank 0, in a thread of the driver's process."""
    with jobs, contextlib.suppress(EOFError, OSError):  # the driver has closed: it knows why
        try:
            context = join(launch, welcome, welcome.interface, store, jobs)
            if context is not None:
                box.append(context)
                del context  # or the group would be held from here
                serve_jobs(box[0], jobs)
        finally:
            leave_group(box)


def _watch(control: socket.socket, box: list[RankContext], rank: threading.Thread) -> None:
    with control:
        serve_control(control, box, thread_ids=[rank.ident or 0], on_gone=lambda: None)

"""Ranks that torchrun started, on one host or several: how they find the driver, and how each serves it.

Rank 0's process drives and runs rank 0 in a thread; every other process calls ``serve`` and does what rank 0 asks until it says
stop. torchrun's store tells where the driver listens, and the secret that both ends must know: who can reach that store can run
code here, as with torch.distributed itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Pipe, answer_challenge, deliver_challenge
from types import FrameType
from typing import Any, cast

import psutil
import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch leaves them out of __all__
from torch.distributed.rendezvous import rendezvous

from engine.ranks.failures import RankError
from engine.ranks.jobs import RankContext
from engine.ranks.pool import ConnectedPool, Deliver, RankHandle, limit_stalls
from engine.ranks.rank_loop import RankServer, join_group

_ADDRESS_KEY = "driver"
_LOOK_EVERY_S = 0.05
_GREET_S = 2  # how long someone who connects may take to say each thing
_SILENT_S = 5  # a host that vanishes says nothing: after so long without an answer it counts as gone
_TOLD_S = 0.5  # after torchrun asked us to end: how long the death that made it ask gets to show
_STOP_S = 5.0
_LEAVE_S = 3.0  # how long rank 0 gets to notice in its collective that the others are gone
_TOLD = "torchrun asked rank 0 to end (SIGTERM), and no rank was seen to die: it was stopped from outside, or failed to start"
COULD_NOT_RUN = 3
"""Exit code of a rank whose driver is gone; 1 would be a finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What torchrun tells each process that it starts.

    rank, tp_size      this process, from 0, and how many there are on all hosts
    local_rank         this process on its own host, from 0: which GPU is its own
    local_size         how many there are on this host
    host               where rank 0 is, as the other hosts know it
    """

    rank: int
    tp_size: int
    local_rank: int
    local_size: int
    host: str

    @property
    def one_host(self) -> bool:
        return self.local_size == self.tp_size


def launched(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """What torchrun told this process, or None if torchrun did not start it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in environ for name in names):
        return None
    rank, tp_size, local_rank, local_size = (int(environ[name]) for name in names[:4])
    return Launch(rank=rank, tp_size=tp_size, local_rank=local_rank, local_size=local_size, host=environ["MASTER_ADDR"])


def check_launch(launch: Launch, tp_size: int, fabric: str, device: torch.device) -> tuple[str, torch.device]:
    """The fabric that joins torchrun's ranks, and rank 0's device. Raises ValueError for what can't work."""
    if launch.rank != 0:
        raise ValueError(f"rank={launch.rank} can't drive: under torchrun rank 0 does, and the others serve it")
    if tp_size != launch.tp_size:
        raise ValueError(f"tp_size={tp_size}, but torchrun started {launch.tp_size} ranks: under torchrun there are no others")
    index: int | None = device.index
    if device.type not in ("cpu", "cuda") or index is not None:
        raise ValueError(f"device={str(device)!r} is not supported under torchrun: it is cpu, or cuda for each rank's own GPU")
    joined_by = "nccl" if device.type == "cuda" else "gloo"
    if fabric not in ("auto", joined_by):
        raise ValueError(f"fabric={fabric!r}, but torchrun's ranks on device={device.type!r} are joined by {joined_by}")
    return joined_by, torch.device("cuda", launch.local_rank) if device.type == "cuda" else device


def open_store(timeout_s: float) -> Store:
    """Our part of torchrun's store."""
    met = cast("Iterator[tuple[Store, int, int]]", rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return PrefixStore("shardproof", next(met)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What the driver tells a rank once all ranks are there. Plain data.

    interface  the driver's own network interface: for ranks on its host, which may know it by another name
    """

    device_type: str
    interface: str | None
    collective_timeout_s: float


class TorchrunPool(ConnectedPool[RankHandle]):
    """Ranks of other processes, which torchrun ends and nobody can start anew. A connection that closes is a death."""

    def __init__(self, launch: Launch, device_type: str, *, start_timeout_s: float, collective_timeout_s: float) -> None:
        super().__init__()
        self._launch = launch
        self._start_timeout_s = start_timeout_s
        self._device_type = device_type
        self._collective_timeout_s = collective_timeout_s
        self._interface: str | None = None
        self._deaths: set[int] = set()
        self._ending = False
        self._told_to_end: float | None = None
        self._polling = False
        self._restore_signal: Any = None
        self._own_rank: threading.Thread | None = None
        self._listener: socket.socket | None = None

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._restore_signal = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._store = open_store(self._start_timeout_s)
        self._secret = secrets.token_bytes(32)
        self._listener = listen(self._store, self._launch, self._secret)
        self._actions[self._listener] = self._accept
        if self._launch.tp_size == 1:
            self._welcome_all()

    def _accept(self, deliver: Deliver) -> None:
        assert self._listener is not None, "it is waited for only while it is open"
        sock, _ = self._listener.accept()
        interface, same_host = interface_of(sock), is_same_host(sock)
        greeted = greet(sock, self._secret, self._launch)
        if greeted is None:
            return
        rank, connection = greeted
        if rank in self._handles:
            connection.close()
            return
        if self._interface is None or not same_host:
            self._interface = interface
        self._adopt(RankHandle(rank=rank, connection=connection))
        if len(self._handles) == self._launch.tp_size - 1:
            self._welcome_all()

    def _welcome_all(self) -> None:
        self._close_listener()
        welcome = Welcome(device_type=self._device_type, interface=self._interface,
                          collective_timeout_s=self._collective_timeout_s)
        self._tell_all("job", 0, welcome)
        # Rank 0 speaks as the others do, from a thread.
        ours, theirs = Pipe()
        self._own_rank = threading.Thread(target=_live, args=(self._launch, welcome, self._store, theirs), name="rank-0",
                                          daemon=True)
        self._adopt(RankHandle(rank=0, connection=ours))
        self._own_rank.start()

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

    def _hung_up(self, handle: RankHandle, deliver: Deliver) -> None:
        if self._ending:
            return
        # torchrun ends the other ranks of the dead one's host: only the first died by itself.
        consequence = bool(self._deaths)
        self._deaths.add(handle.rank)
        deliver(handle.rank, "died", 0, RankError(
            rank=handle.rank, kind="died", phase=handle.phase, consequence=consequence,
            summary="its connection closed: the process, or its host, is gone; torchrun there says how it ended"))

    def stop(self, exit_code: int = 0) -> None:
        self._ending = True
        self._tell_all("stop", 0, exit_code)
        deadline = time.monotonic() + _STOP_S
        connections = [handle.connection for handle in self._handles.values()]
        while (left := deadline - time.monotonic()) > 0 and not all(connection.closed for connection in connections):
            self.poll(lambda *message: None, left)

    def kill(self, reason: str) -> None:
        """Close all connections: the other ranks end themselves, and torchrun sees that."""
        self._close_listener()
        self._release()
        if self._own_rank is not None:
            # An interpreter that ends around a thread inside a collective is aborted, and its exit code lost.
            self._own_rank.join(_LEAVE_S)
        if self._restore_signal is not None and threading.current_thread() is threading.main_thread():
            # Ranks that are given up end with an error, upon which torchrun asks this process to end too. What it has
            # to report is worth more than the haste: torchrun waits 30 s before it insists.
            signal.signal(signal.SIGTERM, self._restore_signal if self._ending else signal.SIG_IGN)
            self._restore_signal = None

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._actions.pop(self._listener, None)
            self._listener.close()
            self._listener = None


def listen(store: Store, launch: Launch, secret: bytes) -> socket.socket:
    """Rank 0: listen for the others and tell them where."""
    loopback = launch.one_host or launch.host in ("localhost", "127.0.0.1", "::1")
    dualstack = not loopback and socket.has_dualstack_ipv6()
    listener = socket.create_server(("127.0.0.1" if loopback else "", 0), backlog=launch.tp_size, dualstack_ipv6=dualstack,
                                    family=socket.AF_INET6 if dualstack else socket.AF_INET)
    host = "127.0.0.1" if loopback else launch.host
    store.set(_ADDRESS_KEY, f"{host} {listener.getsockname()[1]} {secret.hex()}")
    return listener


def greet(sock: socket.socket, secret: bytes, launch: Launch) -> tuple[int, Connection] | None:
    """Rank 0: who has connected; None for someone who is no rank of ours, whose connection is closed."""
    connection = connect_to(sock)
    limit_stalls(connection, _GREET_S)
    try:
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
        rank = connection.recv()  # pickled, by someone who knows the secret
    except (AuthenticationError, EOFError, OSError):
        connection.close()
        return None
    if rank not in range(1, launch.tp_size):
        connection.close()
        return None
    return rank, connection


def connect_to(sock: socket.socket) -> Connection:
    """The same connection as messages. The system notices within seconds that the other host is gone without a word."""
    # Not multiprocessing's own Client and Listener: these know no IPv6, and one stranger who says nothing would hold
    # all ranks up.
    sock.settimeout(None)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limits = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 1000 * _SILENT_S}
        for name, value in limits.items():
            if hasattr(socket, name):  # not every system has all of them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(sock.detach())


def interface_of(sock: socket.socket) -> str | None:
    """The network interface that a connection goes through; None if no interface bears its address."""
    address = _local_address(sock)
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return str(name)
    return None


def is_same_host(sock: socket.socket) -> bool:
    """Whether both ends of a connection are on this host."""
    return _local_address(sock).startswith("127.") or sock.getsockname()[0] == sock.getpeername()[0]


def _local_address(sock: socket.socket) -> str:
    return str(sock.getsockname()[0]).removeprefix("::ffff:")  # as IPv6 sockets call addresses of IPv4


def _join(launch: Launch, welcome: Welcome, interface: str | None, store: Store) -> RankContext:
    on_gpu = welcome.device_type == "cuda"
    return join_group(rank=launch.rank, tp_size=launch.tp_size, backend="nccl" if on_gpu else "gloo",
                      device=torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu"), open_store=lambda: store,
                      interface=interface, collective_timeout_s=welcome.collective_timeout_s)


def _live(launch: Launch, welcome: Welcome, store: Store, connection: Connection) -> None:
    """The life of rank 0, in a thread of the driver's process."""
    server = RankServer(0, connection, on_gone=lambda: None, shares_process=True)
    with connection, contextlib.suppress(EOFError, OSError):  # the driver has closed: it knows why
        try:
            server.serve(lambda: _join(launch, welcome, welcome.interface, store))
        finally:
            server.leave()


def serve(launch: Launch, *, start_timeout_s: float = 120.0) -> int:
    """Be a rank other than 0: run what rank 0 asks, until it says stop. Returns the exit code that it asks for.

    Ends the process with code 3 when rank 0 is gone without having said so.

    Raises:
        RuntimeError: if rank 0 is not there within ``start_timeout_s``.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank in a collective would get to no handler
    store = open_store(start_timeout_s)
    sock, secret = _call(launch, store, start_timeout_s)
    interface, same_host = interface_of(sock), is_same_host(sock)

    def driver_is_gone() -> None:
        sys.stderr.write(f"rank {launch.rank}: rank 0 is gone or has given up, so this rank ends too\n")
        sys.stderr.flush()
        os._exit(COULD_NOT_RUN)

    with connect_to(sock) as connection:
        try:
            answer_challenge(connection, secret)
            deliver_challenge(connection, secret)
            connection.send(launch.rank)
            _, _, welcome = connection.recv()
            server = RankServer(launch.rank, connection, on_gone=driver_is_gone)
            exit_code = server.serve(
                lambda: _join(launch, welcome, welcome.interface if same_host else interface, store))
        except (EOFError, OSError):
            driver_is_gone()
            raise
        server.leave()
    return exit_code


def _call(launch: Launch, store: Store, timeout_s: float) -> tuple[socket.socket, bytes]:
    """A connection to rank 0, and the secret."""
    deadline = time.monotonic() + timeout_s
    # Not store.get: it can't be interrupted, and waits on where rank 0 has long given up.
    while not store.check([_ADDRESS_KEY]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {launch.rank}: rank 0 on host {launch.host} was not there within "
                               f"start_timeout_s={timeout_s:g}")
        time.sleep(_LOOK_EVERY_S)
    host, port, secret = store.get(_ADDRESS_KEY).decode().split()
    return socket.create_connection((host, int(port)), timeout=timeout_s), bytes.fromhex(secret)

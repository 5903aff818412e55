"""Ranks that torchrun started, on one host or several: how they find the driver, and how each serves it.

Rank 0's process drives (``TorchrunPool``) and runs rank 0 in a thread; every other process calls ``serve`` and does what
rank 0 asks until it says stop. Two TCP connections lead from each to the driver, as two sockets do for ranks of our own.
torchrun's store tells where the driver listens, and the secret that a rank must know: who can reach that store can run
code here, as with torch.distributed itself.
"""

from __future__ import annotations

import functools
import hmac
import os
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, cast

import psutil
import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch leaves them out of __all__
from torch.distributed.rendezvous import rendezvous

from engine.parallel.collective_log import LogSnapshot
from engine.ranks.channel import Kind, dumps, loads, receive_frame, send_frame
from engine.ranks.failures import error_from_exception
from engine.ranks.jobs import RankContext
from engine.ranks.rank_loop import serve_control, serve_jobs
from engine.ranks.rendezvous import join_group, leave_group

Purpose = Literal["jobs", "control"]
_PURPOSES: tuple[Purpose, ...] = ("jobs", "control")
_HELLO = struct.Struct("!32sIB")  # the secret, the rank, what the connection is for
_ADDRESS_KEY = "driver"
_LOOK_EVERY_S = 0.05
COULD_NOT_RUN = 3
"""Exit code of a rank whose driver is gone; 1 would be a finding."""
_SILENT_S = 5  # a host that vanishes says nothing: after so long without an answer it counts as gone


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
    """torchrun's store, our part of it."""
    met = cast("Iterator[tuple[Store, int, int]]", rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return PrefixStore("shardproof", next(met)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What the driver tells a rank once all ranks are there. Plain data.

    interface  the driver's own network interface: for ranks on its host, which may know it by another name
    """

    tp_size: int
    device_type: str
    interface: str | None
    collective_timeout_s: float


def announce(store: Store, launch: Launch) -> tuple[socket.socket, bytes]:
    """Rank 0: listen for the others and tell them where. Returns the listening socket, and the secret."""
    loopback = launch.one_host or launch.host in ("localhost", "127.0.0.1", "::1")
    listener = (socket.create_server(("127.0.0.1", 0)) if loopback
                else socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6()
                else socket.create_server(("", 0)))
    listener.listen(2 * launch.tp_size)
    secret = secrets.token_bytes(32)
    host = "127.0.0.1" if loopback else launch.host
    store.set(_ADDRESS_KEY, f"{host} {listener.getsockname()[1]} {secret.hex()}")
    return listener, secret


def read_hello(sock: socket.socket, secret: bytes, launch: Launch) -> tuple[int, Purpose] | None:
    """Rank 0: who has connected, and what for; None for someone who is no rank of ours."""
    sock.settimeout(2.0)
    try:
        data = sock.recv(_HELLO.size, socket.MSG_WAITALL)
        told, rank, purpose = _HELLO.unpack(data)
    except (OSError, struct.error):
        return None
    known = hmac.compare_digest(told, secret) and 0 < rank < launch.tp_size and purpose < len(_PURPOSES)
    return (rank, _PURPOSES[purpose]) if known else None


def keep_alive(sock: socket.socket) -> None:
    """Have the system notice within seconds that the other host is gone without a word; and send at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 1000 * _SILENT_S)):
        if hasattr(socket, name):  # not every system has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


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


def join(launch: Launch, welcome: Welcome, interface: str | None, store: Store, jobs: socket.socket) -> RankContext | None:
    """Any rank: join the group. Returns when all ranks have, or with None when it failed and the driver was told."""
    try:
        return _join(launch, welcome, interface, store)
    except Exception as failure:
        send_frame(jobs, Kind.RAISED, 0, dumps(error_from_exception(launch.rank, "start", failure, LogSnapshot(0, 0))))
        return None


def _join(launch: Launch, welcome: Welcome, interface: str | None, store: Store) -> RankContext:
    on_gpu = welcome.device_type == "cuda"
    device = torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu")
    if not on_gpu and interface is not None:
        # gloo looks up the host's own name otherwise, which other hosts may resolve differently.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    group = join_group(rank=launch.rank, tp_size=launch.tp_size, backend="nccl" if on_gpu else "gloo", device=device,
                       store=store, collective_timeout_s=welcome.collective_timeout_s)
    return RankContext(tp=group, device=device)


def serve(launch: Launch, *, start_timeout_s: float = 120.0) -> int:
    """Be a rank other than 0: run what rank 0 asks, until it says stop. Returns the exit code that it asks for.

    Ends the process with code 3 when rank 0 is gone without having said so.

    Raises:
        RuntimeError: if rank 0 is not there within ``start_timeout_s``.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank in a collective would get to no handler
    store = open_store(start_timeout_s)
    jobs, control = _connect(launch, store, start_timeout_s)
    box: list[RankContext] = []
    leaving = threading.Event()

    def driver_is_gone() -> None:
        if not leaving.is_set():
            sys.stderr.write(f"rank {launch.rank}: rank 0 is gone or has given up, so this rank ends too\n")
            sys.stderr.flush()
            os._exit(COULD_NOT_RUN)

    watch = functools.partial(serve_control, control, box, on_gone=driver_is_gone)
    threading.Thread(target=watch, name="rank-control", daemon=True).start()
    try:
        welcome: Welcome = loads(receive_frame(jobs).body)
        interface = welcome.interface if is_same_host(jobs) else interface_of(jobs)
        if (context := join(launch, welcome, interface, store, jobs)) is None:
            receive_frame(jobs)  # until the driver closes: leaving now would look like a death
            return COULD_NOT_RUN
        box.append(context)
        del context
        exit_code = serve_jobs(box[0], jobs)
    except (EOFError, OSError):
        driver_is_gone()
        raise
    leaving.set()
    leave_group(box)
    jobs.close()
    return exit_code


def _connect(launch: Launch, store: Store, timeout_s: float) -> tuple[socket.socket, socket.socket]:
    deadline = time.monotonic() + timeout_s
    # Not store.get: it can't be interrupted, and waits on where rank 0 has long given up.
    while not store.check([_ADDRESS_KEY]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {launch.rank}: rank 0 on host {launch.host} was not there within "
                               f"start_timeout_s={timeout_s:g}")
        time.sleep(_LOOK_EVERY_S)
    host, port, secret = store.get(_ADDRESS_KEY).decode().split()
    sockets = []
    for purpose in range(len(_PURPOSES)):
        sock = socket.create_connection((host, int(port)), timeout=timeout_s)
        sock.settimeout(None)
        keep_alive(sock)
        sock.sendall(_HELLO.pack(bytes.fromhex(secret), launch.rank, purpose))
        sockets.append(sock)
    return sockets[0], sockets[1]

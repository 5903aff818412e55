"""What ``Ranks`` asks of ranks, whatever they are: threads, processes or the caller itself."""

from __future__ import annotations

import contextlib
import functools
import pickle
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

from engine.parallel.collective_log import LogSnapshot
from engine.ranks.failures import RankReport, error_from_exception
from engine.ranks.jobs import Job, Kind, loads, pack_job

STALLED_S = 15
"""How long a rank may stop in the middle of a message before the driver hangs up on it."""

Deliver = Callable[[int, Kind, int, Any], None]
"""Called with (rank, kind, job number, payload):

    event   what the job emitted
    done    (the log's counts, the result)
    raised  (a RankError, the exception itself or None if it stayed in another process)
    died    a RankError; job number 0, for whatever the rank was doing
"""


class Pool(ABC):
    """tp_size ranks. One driver thread calls all of this, but for ``wake``."""

    @abstractmethod
    def start(self) -> None:
        """Begin to start the ranks. Each delivers ``done`` for job number 0 when it is ready."""

    @abstractmethod
    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None:
        """Queue a job on every rank; does not wait for one to run it. Raises TypeError for what can't be sent."""

    @abstractmethod
    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        """Wait for messages, at most ``timeout_s``, and deliver what is there; maybe nothing."""

    def wake(self) -> None:  # noqa: B027  # most have nothing to do
        """End a ``poll`` that waits, or the next one. From any thread, also when the ranks are gone."""

    def inspect(self, ranks: Sequence[int], timeout_s: float, deliver: Deliver, *, insist: bool = False) -> dict[int, RankReport]:
        """Where these ranks are now, those that can say so within ``timeout_s``.

        Messages that come in meanwhile are delivered. ``insist``: get at least the stacks of the others.
        """
        return {}

    def rejoin(self) -> None:  # noqa: B027  # most have nothing to do
        """A job failed, but all ranks answered and are in step: the next one can run."""

    def stop(self, exit_code: int = 0) -> None:
        """End idle ranks in good order. ``kill`` must follow. ``exit_code``: of processes that are not our own."""
        self.kill("the ranks were closed")

    @abstractmethod
    def kill(self, reason: str) -> None:
        """End the ranks at once, whatever they do, and give back everything. Twice does no harm."""


@dataclass(slots=True, kw_only=True)
class RankHandle:
    """The driver's hold on one rank at the other end of a connection.

    phase   what the rank said last that it is doing; empty: what its job is called
    report  its answer to the last question
    """

    rank: int
    connection: Connection
    phase: str = ""
    report: RankReport | None = None

    @property
    def owes_report(self) -> bool:
        return self.report is None and not self.connection.closed

    def tell(self, message: bytes) -> None:
        """Send a pickled message. Waits for no job: a rank listens whatever it is doing, unless it is stopped."""
        try:
            self.connection.send_bytes(message)
        except BlockingIOError:
            self.connection.close()  # it took a part of the message, and could make nothing of the next one
        except OSError:
            pass  # the rank is gone, and whoever watches it learns how

    def close(self) -> None:
        """Give back what the handle holds."""
        self.connection.close()


AnyHandle = TypeVar("AnyHandle", bound=RankHandle)


class ConnectedPool(Pool, Generic[AnyHandle]):
    """What ranks at the other end of a connection have in common: the driver's own processes, and torchrun's.

    How ranks start and end, and how a death shows, is the subclass's.
    """

    def __init__(self) -> None:
        self._handles: dict[int, AnyHandle] = {}
        self._woken, self._wake = Pipe(duplex=False)
        # What poll waits for, and what it does then.
        self._actions: dict[Any, Callable[[Deliver], None]] = {self._woken: lambda deliver: self._woken.recv()}

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # the ranks are gone
            self._wake.send(None)

    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None:
        self._tell_all("job", number, pack_job(job, args))

    def _tell_all(self, kind: Kind, number: int, payload: Any) -> None:
        message = pickle.dumps((kind, number, payload), protocol=pickle.HIGHEST_PROTOCOL)
        for handle in self._handles.values():
            self._tell(handle, message)

    def _tell(self, handle: AnyHandle, message: bytes) -> None:
        handle.tell(message)
        if handle.connection.closed:
            self._actions.pop(handle.connection, None)

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        for ready in wait(list(self._actions), timeout_s):
            action = self._actions.get(ready)
            if action is not None:  # its rank was not found dead in this very round
                action(deliver)

    def inspect(self, ranks: Sequence[int], timeout_s: float, deliver: Deliver, *, insist: bool = False) -> dict[int, RankReport]:
        asked = [self._handles[rank] for rank in ranks if rank in self._handles]
        for handle in asked:
            handle.report = None
            self._tell(handle, pickle.dumps(("inspect", 0, None)))
        deadline = time.monotonic() + timeout_s
        while any(handle.owes_report for handle in asked) and (left := deadline - time.monotonic()) > 0:
            self.poll(deliver, left)
        if insist and (silent := [handle for handle in asked if handle.report is None]):
            self._dump_stacks(silent)
        return {handle.rank: handle.report for handle in asked if handle.report is not None}

    def _adopt(self, handle: AnyHandle) -> None:
        limit_stalls(handle.connection)
        self._handles[handle.rank] = handle
        self._actions[handle.connection] = functools.partial(self._read, handle)

    def _read(self, handle: AnyHandle, deliver: Deliver) -> None:
        try:
            kind, number, payload = handle.connection.recv()
        except (EOFError, OSError):  # also in the middle of a message
            del self._actions[handle.connection]
            handle.connection.close()
            self._hung_up(handle, deliver)
            return
        if kind == "report":
            handle.report = payload
        elif kind == "phase":
            handle.phase = payload
        else:
            if kind != "event":
                handle.phase = ""
            deliver(handle.rank, *_unpack(handle.rank, kind, number, payload))

    def _hung_up(self, handle: AnyHandle, deliver: Deliver) -> None:
        """The rank's connection is closed, and all that it said is delivered."""

    def _dump_stacks(self, silent: Sequence[AnyHandle]) -> None:
        """Find out what can be known of ranks that do not answer: set their ``report``."""
        for handle in silent:
            handle.report = RankReport(phase=handle.phase, stacks="", log=None)

    def _release(self) -> None:
        """Give back all handles and what this class has opened."""
        for handle in self._handles.values():
            handle.close()
        self._handles = {}
        self._actions = {}
        self._wake.close()
        self._woken.close()


def limit_stalls(connection: Connection, seconds: int = STALLED_S) -> None:
    """Let a read or write here that gets nowhere for ``seconds`` fail: BlockingIOError, which is an OSError.

    ``Connection`` takes and gives whole messages. A rank that was stopped in the middle of one would hold up the driver for
    ever, whatever deadline that has.
    """
    sock = socket.socket(fileno=connection.fileno())
    sock.setblocking(True)  # a default time-out of the process would apply otherwise
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))
    sock.detach()


def _unpack(rank: int, kind: Kind, number: int, payload: Any) -> tuple[Kind, int, Any]:
    """A rank's message as ``Deliver`` gets it. What can't be unpickled here is the rank's failure."""
    log: LogSnapshot | None = None
    try:
        if kind == "event":
            return kind, number, loads(payload)
        if kind == "done":
            log, result = payload
            return kind, number, (log, loads(result))
        return kind, number, (payload, None)
    except Exception as failure:
        return "raised", number, (error_from_exception(rank, f"receiving {kind!r} here", failure, log), None)

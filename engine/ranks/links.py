"""The driver's hold on one rank that is fed over sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from typing import Any

from engine.parallel.collective_log import LogSnapshot
from engine.ranks.channel import Channel, Frame, Kind, loads
from engine.ranks.failures import RankReport, error_from_exception


@dataclass(slots=True, kw_only=True)
class Link:
    """The driver's hold on one rank, wherever it lives.

    jobs     jobs out, events and answers in
    control  questions and answers on where the rank is, also while a job hangs
    phase    what the rank said last that it is doing; empty: what its job is called
    report   its answer to the last question
    """

    rank: int
    jobs: Channel
    control: Channel
    phase: str = ""
    report: RankReport | None = None

    @property
    def waits_for_report(self) -> bool:
        return self.report is None and not self.control.closed

    def close(self) -> None:
        """Give back the sockets."""
        self.jobs.close()
        self.control.close()


@dataclass(slots=True, kw_only=True)
class ProcessLink(Link):
    """The hold on a rank that is a process of the driver's own.

    dump  where faulthandler writes when the rank's Python no longer answers, or dies
    """

    process: Any
    dump: socket.socket

    def signal(self, number: int) -> None:
        """Send a signal, if there is a process to get it: pid 0, of one that never started, is this process and its group."""
        if self.process.pid and self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has died this moment
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def read_dump(self) -> str:
        """What faulthandler wrote since the last time."""
        self.dump.setblocking(False)
        parts = []
        with contextlib.suppress(OSError):
            while part := self.dump.recv(1 << 16):
                parts.append(part)
        return b"".join(parts).decode(errors="replace")

    def close(self) -> None:
        """Give back the sockets of a rank that was ended."""
        if self.process.pid:
            self.process.join(5.0)
            if self.process.exitcode is not None:
                self.process.close()
        Link.close(self)  # slots=True makes the class anew, and super() would look for the old one
        self.dump.close()


def open_frame(rank: int, frame: Frame) -> tuple[Kind, int, Any]:
    """A rank's frame as (kind, job number, payload). What can't be unpickled here is the rank's failure."""
    log: LogSnapshot | None = None
    try:
        payload = loads(frame.body)
        if frame.kind is Kind.RAISED:
            return frame.kind, frame.number, (payload, None)
        if frame.kind is Kind.DONE:
            log, result = payload
            return frame.kind, frame.number, (log, loads(result))
        return frame.kind, frame.number, payload
    except Exception as failure:
        error = error_from_exception(rank, f"receiving {frame.kind.name} here", failure, log)
        return Kind.RAISED, frame.number, (error, None)

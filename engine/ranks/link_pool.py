"""What the driver does with ranks that are fed over sockets, whoever started them: send, listen, ask."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from engine.ranks.channel import Channel, Kind, loads
from engine.ranks.failures import RankReport
from engine.ranks.jobs import Job, pack_job
from engine.ranks.links import Link, open_frame
from engine.ranks.pool import Deliver

AnyLink = TypeVar("AnyLink", bound=Link)


class LinkPool(Generic[AnyLink]):
    """The part of a ``Pool`` that process ranks and torchrun's ranks share. One selector waits for all of them.

    How ranks start and end, and how a death shows, is the subclass's. Its own files in the selector carry a
    callable as data, which ``poll`` calls with ``deliver``.
    """

    def __init__(self) -> None:
        self._links: dict[int, AnyLink] = {}
        self._selector = selectors.DefaultSelector()
        self._wakes, self._wake = socket.socketpair()
        self._wakes.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._wakes, selectors.EVENT_READ, self._woken)

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # gone, or woken many times over
            self._wake.send(b"!")

    def _woken(self, deliver: Deliver) -> None:
        self._wakes.recv(64)

    def _release(self) -> None:
        """Close all that this class has opened, the links apart."""
        self._selector.close()
        self._wake.close()
        self._wakes.close()

    def _adopt(self, link: AnyLink) -> None:
        self._links[link.rank] = link
        for channel in (link.jobs, link.control):
            self._selector.register(channel, selectors.EVENT_READ, (link, channel))

    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None:
        body = pack_job(job, args)
        for link in self._links.values():
            link.jobs.send(Kind.JOB, number, body)
            self._watch_unsent(link)

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        for key, mask in self._selector.select(timeout_s):
            if callable(key.data):
                key.data(deliver)
                continue
            link, channel = key.data
            if channel.closed:
                continue  # its rank was found dead in this very round
            if mask & selectors.EVENT_WRITE:
                channel.flush()
                self._watch_unsent(link)
            if mask & selectors.EVENT_READ:
                self._read(link, channel, deliver)

    def _watch_unsent(self, link: AnyLink) -> None:
        if not link.jobs.closed:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.jobs.has_unsent else 0)
            self._selector.modify(link.jobs, wanted, (link, link.jobs))

    def _read(self, link: AnyLink, channel: Channel, deliver: Deliver) -> None:
        for frame in channel.receive():
            if frame.kind is Kind.REPORT:
                link.report = loads(frame.body) if frame.body else None
            elif frame.kind is Kind.PHASE:
                link.phase = frame.body.decode()
            else:
                if frame.kind is not Kind.EVENT:
                    link.phase = ""
                deliver(link.rank, *open_frame(link.rank, frame))
        if channel.closed:
            self._selector.unregister(channel)
            self._hung_up(link, channel, deliver)

    def _hung_up(self, link: AnyLink, channel: Channel, deliver: Deliver) -> None:
        """The rank's end of ``channel`` is closed, and all that it said is delivered."""

    def inspect(self, ranks: Sequence[int], timeout_s: float, deliver: Deliver, *, insist: bool = False) -> dict[int, RankReport]:
        asked = [self._links[rank] for rank in ranks if rank in self._links]
        for link in asked:
            link.report = None
            link.control.send(Kind.INSPECT)
        deadline = time.monotonic() + timeout_s
        while any(link.waits_for_report for link in asked) and (left := deadline - time.monotonic()) > 0:
            self.poll(deliver, left)
        if insist and (silent := [link for link in asked if link.waits_for_report]):
            self._dump_stacks(silent)
        return {link.rank: link.report for link in asked if link.report is not None}

    def _dump_stacks(self, silent: Sequence[AnyLink]) -> None:
        """Find out what can be known of ranks that do not answer: set their ``report``."""
        for link in silent:
            link.report = RankReport(phase=link.phase, stacks="", log=None)

    def rejoin(self) -> None:
        """Ranks that have their own process need nothing: they answered and are in step."""

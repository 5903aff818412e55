"""Ranks without processes: the calling thread alone, or threads that share one process."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from engine.parallel.group import SoloGroup, ThreadGroup
from engine.parallel.turns import Turns
from engine.ranks.failures import RankReport
from engine.ranks.jobs import Job, Kind, RankContext, loads, pack_job, report, run_job
from engine.ranks.pool import Deliver, Pool


class SoloPool(Pool):
    """One rank in the calling thread. A job runs when its result is collected; arguments are not copied."""

    def __init__(self, device: torch.device) -> None:
        self._context = RankContext(tp=SoloGroup(), device=device)
        self._waiting: deque[tuple[int, Job, tuple[Any, ...]]] = deque()

    def start(self) -> None:
        self.send(0, _nothing, ())

    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None:
        self._waiting.append((number, job, args))

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        number, job, args = self._waiting.popleft()
        context = self._context
        context.send_event = lambda payload: deliver(0, "event", number, payload)
        answer, raised = run_job(context, lambda: (job, args))
        if isinstance(raised, KeyboardInterrupt):
            raise raised
        deliver(0, *_as_delivered(number, answer, raised))

    def kill(self, reason: str) -> None:
        self._waiting.clear()
        self._context.state.clear()


class ThreadPool(Pool):
    """One thread a rank. Each gets copies of the arguments, as if sent; results are handed over uncopied."""

    def __init__(self, tp_size: int, device: torch.device, collective_timeout_s: float) -> None:
        self._device = device
        turns = Turns() if device.type == "cpu" else None  # on a GPU it is the device that computes
        self._groups = ThreadGroup.create(tp_size, timeout_s=collective_timeout_s, turns=turns)
        self._contexts = [RankContext(tp=group, device=device) for group in self._groups]
        self._inboxes: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in self._groups]
        self._outbox: queue.SimpleQueue[tuple[int, Kind, int, Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_threads_before = torch.get_num_threads()

    def start(self) -> None:
        for rank in range(len(self._groups)):
            thread = threading.Thread(target=self._live, args=(rank,), name=f"rank-{rank}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _live(self, rank: int) -> None:
        # More threads inside each of several rank threads only get in each other's way.
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        context, group = self._contexts[rank], self._groups[rank]
        self._outbox.put((rank, "done", 0, (context.tp.log.snapshot(0), None)))
        while (message := self._inboxes[rank].get()) is not None:
            number, job, packed = message
            context.send_event = functools.partial(self._emit, rank, number)
            group.take_turn()
            answer, raised = run_job(context, functools.partial(_unpack, job, packed))
            group.give_turn()
            if raised is not None:
                # The others need not wait for this rank in collectives that it will never enter.
                group.leave(answer.summary)
            self._outbox.put((rank, *_as_delivered(number, answer, raised)))
            context.enter_phase("idle")

    def _emit(self, rank: int, number: int, event: Any) -> None:
        self._outbox.put((rank, "event", number, event))

    def send(self, number: int, job: Job, args: tuple[Any, ...]) -> None:
        packed = pack_job(job, args, with_job=False)
        for inbox in self._inboxes:
            inbox.put((number, job, packed))

    def poll(self, deliver: Deliver, timeout_s: float | None) -> None:
        try:
            message = self._outbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        if message is not None:
            deliver(*message)

    def wake(self) -> None:
        self._outbox.put(None)

    def inspect(self, ranks: Sequence[int], timeout_s: float, deliver: Deliver, *, insist: bool = False) -> dict[int, RankReport]:
        return {rank: report(self._contexts[rank], [self._threads[rank].ident or 0]) for rank in ranks}

    def rejoin(self) -> None:
        """All ranks are in step: those that left after an exception are back."""
        self._groups[0].rejoin()

    def kill(self, reason: str) -> None:
        """End the threads. One that hangs outside a collective can't be ended: it is left, as a daemon."""
        self._groups[0].abort(reason)
        for inbox in self._inboxes:
            inbox.put(None)
        deadline = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []
        for context in self._contexts:
            context.state.clear()
        # Threads started from now on would take over the ranks' setting: part of it is the whole process's.
        torch.set_num_threads(self._num_threads_before)


def _as_delivered(number: int, answer: Any, raised: BaseException | None) -> tuple[Kind, int, Any]:
    return ("done", number, answer) if raised is None else ("raised", number, (answer, raised))


def _unpack(job: Job, packed: bytes) -> tuple[Job, tuple[Any, ...]]:
    return job, loads(packed)


def _nothing(context: RankContext) -> None:
    """The job that tells that a solo rank is there."""

"""The driver's side of the engine's loop: one conversation with the ranks, shared by all calls under way.

Messages carry new requests and aborts to the ranks, and tokens back. Each makes the ranks run some steps, and one more is
under way while the driver works on the last one's tokens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

from engine.execution.core import Progress, advance, stop_core
from engine.frontend.ongoing import OngoingRequest
from engine.ranks.ranks import JobHandle, RankFailure, Ranks, RanksClosed
from engine.scheduling.sequence import Request

STEPS_PER_MESSAGE = 4
"""Steps that ranks run on one message while nobody looks at the text. The driver's work on their tokens must fit into the one
step that runs ahead on the device, so it grows with this number and the step does not."""
STEPS_WHILE_WATCHED = 1
"""The same while somebody reads along, or a stop string may come: what ranks run beyond it is lost."""


class Driver:
    """Feeds the ranks. Calls may come from several threads: one at a time drives the ranks, for all of them.

    Args:
        owns_ranks: close the ranks with the engine, or when it breaks. If not, what runs there is ended, and they live on.
    """

    def __init__(self, ranks: Ranks, *, owns_ranks: bool) -> None:
        self._ranks = ranks
        self._owns_ranks = owns_ranks
        # A solo rank runs its steps in this very thread: a message under way would only be run too late.
        self._max_in_flight = 1 if ranks.fabric == "solo" else 2
        # Guards all below, and is never held while the ranks work. Reentrant: a stream that nobody holds any more may be
        # closed by the garbage collector, anywhere.
        self._changed = threading.Condition(threading.RLock())
        self._driven_by: int | None = None
        """The thread that drives the ranks."""
        self._frees_ranks = False
        """Whether that thread is to leave the ranks once it is done: the engine was closed under it."""
        self._requests: dict[int, OngoingRequest] = {}
        self._running: dict[int, OngoingRequest] = {}
        """Who gets the tokens of what runs on the ranks, by the ranks' numbers."""
        self._new: list[Request] = []
        self._aborts: list[int] = []
        self._in_flight: deque[JobHandle] = deque()
        self._failure: str | None = None
        self._closed = False

    def follow(self, requests: Sequence[OngoingRequest]) -> Generator[None, None, None]:
        """Run requests to their end, pausing whenever something has come. Closed early, it aborts what still runs.

        Raises:
            RankFailure: if a rank fails.
            RuntimeError: if ranks drew different tokens, or the engine broke before, or is closed meanwhile.
        """
        self._add(requests)
        try:
            while unfinished := [request for request in requests if not request.output.finished]:
                self._advance(unfinished)
                for request in unfinished:
                    self._end(request.empty_inbox())
                yield
        finally:
            self._leave(requests)

    def abort(self, request_id: int) -> None:
        """End a request, from any thread: the ranks hear of it at once, its owner in turn. Other ids are ignored."""
        with self._changed:
            request = self._requests.get(request_id)
            if request is None:
                return
            request.inbox.append(None)
            self._end(list(request.completions))
            self._changed.notify_all()
        self._tidy_up()

    def close(self) -> None:
        """End the engine, from any thread. Calls under way end with an error; returns when the ranks are gone, or free.

        In a signal handler it returns at once where the interrupted thread drives the ranks: the call there frees them.
        """
        with self._changed:
            was_closed, self._closed = self._closed, True
            self._changed.notify_all()
            if not self._owns_ranks:
                if was_closed:
                    return
                if self._driven_by == threading.get_ident():
                    self._frees_ranks = True  # a signal handler must not wait for what it has interrupted
                    return
                self._changed.wait_for(lambda: self._driven_by is None)
        self._leave_ranks()

    def check_usable(self) -> None:
        """Raise RuntimeError if no request can run any more."""
        if self._closed:
            raise RuntimeError("this engine was closed: make a new one")
        if self._failure is not None:
            raise RuntimeError(f"this engine can't be used any more, make a new one: {self._failure}")

    def _add(self, requests: Sequence[OngoingRequest]) -> None:
        with self._changed:
            for request in requests:
                self._requests[request.output.request_id] = request
                for number, completion in request.completions.items():
                    self._running[number] = request
                    self._new.append(completion.request)

    def _end(self, numbers: Sequence[int]) -> None:
        """Let the ranks drop those of ``numbers`` that still run there."""
        with self._changed:
            self._aborts.extend(number for number in numbers if self._running.pop(number, None) is not None)

    def _leave(self, requests: Sequence[OngoingRequest]) -> None:
        with self._changed:
            for request in requests:
                self._requests.pop(request.output.request_id, None)
                self._end(list(request.completions))
        self._tidy_up()

    def _tidy_up(self) -> None:
        """Tell the ranks what to drop, and wait for them if nothing runs any more. Who drives meanwhile does both in turn."""
        with self._changed:
            # The ranks are gone too where the interpreter ends and a stream is still open.
            if self._driven_by is not None or self._closed or self._failure is not None or not self._ranks.healthy:
                return
            self._driven_by = threading.get_ident()
        with suppress(RanksClosed), self._released_afterwards():
            if self._aborts:
                self._send(0)
            while self._in_flight and not self._running:
                self._collect()

    def _advance(self, waiting: Sequence[OngoingRequest]) -> None:
        """Wait until something has come for one of ``waiting``; drive the ranks by one message if nobody else does."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._driven_by is None or any(request.inbox for request in waiting))
            if any(request.inbox for request in waiting):
                return
            if self._closed:
                raise self._closed_under(waiting)
            self.check_usable()
            self._driven_by = threading.get_ident()
        try:
            self._drive()
        except RanksClosed:
            raise self._closed_under(waiting) from None

    def _drive(self) -> None:
        """Run the ranks by one message."""
        with self._released_afterwards():
            while len(self._in_flight) < self._max_in_flight:
                is_watched = any(request.is_watched for request in list(self._running.values()))
                self._send(STEPS_WHILE_WATCHED if is_watched else STEPS_PER_MESSAGE)
            has_work = self._collect()
            if not (has_work or self._in_flight or self._new) and self._running:
                raise RuntimeError(f"the ranks are idle, and requests {sorted(self._running)} are not finished")

    @staticmethod
    def _closed_under(waiting: Sequence[OngoingRequest]) -> RuntimeError:
        ids = ", ".join(str(request.output.request_id) for request in waiting)
        return RuntimeError(f"the engine was closed while it ran request_id={ids}: what was not finished is lost")

    @contextmanager
    def _released_afterwards(self) -> Iterator[None]:
        """Lets others drive."""
        try:
            if self._closed:  # by a signal handler, a moment before this thread said that it drives
                raise RanksClosed("the engine was closed")
            yield
        finally:
            with self._changed:
                self._driven_by = None
                frees_ranks, self._frees_ranks = self._frees_ranks, False
                self._changed.notify_all()
            if frees_ranks:
                self._leave_ranks()

    def _send(self, num_steps: int) -> None:
        with self._changed:
            new, self._new = self._new, []
            aborts, self._aborts = self._aborts, []
        self._in_flight.append(self._ranks.submit(advance, new, aborts, num_steps))

    def _collect(self) -> bool:
        """Wait for the oldest message and hand out its tokens. Returns whether the ranks have more to do."""
        try:
            reports: list[Progress] = self._ranks.collect(self._in_flight.popleft())
            differing = [rank for rank, report in enumerate(reports) if report.digest != reports[0].digest]
            if differing:
                raise RuntimeError(f"ranks {differing} drew other token ids than rank 0: ranks of one engine must agree; "
                                   "run `shardproof verify` on this model")
        except BaseException as failure:
            # Also when it was interrupted: nobody knows how far the ranks have come.
            self._failure = f"{type(failure).__name__}: {failure}".splitlines()[0]
            self._leave_ranks()
            raise
        with self._changed:
            for token in reports[0].outputs:
                request = self._running.get(token.request_id)
                if request is not None:
                    if token.finish_reason is not None:
                        self._running.pop(token.request_id, None)
                    if token.finish_reason == "error":
                        request.cause = _cause_of_not_finite([report.not_finite_weight for report in reports])
                    request.inbox.append(token)
        return reports[0].has_work

    def _leave_ranks(self) -> None:
        """Close the ranks, or free those of somebody else from all that runs there."""
        if self._owns_ranks:
            self._ranks.close()
            return
        with suppress(RankFailure, RuntimeError):  # the ranks' owner sees what became of them
            while self._in_flight and self._ranks.healthy:
                self._ranks.collect(self._in_flight.popleft())
            if self._ranks.healthy:
                self._ranks.run(stop_core)


def _cause_of_not_finite(weights: Sequence[str | None]) -> str:
    """Whose weights they come from, as far as can be told. All ranks have the same logits, whoever spoilt them."""
    found = [f"rank {rank}'s part of {weight} holds a NaN or an infinity" for rank, weight in enumerate(weights) if weight]
    where = "rank 0" if len(weights) == 1 else f"all {len(weights)} ranks"
    return "; ".join(found) or f"on {where}, where every weight is finite: an overflow, or a damaged KV cache"

"""What a rank does that is fed over sockets, in a process of the driver's or of torchrun's: run jobs in order, and
answer questions on where it is even while a job hangs."""

from __future__ import annotations

import functools
import select
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from engine.ranks.channel import Kind, dumps, loads, receive_frame, send_frame
from engine.ranks.jobs import RankContext, rank_error, report, run_job


def serve_jobs(context: RankContext, jobs: socket.socket) -> int:
    """Say that the rank is there, and run jobs until the driver says stop. Returns the exit code that it asks for.

    Raises EOFError or OSError when the driver is gone, and SystemExit when a job did.
    """
    send_lock = threading.Lock()

    def send(kind: Kind, number: int, body: bytes) -> None:
        with send_lock:  # a job may emit from threads of its own
            send_frame(jobs, kind, number, body)

    def emit(number: int, payload: Any) -> None:
        send(Kind.EVENT, number, dumps(payload))

    def tell_phase(number: int, phase: str) -> None:
        send(Kind.PHASE, number, phase.encode())

    send(Kind.DONE, 0, dumps((context.tp.log.snapshot(0), dumps(None))))
    while (frame := receive_frame(jobs)).kind is Kind.JOB:
        number = frame.number
        context.send_event = functools.partial(emit, number)
        context.send_phase = functools.partial(tell_phase, number)
        kind, body = _answer(context, frame.body)
        send(kind, number, body)
        context.enter_phase("idle")
    context.state.clear()
    return frame.number


def _answer(context: RankContext, body: bytes | bytearray) -> tuple[Kind, bytes]:
    context.enter_phase("receiving the job")
    try:
        job, args = loads(body)
    except Exception as failure:
        return Kind.RAISED, dumps(rank_error(context, failure))
    result, raised = run_job(context, job, args)
    if isinstance(raised, SystemExit):
        raise raised  # the process ends with the code that the job asked for, and the driver sees that
    if raised is None:
        context.enter_phase("sending the result")
        try:
            return Kind.DONE, dumps((context.tp.log.snapshot(0), dumps(result)))
        except Exception as failure:
            raised = failure
    return Kind.RAISED, dumps(rank_error(context, raised))


def serve_control(control: socket.socket, box: Sequence[RankContext], *, watched: Sequence[int] = (),
                  thread_ids: Sequence[int] | None = None, on_gone: Callable[[], None]) -> None:
    """Answer where the rank is, for ever. In a thread of its own.

    box         holds the rank's context as soon as there is one
    watched     files that become readable when the driver is gone, beside ``control`` itself
    thread_ids  whose stacks to tell; None: all but this thread's
    on_gone     called once the driver is gone
    """
    poller = select.poll()
    for fd in (control.fileno(), *watched):
        poller.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        try:
            if control.fileno() not in ready:
                raise EOFError("the driver is gone")
            receive_frame(control)
            context = next(iter(box), None)  # it is gone again when the rank leaves
            answer = dumps(report(context, thread_ids)) if context is not None else b""
            send_frame(control, Kind.REPORT, 0, answer)
        except (EOFError, OSError):
            on_gone()
            return

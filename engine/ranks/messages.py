"""What the driver and a rank say to each other, by value: nothing is left in shared memory.

A message is (kind, job number, payload), through ``multiprocessing.connection.Connection``.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch

Kind = Literal["job", "stop", "inspect", "phase", "event", "done", "raised", "report", "died"]
"""To the rank:

    job      the pickled (job, args)
    stop     leave in good order; the payload is the exit code
    inspect  say where you are

From the rank:

    phase    what the job says it is doing
    event    what the job emitted, pickled
    done     (the log's counts, the pickled result)
    raised   RankError
    report   RankReport, or None from a rank that has not joined yet

Made by the driver:

    died     RankError
"""

STALLED_S = 15
"""How long a rank may stop in the middle of a message before the driver hangs up on it."""


class _Pickler(pickle.Pickler):
    """Tensors travel by value, to the CPU, and a view as its own elements, not with all of its storage."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) not in (torch.Tensor, torch.nn.Parameter):
            return NotImplemented
        if obj.layout is not torch.strided or obj.is_meta:
            return NotImplemented
        small = obj.untyped_storage().nbytes() <= obj.numel() * obj.element_size()
        if obj.device.type == "cpu" and small:
            return NotImplemented
        with torch.no_grad():
            moved = obj.detach().cpu() if obj.device.type != "cpu" else obj.detach().clone()
        if type(obj) is torch.nn.Parameter:
            return torch.nn.Parameter, (moved, obj.requires_grad)
        moved.requires_grad_(obj.requires_grad)
        return moved.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dumps(value: Any) -> bytes:
    """Pickle ``value``. Not with multiprocessing's pickler: it would put tensors in shared memory."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


loads = pickle.loads


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

"""Frames over a socket between the driver and one rank, by value: nothing is left in shared memory.

The driver never blocks on a rank: its ``Channel`` takes what is there and keeps what does not fit, so a rank
that is stopped in the middle of a frame can't hold up a deadline. A rank has one driver and simply blocks.
"""

from __future__ import annotations

import enum
import io
import pickle
import socket
import struct
from collections import deque
from typing import Any, NamedTuple

import torch

_HEADER = struct.Struct("!BQQ")
_CHUNK_BYTES = 1 << 20


class Kind(enum.IntEnum):
    """What a frame or message is."""

    JOB = 1  # to the rank: (job, args)
    STOP = 2  # to the rank: leave in good order
    INSPECT = 3  # to the rank's control thread: say where you are
    PHASE = 4  # from the rank: what the job says it is doing
    EVENT = 5  # from the rank: emitted by the job
    DONE = 6  # from the rank: (result, log)
    RAISED = 7  # from the rank: RankError
    REPORT = 8  # from the rank's control thread: RankReport
    DIED = 9  # made by the driver: RankError


class Frame(NamedTuple):
    """One message: its kind, the number of the job it belongs to (0: none) and its pickled body."""

    kind: Kind
    number: int
    body: bytes | bytearray


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


class Channel:
    """The driver's end. Never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.closed = False
        self._outgoing: deque[memoryview] = deque()
        self._header = bytearray()
        self._head: tuple[Kind, int] | None = None
        self._body = bytearray()
        self._filled = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    def send(self, kind: Kind, number: int = 0, body: bytes = b"") -> None:
        """Send what fits now; ``flush`` sends the rest."""
        self._outgoing.append(memoryview(_HEADER.pack(kind, number, len(body))))
        if body:
            self._outgoing.append(memoryview(body))
        self.flush()

    def flush(self) -> None:
        while self._outgoing:
            part = self._outgoing[0]
            try:
                sent = self.sock.send(part)
            except BlockingIOError:
                return
            except OSError:  # the rank is gone; its sentinel says how
                self._outgoing.clear()
                return
            if sent == len(part):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = part[sent:]

    def receive(self) -> list[Frame]:
        """The frames that are complete by now. Sets ``closed`` once the rank's end is closed."""
        frames: list[Frame] = []
        while not self.closed:
            try:
                if self._head is None:
                    data = self.sock.recv(_HEADER.size - len(self._header))
                    received = len(data)
                    self._header += data
                else:
                    window = memoryview(self._body)[self._filled : self._filled + _CHUNK_BYTES]
                    received = self.sock.recv_into(window)
                    self._filled += received
            except BlockingIOError:
                return frames
            except OSError:
                received = 0
            if not received:
                self.closed = True
                return frames
            if self._head is None and len(self._header) == _HEADER.size:
                kind, number, length = _HEADER.unpack(self._header)
                self._head, self._body, self._filled = (Kind(kind), number), bytearray(length), 0
                self._header.clear()
            if self._head is not None and self._filled == len(self._body):
                frames.append(Frame(*self._head, self._body))
                self._head = None
        return frames

    def close(self) -> None:
        self.closed = True
        self._outgoing.clear()
        self.sock.close()


def send_frame(sock: socket.socket, kind: Kind, number: int = 0, body: bytes = b"") -> None:
    """Send a frame from a rank. Blocks until it is sent; OSError when the driver is gone."""
    sock.sendall(_HEADER.pack(kind, number, len(body)))
    if body:
        sock.sendall(body)


def receive_frame(sock: socket.socket) -> Frame:
    """Wait for the next frame in a rank; EOFError when the driver is gone."""
    kind, number, length = _HEADER.unpack(_receive_exactly(sock, _HEADER.size))
    return Frame(Kind(kind), number, _receive_exactly(sock, length))


def _receive_exactly(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        received = sock.recv_into(view)
        if not received:
            raise EOFError("the driver closed its end")
        view = view[received:]
    return data

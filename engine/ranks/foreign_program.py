"""The program of a rank in an interpreter that is not ours: a script of its own, which serves calls over an inherited socket.

It imports nothing of the project, for that interpreter may have other versions of everything; torch only where a tensor travels.
What travels is plain data: a header in JSON, behind it the bytes of the tensors. Nothing that is received is ever run. Both ends
use the same two functions, ``pack`` and ``Unpacker``.

The script takes two arguments: the socket's file descriptor, and the path of a Python file with a class ``Served``. The call
``start`` makes one of it, all others are methods of that one, by name.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

MAGIC = b"rank"
"""Before every message: what somebody else writes into the socket does not look like one."""
HEAD = struct.Struct(">4sQQ")
"""Magic, bytes of the JSON header, bytes of the tensors."""
TENSOR = "$tensor"
SERVED = "shardproof_served"
"""The name under which the served file is imported: for libraries that take the name of a class."""


class GarbageError(Exception):
    """The other end has sent something that is no message."""


def pack(value: Any) -> bytes:
    """A message: JSON values, and torch tensors anywhere among them."""
    tensors: list[bytes] = []
    header = json.dumps(_without_tensors(value, tensors)).encode()
    body = b"".join(tensors)
    return HEAD.pack(MAGIC, len(header), len(body)) + header + body


def _without_tensors(value: Any, tensors: list[bytes]) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, tensors) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"type={type(value).__name__} is no plain data: send JSON values and tensors")
    flat = value.detach().cpu().contiguous().reshape(-1)
    tensors.append(flat.view(torch.uint8).numpy().tobytes())
    return {TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape)]}


class Unpacker:
    """Takes bytes as they come and gives the messages that are whole."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """More bytes, however they were cut.

        Raises:
            GarbageError: if they are of no message.
        """
        self._held += data
        while len(self._held) >= HEAD.size:
            magic, header, body = HEAD.unpack_from(self._held)
            if magic != MAGIC:
                break
            end = HEAD.size + header + body
            if len(self._held) < end:
                return
            message = _with_tensors(json.loads(self._held[HEAD.size : HEAD.size + header]),
                                    Tensors(bytes(self._held[HEAD.size + header : end])))
            del self._held[:end]  # before it is given: who wants one message does not come back
            yield message
        if not MAGIC.startswith(bytes(self._held[: len(MAGIC)])):
            raise GarbageError(f"the pipe holds what is no message: {bytes(self._held[:80])!r}")


class Tensors:
    """The bytes of a message's tensors, taken in order."""

    def __init__(self, body: bytes) -> None:
        self._body, self._at = body, 0

    def take(self, dtype: str, shape: list[int]) -> Any:
        """The next one."""
        import torch

        kind = getattr(torch, dtype)
        count = 1
        for length in shape:
            count *= length
        size = count * kind.itemsize
        part = bytearray(self._body[self._at : self._at + size])
        self._at += size
        return torch.frombuffer(part, dtype=kind).reshape(shape) if count else torch.empty(shape, dtype=kind)


def _with_tensors(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors.take(*value[TENSOR])
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


def main(fd: int, served: str) -> None:
    """Answer calls, one after the other, until the driver says ``stop`` or is gone."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # into the log, which the driver shows
    connection = socket.socket(fileno=fd)
    threading.Thread(target=_end_with_driver, args=(fd,), daemon=True).start()
    calls, state = Unpacker(), {"file": served}
    while data := connection.recv(1 << 16):
        for call in calls.feed(data):
            try:
                answer = pack({"number": call["number"], "done": _answer(state, call["name"], call["args"])})
            except Exception as error:  # of any kind: the served code raises what it likes
                answer = pack({"number": call["number"], "raised": f"{type(error).__name__}: {error}",
                               "traceback": traceback.format_exc()})
            connection.sendall(answer)
            if call["name"] == "stop":
                return


def _answer(state: dict[str, Any], name: str, args: dict[str, Any]) -> Any:
    if name == "versions":
        return _versions(args["packages"])
    if name == "start":
        spec = importlib.util.spec_from_file_location(SERVED, state["file"])
        assert spec is not None, f"file={state['file']} must be a Python file"
        assert spec.loader is not None, f"file={state['file']} must be a Python file"
        module = sys.modules[SERVED] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        state["served"] = module.Served(**args)
        return None
    if name == "stop":
        served = state.pop("served", None)
        return None if served is None else served.close()
    return getattr(state["served"], name)(**args)


def _versions(packages: list[str]) -> dict[str, str | None]:
    """What is installed of these, by their metadata, and the version of Python. Imports none of them."""
    from importlib import metadata

    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _end_with_driver(fd: int) -> None:
    """A call may take long, or for ever: when the driver is gone, so is this session."""
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP)
    poller.poll()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    del sys.path[0]  # this folder's modules have names that others have too
    main(int(sys.argv[1]), sys.argv[2])

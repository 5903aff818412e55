"""What the tests of workers call in them. Imports nothing heavy, so that a worker is up at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any


def add(state: dict[str, Any], number: int) -> int:
    state["total"] = state.get("total", 0) + number
    total: int = state["total"]
    return total


def fail(state: dict[str, Any], message: str) -> None:
    sys.stdout.write("said before it failed\n")
    raise ValueError(message)


def die(state: dict[str, Any]) -> None:
    sys.stdout.write("last words\n")
    sys.stdout.flush()
    os._exit(7)


def hang(state: dict[str, Any]) -> None:
    time.sleep(600)


def leave_a_child(state: dict[str, Any]) -> int:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return child.pid


def hash_of(state: dict[str, Any], text: str) -> int:
    return hash(text)


def ignores_interrupts(state: dict[str, Any]) -> bool:
    """Whether this process is out of the reach of the terminal's Ctrl-C."""
    return os.getsid(0) == os.getpid() and signal.getsignal(signal.SIGINT) is not None

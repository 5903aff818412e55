"""A Python process of its own for one engine, called function by function.

Not a rank: ranks belong to the engine that is measured. Engines get interpreters of their own because each brings start-up,
memory, signal handlers and CUDA contexts that the others must not pay for, and because one of them may be another checkout
of this project. What it prints goes to a file that is shown if it fails.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
_LOG_TAIL = 3000  # characters of a worker's output that an error shows
CLOSE_S = 20.0
"""How long a worker has to end in good order."""


class WorkerError(RuntimeError):
    """A call failed in the worker, or the worker died. ``summary``: in one line; ``kind``: name of what was raised, if so."""

    def __init__(self, message: str, *, summary: str, kind: str = "") -> None:
        super().__init__(message)
        self.summary = summary
        self.kind = kind


class Worker(AbstractContextManager["Worker"]):
    """A started process. A context manager; ``close`` leaves nothing behind.

    Args:
        name: for error messages.
        checkout: whose code it runs.
        environ: set on top of this process's environment.
    """

    def __init__(self, name: str, *, checkout: Path = CHECKOUT, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._connection, theirs = Pipe()
        path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
        # With a random hash seed the same Python code is a few percent faster in one process than in the next.
        env = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.bench.worker", str(theirs.fileno())], cwd=checkout, env=env | dict(environ or {}),
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the worker and all that it started
            )

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        """``function(state, *args)`` in the worker, by its name; ``state`` is a dict that lives as long as the worker.

        Raises:
            WorkerError: if it raised, died, or did not answer in time; in the last two cases the worker is gone.
        """
        try:
            self._connection.send((f"{function.__module__}:{function.__qualname__}", args))
            if not self._connection.poll(timeout_s):
                raise self._gone(f"{self.name} gave no answer within timeout_s={timeout_s}")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait(CLOSE_S)
            raise self._gone(f"{self.name} died with exit code {code}") from None
        if kind == "raised":
            story, summary, *kind = value  # an older checkout tells no kind
            raise WorkerError(f"{self.name}: {story}", summary=f"{self.name}: {summary}", kind="".join(kind))
        return value

    def _gone(self, what: str) -> WorkerError:
        tail = self.output()[-_LOG_TAIL:]
        self.close(grace_s=0)
        return WorkerError(f"{what}\n{tail}", summary=what)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or died in a call."""
        return self._log.closed

    def output(self) -> str:
        """All that the worker has printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def hang_up(self) -> None:
        """Tell the worker to go, and wait for nothing. It must still be closed."""
        if not self._log.closed:
            self._connection.close()

    def close(self, *, grace_s: float = CLOSE_S) -> None:
        """End the worker and every process that it started. Closing twice does nothing."""
        if self._log.closed:
            return
        self._connection.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Its session, so that what an engine left behind goes too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close(grace_s=CLOSE_S if kind is None else 0)


def serve(connection: Connection) -> None:
    """Answer calls until the other side hangs up; then close what is in the state."""
    import importlib
    import traceback

    from engine.collector import without_collector

    state: dict[str, Any] = {}
    while True:
        try:
            with without_collector():  # arguments, and the function, bring the engine: as `from engine import LLM` does
                target, args = connection.recv()
        except EOFError:
            break
        try:
            module, _, name = target.partition(":")
            with without_collector():
                function = getattr(importlib.import_module(module), name)
            answer: tuple[str, Any] = ("done", function(state, *args))
            pickle.dumps(answer)
        except Exception as failure:
            # Some messages go on with advice: their first line says what happened.
            kind = type(failure).__name__
            answer = ("raised", (traceback.format_exc(), f"{kind}: {(str(failure).splitlines() or [''])[0]}", kind))
        connection.send(answer)
    for item in reversed(list(state.values())):
        if hasattr(item, "close"):
            item.close()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))

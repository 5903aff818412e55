"""Ranks as processes of another interpreter, with packages of its own: they are called by name, and answer in plain data.

An interpreter that is not ours can't be forked, and what it sends can't be trusted to be unpickled: see ``foreign_program``.
All ranks get each call at once, and each call has one deadline for all of them. What a rank prints goes to a file, whose end is
shown if it fails. Ranks are sessions of their own; whatever they have started ends with them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import psutil

from engine.ranks import foreign_program
from engine.ranks.failures import RankError, describe_exit, make_failure, saw_another_fail
from engine.ranks.foreign_program import GarbageError, Unpacker, pack

FABRIC = "foreign"
_START_S = 120.0
_GRACE_S = 15.0  # after the first failure of a call: how long the others may still take to raise it too
_STOP_S = 10.0  # how long ranks get to leave in good order
_DUMP_S = 0.3  # how long faulthandler gets to write the stacks of a rank that does not answer
_LINE = 300  # characters of what a rank has raised, told in one line
_SHOWN = 3000  # characters of a rank's output that an error shows
_OURS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR",
         "MASTER_PORT")
"""Variables that are about this interpreter, or a job that it belongs to."""


class ForeignRanks(AbstractContextManager["ForeignRanks"]):
    """Processes of ``python`` that serve one file. A context manager, whose end ends them and all that they started.

    Args:
        python: the interpreter.
        served: the file with a class ``Served`` (see ``foreign_program``).
        tp_size: how many.
        environ: set on top of this process's environment.
        start: arguments of ``Served``, on each rank with ``tp_rank`` and ``tp_size``.
        start_timeout_s: for all of them to start.

    Raises:
        OSError: if the interpreter can't be run.
        RankFailure: if a rank does not start.
    """

    def __init__(self, python: Path, served: Path, tp_size: int, *, environ: Mapping[str, str] | None = None,
                 start: Mapping[str, Any] | None = None, start_timeout_s: float = _START_S) -> None:
        self.tp_size = tp_size
        self._number = 0
        self._ranks: list[_Rank] = []
        try:
            for rank in range(tp_size):
                self._ranks.append(_Rank(rank, python, served, environ or {}))
            self.call("start", [{**(start or {}), "tp_rank": rank, "tp_size": tp_size} for rank in range(tp_size)],
                      timeout_s=start_timeout_s)
        except BaseException:
            self.kill()
            raise

    @property
    def healthy(self) -> bool:
        """Whether the next call can be answered."""
        return bool(self._ranks)

    def call(self, name: str, args: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None, *,
             timeout_s: float | None = None) -> list[Any]:
        """A method of what each rank serves, on all of them at once. Where all ranks raise, they go on; else they are ended.

        Args:
            name: of the method.
            args: its keyword arguments: JSON values and tensors; a sequence has each rank's own.
            timeout_s: for all of them to answer; None: for ever.

        Returns:
            By rank, what the method returned.

        Raises:
            RankFailure: if a rank raised, died, did not answer in time, or wrote into the socket what is no answer.
        """
        by_rank = args if isinstance(args, Sequence) else [args or {}] * self.tp_size
        self._number += 1
        errors: dict[int, RankError] = {}
        for rank, own in zip(self._ranks, by_rank, strict=True):
            try:
                rank.send({"number": self._number, "name": name, "args": dict(own)})
            except OSError:  # it is dead, which is told below
                continue
        answers = self._answers(name, timeout_s, errors)
        if not errors and len(answers) == self.tp_size:
            return [answers[rank] for rank in range(self.tp_size)]
        silent = [rank for rank in self._ranks if rank.number not in answers and rank.number not in errors]
        reason = f"no answer within timeout_s={timeout_s}" if silent and not errors else ""
        for rank in silent:
            errors[rank.number] = RankError(rank=rank.number, kind="stuck", phase=name, summary="did not answer",
                                            stacks=rank.stacks(), consequence=bool(errors))
        failure = make_failure(name, errors, {}, tp_size=self.tp_size, fabric=FABRIC, reason=reason)
        if len(errors) < self.tp_size or any(error.kind != "raised" for error in errors.values()):
            self.kill()
        raise failure

    def _answers(self, name: str, timeout_s: float | None, errors: dict[int, RankError]) -> dict[int, Any]:
        """Until all have answered or failed, or time is up."""
        answers: dict[int, Any] = {}
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.connection, selectors.EVENT_READ, rank)
            while len(answers) + len(errors) < self.tp_size and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(None if left == float("inf") else left):
                    rank = key.data
                    try:
                        answer = next((answer for answer in rank.received() if answer["number"] == self._number), None)
                    except (EOFError, OSError):
                        errors[rank.number] = rank.died(name)
                    except (GarbageError, ValueError, LookupError, TypeError) as garbage:  # or no JSON, or not what we send
                        errors[rank.number] = RankError(rank=rank.number, kind="died", phase=name, traceback=rank.output(),
                                                        summary=f"was ended: {garbage or type(garbage).__name__}")
                    else:
                        if answer is None:
                            continue
                        if "raised" in answer:
                            errors[rank.number] = _raised(rank.number, name, answer)
                        else:
                            answers[rank.number] = answer["done"]
                    selector.unregister(rank.connection)
                    if rank.number in errors:
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
        return answers

    def close(self) -> None:
        """Have the ranks leave, and end those that don't. Closing twice does nothing."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.send({"number": 0, "name": "stop", "args": {}})
        deadline = time.monotonic() + _STOP_S
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all ranks at once, with all that they started."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.release()
        self._ranks = []

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def versions(python: Path, packages: Sequence[str], *, timeout_s: float = 30.0) -> dict[str, str | None]:
    """The version of ``python`` itself and of each of these packages there; None of one that it lacks. Imports none of them.

    Raises:
        OSError: if it can't be run.
        ValueError: if it is no Python, or does not answer.
    """
    rank = _Rank(0, python, Path(), {})
    try:
        rank.send({"number": 0, "name": "versions", "args": {"packages": list(packages)}})
        rank.connection.settimeout(timeout_s)
        answer = None
        while answer is None:
            answer = next(rank.received(flags=0), None)
        found: dict[str, str | None] = answer["done"]
        return found
    except (EOFError, OSError, GarbageError, ValueError, LookupError) as error:
        raise ValueError(f"python={str(python)!r} does not answer as a Python of 3.10 or later does: {rank.said()}") from error
    finally:
        rank.kill()
        rank.release()


class _Rank:
    """One process, its end of the socket and what it prints."""

    def __init__(self, number: int, python: Path, served: Path, environ: Mapping[str, str]) -> None:
        self.number = number
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in release
        self.connection, theirs = socket.socketpair()
        self._unpacker = Unpacker()
        inherited = {name: value for name, value in os.environ.items() if name not in _OURS}
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [str(python), "-u", foreign_program.__file__, str(theirs.fileno()), str(served)],
                    env={**inherited, **environ}, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=self._log,
                    stderr=self._log, start_new_session=True)  # Ctrl-C is for this process, which then ends the ranks
            except BaseException:
                self._log.close()
                self.connection.close()
                raise

    def send(self, message: Mapping[str, Any]) -> None:
        self.connection.sendall(pack(message))

    def received(self, flags: int = socket.MSG_DONTWAIT) -> Any:
        """The messages that are whole by now."""
        data = self.connection.recv(1 << 20, flags)
        if not data:
            raise EOFError
        return self._unpacker.feed(data)

    def output(self) -> str:
        """The end of what it has printed."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _SHOWN))
        return self._log.read().decode(errors="replace")

    def said(self) -> str:
        """The last line of it."""
        return next((line.strip() for line in reversed(self.output().splitlines()) if line.strip()), "it printed nothing")

    def died(self, phase: str) -> RankError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        code = self.process.poll()
        what = describe_exit(code) if code is not None else "hung up"
        return RankError(rank=self.number, kind="died", phase=phase, summary=f"{what}; it printed last: {self.said()}",
                         traceback=self.output())

    def stacks(self) -> str:
        """Where it is, as faulthandler writes it into its output."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        time.sleep(_DUMP_S)
        return self.output()

    def kill(self) -> None:
        """End it and all that it started, in its session or out of it."""
        tree = []
        with contextlib.suppress(psutil.Error):
            tree = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def release(self) -> None:
        self.process.wait()
        self.connection.close()
        self._log.close()


def _raised(rank: int, phase: str, answer: Mapping[str, Any]) -> RankError:
    said = " ".join(str(answer["raised"]).split())  # what matters often stands below the first line
    return RankError(rank=rank, kind="raised", phase=phase, summary=said[:_LINE], traceback=answer["traceback"],
                     consequence=saw_another_fail(answer["raised"]))

"""What ends a command, and with which exit code. Imports nothing heavy: most mistakes are told before torch is loaded."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.ranks.failures import RankError, RankFailure
    from harness.subjects.base import SubjectFailure

FINDING, USAGE, COULD_NOT_RUN, UNEXPECTED = 1, 2, 3, 4
"""Exit codes beside 0. 1 is a finding or a regression and nothing else."""
REPORT_IT = "this was not expected: please report it, with the lines above"

_REFUSALS = ("CheckpointError", "UnsupportedModelError")
"""What ranks say of a checkpoint that can't be loaded."""


class UsageError(ValueError):
    """The command line is wrong: an option, a name, a number. Nothing has run."""


class CouldNotRunError(Exception):
    """Nothing is wrong with the command line, and yet it can't run: a file, the machine. The message is for users."""


@contextmanager
def usage() -> Iterator[None]:
    """Around what plans the work: a ValueError there is the command line's. Elsewhere it is a mistake of ours."""
    from engine.checkpoint.checkpoint_files import CheckpointError

    try:
        yield
    except (UsageError, CheckpointError):
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def refusal_of(failure: RankFailure | SubjectFailure) -> str | None:
    """What ranks say of a checkpoint that they can't load, one line; None if they broke over something else."""
    causes = [error for error in failure.failures.values() if not error.consequence]
    said = {error.summary.partition(": ")[2] for error in causes if _is_refusal(error)}
    if len(said) != 1 or not all(map(_is_refusal, causes)):
        return None
    return f"{said.pop()} (ranks {', '.join(map(str, failure.failures))})"


def _is_refusal(error: RankError) -> bool:
    kind = error.summary.partition(": ")[0]
    return kind in _REFUSALS or (kind == "ValueError" and error.phase == "load")


def told(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error, and the exit code; None if nobody expected it."""
    if isinstance(error, UsageError):
        return str(error), USAGE
    if isinstance(error, CouldNotRunError):
        return str(error), COULD_NOT_RUN
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", COULD_NOT_RUN
    if isinstance(error, (OSError, MemoryError)):
        return f"could not run: {str(error) or 'out of memory'}", COULD_NOT_RUN
    try:
        import torch

        from engine.checkpoint.checkpoint_files import CheckpointError
        from engine.ranks.ranks import RankFailure
        from harness.bench.worker import WorkerError
        from harness.subjects.base import SubjectFailure
    except ImportError:  # then it is none of these
        return None
    if isinstance(error, CheckpointError):
        return str(error), COULD_NOT_RUN
    if isinstance(error, (WorkerError, torch.OutOfMemoryError)):
        return f"could not run: {error}", COULD_NOT_RUN
    if isinstance(error, (RankFailure, SubjectFailure)):
        if (refusal := refusal_of(error)) is not None:
            return refusal, COULD_NOT_RUN
        if error.job == "start" or all(map(_is_the_machines, error.failures.values())):
            return f"could not run: {error}", COULD_NOT_RUN
    return None


def _is_the_machines(error: RankError) -> bool:
    """Killed, stuck or out of something, rather than code that went wrong."""
    if error.kind != "raised" or error.consequence:
        return True
    name = error.summary.partition(": ")[0]
    kind = getattr(builtins, name, None)
    return name == "OutOfMemoryError" or (isinstance(kind, type) and issubclass(kind, (OSError, MemoryError)))


def one_line(error: BaseException) -> str:
    """``ValueError: what it says``, its first line alone."""
    return f"{type(error).__qualname__}: {str(error).strip()}".partition("\n")[0].removesuffix(": ")

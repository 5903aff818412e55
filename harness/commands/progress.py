"""How a long run goes, on standard error: what is done of how much, and about how long the rest takes. Without a terminal too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from reports.records import AtlasRow, CheckRow

errors = Console(stderr=True)
COLOURS = {"pass": "green", "skipped": "yellow", "right": "green", "refused clearly": "yellow", "not compared": "yellow"}


class RowsShown:
    """A context manager around a run of named parts, each of which ends with a row. A line a row, and a spinner on a terminal.

    Args:
        parts: the name of each part, in their order. What took so long once is taken to do so again.
        quiet: show nothing.
    """

    def __init__(self, parts: Sequence[str], *, quiet: bool = False) -> None:
        self._parts = list(parts)
        self._quiet = quiet
        self._seconds: dict[str, float] = {}
        self._done = 0
        self._started_at = time.monotonic()
        self._bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors,
                             transient=True, disable=quiet or not errors.is_terminal)
        self._task = self._bar.add_task("starting", total=None)

    def on_start(self, name: str, tp_size: int) -> None:
        self._started_at = time.monotonic()
        self._bar.update(self._task, description=escape(f"[{self._done + 1}/{len(self._parts)}] tp {tp_size}: {name}"))

    def on_row(self, row: CheckRow | AtlasRow, name: str) -> None:
        """One more is done: ``[12/32] tp 2  logits  pass  3.1 s, about 2 min left``."""
        self._seconds[name] = time.monotonic() - self._started_at
        self._started_at = time.monotonic()
        self._done += 1
        if self._quiet:
            return
        style = COLOURS.get(row.verdict, "red")
        left = about(self.seconds_left)
        self._bar.console.print(f"{escape(f'[{self._done}/{len(self._parts)}]')} tp {row.tp_size}  {name:<12} "
                                f"[{style}]{row.verdict}[/{style}]  {row.seconds:.1f} s{f', {left} left' if left else ''}",
                                highlight=False, soft_wrap=True)

    @property
    def seconds_left(self) -> float:
        """What is left, as long as it took before; what has not been done yet as long as the mean of what has."""
        mean = sum(self._seconds.values()) / max(len(self._seconds), 1)
        return sum(self._seconds.get(name, mean) for name in self._parts[self._done :])

    def __enter__(self) -> RowsShown:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


@contextmanager
def spinner(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal a spinner with ``what: 3 of 24``: gives the function to tell it of each step."""
    if quiet or not errors.is_terminal:
        yield lambda what, done, total: None
        return
    with errors.status("starting") as shown:
        yield lambda what, done, total: shown.update(escape(f"{what}: {done} of {total}"))


def about(seconds: float) -> str:
    """``about 2 min``; nothing where nothing is left.

    >>> about(0), about(3.2), about(95), about(4000)
    ('', 'about 4 s', 'about 2 min', 'about 67 min')
    """
    if seconds <= 0:
        return ""
    return f"about {int(seconds) + 1} s" if seconds < 60 else f"about {seconds / 60:.0f} min"

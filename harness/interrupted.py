"""Ctrl-C, or SIGTERM, in the middle of long work: what was finished is not lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from reports.records import Report

WHY = "interrupted before it was done"
"""The reason of the rows of what was not finished."""
NOTICE = "[red]interrupted[/red]: the report holds what was finished, and names what was not"
"""For the terminal, in rich's markup."""


class Interrupted(KeyboardInterrupt):
    """Still a KeyboardInterrupt for all who don't ask for the report."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report
        """Rows of what was done, and an error for each thing that was not."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """While the report of an interrupted run is written: a CI sends one signal after another."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

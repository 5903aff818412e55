"""Ctrl-C in the middle of long work: what was finished is not lost."""

from __future__ import annotations

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

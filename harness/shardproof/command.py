"""The command ``shardproof``, and ``python -m harness``."""

from __future__ import annotations

import sys

from .packages import foreign

USAGE = 2


def main() -> None:
    """Run the command line, unless a module of somebody else stands where it needs one of ours."""
    if (message := foreign("engine", "reference", "reports")) is not None:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(USAGE)
    from harness.cli import main as run

    run()

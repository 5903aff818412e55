"""The command ``shardproof``, and ``python -m harness``."""

from __future__ import annotations

import sys

from .packages import foreign

USAGE = 2


def check_packages() -> None:
    """Leave with one line if a module of somebody else stands where a command needs one of ours."""
    if (message := foreign("engine", "reference", "reports")) is not None:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(USAGE)


def main() -> None:
    """Run the command line."""
    check_packages()
    from harness.cli import main as run

    run()

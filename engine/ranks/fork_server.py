"""Imported by the fork server alone, before all else: it removes the folder in which it listens when it ends.

multiprocessing removes that folder as the driver ends, unless the driver is killed. The fork server outlives the driver and
all ranks, whatever ended them.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil

FOLDER = "SHARDPROOF_FORK_SERVER_FOLDER"
"""Environment variable in which the driver tells the folder."""


def _remove(folder: str, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # not in a rank, which is a fork of this process
        shutil.rmtree(folder, ignore_errors=True)


def _collect_garbage() -> None:
    gc.freeze()  # what the fork server imported is never garbage
    gc.enable()


if FOLDER in os.environ:
    atexit.register(_remove, os.environ.pop(FOLDER), os.getpid())
    gc.disable()  # this process imports what ranks need, and does nothing else
    os.register_at_fork(after_in_child=_collect_garbage)

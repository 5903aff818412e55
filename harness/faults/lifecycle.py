"""Faults in how ranks are watched and ended. They are the driver's, and are planted there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import engine.ranks.jobs as jobs_module
from engine.parallel.group import TPGroup
from engine.ranks.failures import RankError
from engine.ranks.pool import ConnectedPool
from engine.ranks.process_ranks import ProcessHandle, ProcessPool
from harness.faults.base import Patches, around, control, fault


@fault(where="driver", rows=(86,), checks=("lifecycle",))
@around(ProcessPool, "_rank_died")
def killed_rank_not_seen(original: Any, self: Any, handle: ProcessHandle, deliver: Any) -> None:
    """Nobody looks whether a rank's process is still there: its death shows only as an answer that never comes."""
    del self._actions[handle.process.sentinel]


@fault(where="driver", rows=(84,), checks=("lifecycle",))
def ranks_outlive_their_driver(patch: Patches, tp: TPGroup) -> None:
    """Ranks that are given up are neither ended nor told, so that they stay for ever."""
    given_up: list[ProcessHandle] = []

    def put_off(original: Any, instead: Any) -> Any:
        def do_it_in_the_end() -> None:
            for handle in given_up:
                original(handle)

        patch.on_close(do_it_in_the_end)  # the fault itself may leave nothing behind
        return instead

    # Taken back in the other order: ended first, then closed.
    patch.replace(ProcessHandle, "close", lambda original: put_off(original, lambda self: None))
    patch.replace(ProcessHandle, "kill", lambda original: put_off(original, lambda self: given_up.append(self)))


@fault(where="driver", checks=("lifecycle",))
@around(jobs_module, "make_failure")
def consequence_taken_for_a_cause(original: Any, job: str, errors: Mapping[int, RankError], *arguments: Any,
                                  **options: Any) -> Any:
    """A rank whose connection broke because another one died is blamed like that one."""
    return original(
        job, {rank: replace(error, consequence=False) for rank, error in errors.items()}, *arguments, **options)


@control(where="driver")
@around(ConnectedPool, "poll")
def answers_awaited_in_short_naps(original: Any, self: Any, deliver: Any, timeout_s: float | None) -> None:
    """The driver wakes up every 20 ms to see whether ranks have said something: wasteful, and right."""
    original(self, deliver, 0.02 if timeout_s is None else min(timeout_s, 0.02))

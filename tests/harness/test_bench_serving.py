"""What a worker measures of an engine, on one whose times are scripted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness.bench import serving
from harness.bench.workloads import Requests, equal_requests

REQUESTS = equal_requests(2, 8, 5)()


class ScriptedEngine:
    """Takes the next of ``short_s`` for one token of each request, and ``long_s`` for all of them."""

    def __init__(self, short_s: list[float], long_s: float) -> None:
        self.short_s, self.long_s = iter(short_s), long_s

    def generate(self, requests: Requests, temperature: float) -> float:
        return next(self.short_s) if requests[0][1] == 1 else self.long_s

    def stream(self, requests: Requests, temperature: float) -> list[list[float]]:
        return []


def state_of(engine: ScriptedEngine) -> dict[str, Any]:
    return {"engine": SimpleNamespace(engine=engine, fresh=lambda requests: requests)}


def test_a_hiccup_in_the_short_run_has_both_runs_made_again() -> None:
    state = state_of(ScriptedEngine([9.0, 1.0], 3.0))
    assert serving.run_case(state, REQUESTS, ("decode",), 0.6) == {"ms_per_token": 500.0}


def test_decode_steps_that_cost_nothing_time_and_again_are_not_reported() -> None:
    with pytest.raises(ValueError, match="4 more tokens took no longer"):
        serving.run_case(state_of(ScriptedEngine([9.0, 8.0, 7.0], 3.0)), REQUESTS, ("decode",), 0.6)

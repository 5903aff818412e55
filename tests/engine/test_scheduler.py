"""What the scheduler plans, step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.execution.core import EngineCore
from engine.frontend.sampling import SamplingParams
from engine.scheduling.kv_cache import BlockManager
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import Request, Sequence
from tests.engine.scheduling import FakeRunner, Tokens
from tests.engine.support import FEW


def make_request(number: int, prompt: Tokens, **changes: Any) -> Sequence:
    values: dict[str, Any] = {"max_tokens": 4, "stop_token_ids": frozenset(), "params": SamplingParams(), "seed": 0}
    return Sequence.from_request(Request(request_id=number, prompt_token_ids=prompt, **(values | changes)))


def scheduler(num_blocks: int = 8, block_size: int = 2, **options: Any) -> Scheduler:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16} | options
    return Scheduler(BlockManager(num_blocks, block_size), **options)


def starts(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.request.request_id, chunk.start, chunk.num_tokens) for chunk in chunks]


def test_a_long_prompt_is_cut_to_the_budget_and_decodes_go_first() -> None:
    plan = scheduler(max_num_batched_tokens=4)
    plan.add(make_request(0, (1, 2)))
    plan.add(make_request(1, (3, 4, 5, 6, 7)))
    first = plan.schedule()
    assert starts(first) == [(0, 0, 2), (1, 0, 2)]
    assert [chunk.samples for chunk in first] == [True, False]
    second = plan.schedule()
    assert starts(second) == [(0, 2, 1), (1, 2, 3)]
    assert [chunk.in_flight for chunk in second] == [True, False]
    assert [chunk.samples for chunk in second] == [True, True]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    plan = scheduler(num_blocks=4, block_size=1, max_num_seqs=3)
    for number in range(3):
        plan.add(make_request(number, (number, number)))
    first = plan.schedule()
    assert starts(first) == [(0, 0, 2), (1, 0, 2)]
    second = plan.schedule()
    assert starts(second) == [(0, 2, 1)]
    assert [sequence.request.request_id for sequence in plan.waiting] == [1, 2]
    assert plan.commit(first, [7, 8])[1][0].token_ids == [1, 1, 8]
    plan.commit(second, [9])
    assert starts(plan.schedule()) == [(0, 3, 1)]


def test_a_preempted_sequence_waits_for_its_token_in_flight() -> None:
    plan = scheduler(num_blocks=4, block_size=1)
    plan.add(make_request(0, (0, 0)))
    plan.add(make_request(1, (1, 1)))
    first = plan.schedule()
    second = plan.schedule()
    assert starts(second) == [(0, 2, 1)]
    plan.abort(0)
    # There is room now, but its third token is on the device only, and a prefill takes tokens from the host.
    assert plan.schedule() == []
    plan.commit(first, [7, 8])
    # Its first block was free, not handed out: the prefix cache gives it back.
    assert starts(plan.schedule()) == [(1, 1, 2)]
    plan.commit(second, [9])


def test_a_sequence_stops_at_a_stop_token_and_its_extra_token_is_dropped() -> None:
    plan = scheduler()
    plan.add(make_request(0, (1, 2), stop_token_ids=frozenset({9})))
    first = plan.schedule()
    second = plan.schedule()
    (committed,) = plan.commit(first, [9])
    assert (committed[0].finish_reason, committed[1]) == ("stop", 9)
    assert not plan.has_work
    assert plan.commit(second, [5]) == []
    assert committed[0].token_ids == [1, 2, 9]


def test_nothing_is_launched_beyond_the_last_token() -> None:
    plan = scheduler()
    plan.add(make_request(0, (1,), max_tokens=2))
    steps = [plan.schedule(), plan.schedule()]
    assert [starts(step) for step in steps] == [[(0, 0, 1)], [(0, 1, 1)]]
    assert plan.schedule() == []
    plan.commit(steps[0], [5])
    assert plan.schedule() == []
    assert plan.commit(steps[1], [6])[0][0].finish_reason == "length"


@pytest.mark.parametrize("state", ["waiting", "running", "in flight", "finished", "unknown"])
def test_an_abort_frees_whatever_the_request_holds(state: str) -> None:
    plan = scheduler()
    plan.add(make_request(0, (1, 2, 3), max_tokens=1))
    steps = [plan.schedule()] if state != "waiting" else []
    if state == "finished":
        plan.commit(steps.pop(), [4])
    plan.abort(1 if state == "unknown" else 0)
    plan.abort(0)
    assert not plan.has_work
    assert plan.blocks.num_free == 8
    assert sorted(plan.free_rows) == [0, 1, 2, 3]
    for step in steps:
        assert plan.commit(step, [4]) == []


@FEW
@given(st.integers(1, 6), st.integers(1, 6))
def test_a_prompt_waits_until_its_tokens_have_room(num_blocks: int, prompt_blocks: int) -> None:
    plan = scheduler(num_blocks=num_blocks, block_size=2)
    plan.add(make_request(0, tuple(range(2 * prompt_blocks))))
    assert bool(plan.schedule()) == (prompt_blocks <= num_blocks)


@pytest.mark.parametrize("caching", [True, False])
def test_a_long_prompt_is_not_begun_before_there_is_room_for_all_of_it(caching: bool) -> None:
    # Begun chunk by chunk beside a running sequence, it would fill the cache, give way, and start over, again and again.
    blocks = BlockManager(64, 16, enable_prefix_caching=caching)
    plan = Scheduler(blocks, max_num_seqs=8, max_num_batched_tokens=128)
    plan.add(make_request(0, (1,) * 200, max_tokens=300))
    plan.add(make_request(1, (2,) * 900, max_tokens=20))
    num_computed = [0, 0]
    previous: list[Chunk] = []
    while plan.has_work:
        chunks = plan.schedule()
        for chunk in chunks:
            num_computed[chunk.sequence.request.request_id] += chunk.num_tokens
        plan.commit(previous, [7] * sum(chunk.samples for chunk in previous))
        previous = chunks
    assert num_computed == [499, 919]


def test_a_core_that_cannot_go_on_says_so() -> None:
    config = SimpleNamespace(
        block_size=2, max_num_seqs=2, max_num_batched_tokens=8, enable_chunked_prefill=True, enable_prefix_caching=True
    )
    core = EngineCore(FakeRunner(config), 1)  # type: ignore[arg-type]
    core.scheduler.add(make_request(0, (1, 2, 3)))
    with pytest.raises(RuntimeError, match="nothing can run: waiting=1, free blocks=1"):
        core.step()

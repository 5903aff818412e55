"""The protocol of the all-reduce over shared memory, in its plain twin: exact, the same bits, and each of its rules is needed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.execution.runner import step_sizes
from engine.kernels import peer_all_reduce as module
from engine.kernels.peer_all_reduce import PeerMemory, Way, peer_all_reduce_torch, peer_argmax_torch, rows_of_tile, way_of
from tests.engine.kernels.peers import dawdle, integers, on_ranks, shared_memory

WAYS = [Way(two_shot=False), Way(two_shot=True)]
COUNTS = (1, 2, 5, 64, 129, 500)
SIZES = (2, 3, 5)


def sums(memory: PeerMemory, way: Way, dtype: torch.dtype, *, num_calls: int = 30) -> list[bool]:
    """Whether each of many calls, of many sizes and with some ranks late, gave the sum of what all ranks had."""
    draw = random.Random(memory.rank)
    right = []
    for call in range(num_calls):
        count = COUNTS[call % len(COUNTS)]
        dawdle(draw)
        found = peer_all_reduce_torch(integers(memory.rank, call, count, dtype), memory, way)
        wanted = sum(integers(rank, call, count, torch.float64) for rank in range(memory.size))
        right.append(bool((found.double() == wanted).all()))
    return right


@pytest.mark.parametrize("way", WAYS, ids=["one-shot", "two-shot"])
@pytest.mark.parametrize("size", SIZES)
def test_sums_are_exact_however_late_a_rank_is(size: int, way: Way) -> None:
    for right in on_ranks(shared_memory(size), lambda memory: sums(memory, way, torch.bfloat16)):
        assert all(right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", WAYS, ids=["one-shot", "two-shot"])
def test_all_ranks_get_the_bits_of_one_sum_in_rank_order(dtype: torch.dtype, way: Way) -> None:
    parts = [torch.randn(1031, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(4)]
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    for found in on_ranks(shared_memory(4), lambda memory: peer_all_reduce_torch(parts[memory.rank].clone(), memory, way)):
        assert torch.equal(found.view(torch.uint8), total.to(dtype).view(torch.uint8))


def test_negative_zeros_stay_as_an_embedding_needs_it() -> None:
    found = on_ranks(shared_memory(3), lambda memory: peer_all_reduce_torch(torch.full((5,), -0.0), memory, WAYS[0]))
    assert all(torch.signbit(each).all() for each in found)


def test_the_largest_value_of_all_ranks_wins_and_of_equals_the_lowest_rank() -> None:
    inf = torch.inf
    value_NR = torch.tensor([[1.0, 3.0, -inf, 2.0, -inf, 0.0], [2.0, 3.0, -5.0, inf, -inf, -0.0]])
    index_NR = torch.tensor([[7, 8, -1, 9, -1, 10], [57, 58, 59, -1, -1, 60]])
    found = on_ranks(shared_memory(2), lambda memory: peer_argmax_torch(value_NR[memory.rank], index_NR[memory.rank], memory))
    assert [each.tolist() for each in found] == [[57, 8, 59, -1, -1, 10]] * 2


def test_other_types_are_refused_and_left_to_the_library() -> None:
    memory = shared_memory(2)[0]
    for dtype in (torch.float64, torch.int64, torch.uint8):
        x = torch.zeros(4, dtype=dtype)
        assert way_of(x, memory) is None
        with pytest.raises(ValueError, match="must be one of bfloat16"):
            peer_all_reduce_torch(x, memory, WAYS[0])
    assert way_of(torch.zeros(0, 7), memory) is None


# Each rule of the protocol left out, as in published bugs: with a rank that is late, sums must be wrong.


def no_meeting(monkeypatch: pytest.MonkeyPatch) -> Callable[[PeerMemory], PeerMemory]:
    monkeypatch.setattr(module, "_meet_torch", lambda *arguments: None)
    return lambda memory: memory


def one_half_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[PeerMemory], PeerMemory]:
    def data(self: PeerMemory, rank: int, call: int, like: torch.Tensor) -> torch.Tensor:
        start = module.FLAG_BYTES
        return self.parts[rank][start : start + like.numel() * like.element_size()].view(like.dtype)

    monkeypatch.setattr(PeerMemory, "data", data)
    return lambda memory: memory


def call_number_baked_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[PeerMemory], PeerMemory]:
    """All calls have the number of the first, as in every replay of a graph that the host's counter was captured in."""
    monkeypatch.setattr(module, "_enter_torch", lambda memory: 1)
    return lambda memory: memory


def sub_group(monkeypatch: pytest.MonkeyPatch) -> Callable[[PeerMemory], PeerMemory]:
    """Rank 1 reads the memory of a rank of another group in place of rank 0's."""
    other = torch.zeros_like(shared_memory(1)[0].parts[0])

    def wrong(memory: PeerMemory) -> PeerMemory:
        if memory.rank != 1:
            return memory
        return replace(memory, parts=(_Split(memory.parts[0], other), *memory.parts[1:]))

    return wrong


class _Split:
    """Flags are written where they belong, data is read elsewhere."""

    def __init__(self, flags: torch.Tensor, data: torch.Tensor) -> None:
        self.flags, self.data = flags, data

    def __getitem__(self, part: slice) -> torch.Tensor:
        return (self.flags if part.start is None else self.data)[part]


@pytest.mark.parametrize("leave_out", [no_meeting, one_half_only, call_number_baked_in, sub_group])
@pytest.mark.parametrize("way", WAYS, ids=["one-shot", "two-shot"])
def test_each_rule_is_needed(monkeypatch: pytest.MonkeyPatch, leave_out: Any, way: Way) -> None:
    """Rank 0 rushes ahead, then rank 1 does."""
    change = leave_out(monkeypatch)
    summed = module._sum_torch

    def late_sum(parts: list[torch.Tensor]) -> torch.Tensor:
        time.sleep(1e-3 * (random.random() < 0.5))  # between the meeting and the reading
        return summed(parts)

    monkeypatch.setattr(module, "_sum_torch", late_sum)
    memories = [change(memory) for memory in shared_memory(2)]
    results = on_ranks(memories, lambda memory: sums(memory, way, torch.float32, num_calls=60))
    assert not all(all(right) for right in results)


@pytest.mark.parametrize("way", WAYS, ids=["one-shot", "two-shot"])
def test_late_readers_do_no_harm(monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    """The control of the test above: the same delays, and all rules."""
    summed = module._sum_torch

    def late_sum(parts: list[torch.Tensor]) -> torch.Tensor:
        time.sleep(1e-3 * (random.random() < 0.5))
        return summed(parts)

    monkeypatch.setattr(module, "_sum_torch", late_sum)
    for right in on_ranks(shared_memory(2), lambda memory: sums(memory, way, torch.float32, num_calls=60)):
        assert all(right)


@pytest.mark.parametrize("hidden", [576, 1024, 4096, 5120])
@pytest.mark.parametrize("most_tokens", [64, 2048, 10_000, 16_384])
def test_steps_at_the_start_compile_the_norm_for_all_numbers_of_tokens(hidden: int, most_tokens: int) -> None:
    at_the_start = step_sizes(most_tokens, tp_size=2)
    assert at_the_start[0] == most_tokens == max(at_the_start)
    assert {rows_of_tile(num_tokens, hidden) for num_tokens in range(1, most_tokens + 1)} == {
        rows_of_tile(num_tokens, hidden) for num_tokens in at_the_start}
    assert step_sizes(most_tokens, tp_size=1) == [most_tokens]

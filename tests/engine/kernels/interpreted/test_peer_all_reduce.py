"""The all-reduce over shared memory against its twin: one rank runs, and finds what the others have written before.

The interpreter runs one thread, so nobody writes while a rank waits.
"""

import itertools

import pytest
import torch

from engine.kernels.peer_all_reduce import (
    FLAG_BYTES,
    PeerMemory,
    Way,
    peer_add_rms_norm,
    peer_add_rms_norm_into,
    peer_all_reduce,
    peer_all_reduce_torch,
    peer_argmax,
)
from engine.kernels.rms_norm import add_rms_norm_torch
from tests.engine.kernels.peers import integers, on_ranks, shared_memory
from tests.engine.kernels.problems import over_budget, rounding_budget

SIZE = 3


def after_the_others(memories: list[PeerMemory], rank: int) -> list[PeerMemory]:
    """The memory as the others have left it when ``rank`` begins the same call anew: its own flags and data are gone."""
    memories[rank].parts[rank][FLAG_BYTES:].zero_()
    for peer in range(SIZE):
        memories[rank].flags(peer)[:, :, rank] = 0
        if peer != rank:  # the twin is one program, and these are several
            memories[rank].flags(rank)[:, :, peer] = int(memories[peer].calls[0])
    memories[rank].calls.sub_(1)
    return memories




@pytest.mark.parametrize(("dtype", "count", "calls_before"), [
    *itertools.product((torch.float32, torch.float16), (1, 37, 128, 2000), (0, 1, 6)), (torch.int32, 128, 1)])
def test_one_shot_gives_what_the_twin_gives(dtype: torch.dtype, count: int, calls_before: int) -> None:
    memories = shared_memory(SIZE, half_bytes=8192)
    for memory in memories:
        memory.calls.fill_(calls_before)
    way = Way(two_shot=False, num_warps=1, num_programs=4)
    twins = on_ranks(memories, lambda memory: peer_all_reduce_torch(integers(memory.rank, 3, count, dtype), memory, way))
    for rank in range(SIZE):
        own = memories[rank].data(rank, calls_before + 1, twins[0]).clone()
        after_the_others(memories, rank)
        found = peer_all_reduce(integers(rank, 3, count, dtype), memories[rank], way)
        assert torch.equal(found, twins[rank])
        assert torch.equal(memories[rank].data(rank, calls_before + 1, twins[0]), own)
        assert (memories[rank].calls == calls_before + 1).all(), "counted for every program of the next call"
        for peer in set(range(SIZE)) - {rank}:
            assert memories[rank].flags(peer)[0, 0, rank] == calls_before + 1


@pytest.mark.parametrize(("largest", "wanted"), [(False, [2**25 + 4, -2**31 + 1, -1]), (True, [2**24 + 2, 2**31 - 1, 3])])
def test_integers_are_added_as_such_and_compared_as_such(largest: bool, wanted: list[int]) -> None:
    """Those that float32 does not tell apart, and sums that wrap."""
    parts = torch.tensor([[2**24 + 1, 2**31 - 1, -5], [2**24 + 2, 1, 3], [1, 1, 1]], dtype=torch.int32)
    for two_shot in (True, False):
        way, memories = Way(two_shot=two_shot, num_warps=1), shared_memory(SIZE)
        found = on_ranks(memories, lambda memory, way=way: peer_all_reduce_torch(parts[memory.rank].clone(), memory, way,
                                                                                largest=largest))
        assert [each.tolist() for each in found] == [wanted] * SIZE
    for rank in range(SIZE):
        after_the_others(memories, rank)
        assert peer_all_reduce(parts[rank].clone(), memories[rank], way, largest=largest).tolist() == wanted


@pytest.mark.parametrize("count", [5, 384, 1500])
def test_two_shot_adds_up_its_share_and_takes_the_others_from_them(count: int) -> None:
    """Each rank's share is as it leaves it for others to read; all else it reads from their memory."""
    way = Way(two_shot=True, num_warps=1, num_programs=2)
    block = 32 * 16 // 4
    owner = torch.arange(count) // block % SIZE
    total = torch.stack([integers(rank, 1, count, torch.float32) for rank in range(SIZE)]).sum(0)
    for rank in range(SIZE):
        memories = shared_memory(SIZE, half_bytes=8192)
        for peer in set(range(SIZE)) - {rank}:
            given = integers(peer, 1, count, torch.float32)
            memories[peer].data(peer, 1, given).copy_(torch.where(owner == peer, total, given))
            memories[rank].flags(rank)[:, :, peer] = 1
        found = peer_all_reduce(integers(rank, 1, count, torch.float32), memories[rank], way)
        assert torch.equal(found, total)
        own = memories[rank].data(rank, 1, found)
        assert torch.equal(own[owner == rank], total[owner == rank])
        for peer in set(range(SIZE)) - {rank}:
            assert memories[rank].flags(peer)[:, 0, rank].tolist() == [1, 1]


@pytest.mark.parametrize(("num_rows", "dim", "tile"), [(0, 8, 64), (1, 64, 64), (3, 40, 64), (9, 8, 2**14), (9, 8, 16)])
def test_the_sum_with_residual_and_norm_is_the_norm_of_the_sum(monkeypatch: pytest.MonkeyPatch, num_rows: int, dim: int,
                                                               tile: int) -> None:
    """Also where a program takes tile after tile."""
    monkeypatch.setattr("engine.kernels.peer_all_reduce._MAX_NORM_TILE", tile)
    parts = torch.randn(SIZE, num_rows, dim, generator=torch.Generator().manual_seed(dim)).half()
    residual, weight = torch.randn(num_rows, dim).half(), torch.randn(dim).half()
    wanted, new_residual = add_rms_norm_torch(parts.float().sum(0).half(), residual, weight, 1e-6)
    for rank in range(SIZE):
        memories = shared_memory(SIZE, half_bytes=8192)
        for peer in set(range(SIZE)) - {rank}:
            memories[peer].data(peer, 1, parts[peer]).copy_(parts[peer].flatten())
            memories[rank].flags(rank)[:, :, peer] = 1
        found, sum_ = peer_add_rms_norm(parts[rank].clone(), residual, weight, 1e-6, memories[rank], num_programs=2)
        assert torch.equal(sum_, new_residual)
        assert over_budget(found, wanted, rounding_budget(wanted, wanted, torch.float16)) <= 1


def test_a_sum_with_norm_that_is_larger_than_the_memory_goes_in_pieces_of_rows() -> None:
    num_rows, dim, most = 9, 64, 7  # in two pieces, of five and four rows
    parts = torch.randn(SIZE, num_rows, dim, generator=torch.Generator().manual_seed(1)).half()
    residual, weight = torch.randn(num_rows, dim).half(), torch.randn(dim).half()
    wanted, new_residual = add_rms_norm_torch(parts.float().sum(0).half(), residual, weight, 1e-6)
    for rank in range(SIZE):
        memories = shared_memory(SIZE, half_bytes=most * dim * 2)
        for peer in set(range(SIZE)) - {rank}:
            for call, rows in enumerate(parts[peer].split(5), start=1):
                memories[peer].data(peer, call, rows).copy_(rows.flatten())
            memories[rank].flags(rank)[:, :, peer] = 2
        found, sum_ = peer_add_rms_norm(parts[rank].clone(), residual, weight, 1e-6, memories[rank])
        assert torch.equal(sum_, new_residual)
        assert over_budget(found, wanted, rounding_budget(wanted, wanted, torch.float16)) <= 1
        assert (memories[rank].calls == 2).all()


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_in_a_room_is_summed_where_it_is(number: int) -> None:
    """Nothing is copied: neither the halves nor the other room change."""
    num_rows, dim = 5, 40
    parts = torch.randn(SIZE, num_rows, dim, generator=torch.Generator().manual_seed(number)).half()
    residual, weight = torch.randn(num_rows, dim).half(), torch.randn(dim).half()
    wanted, new_residual = add_rms_norm_torch(parts.float().sum(0).half(), residual, weight, 1e-6)
    for rank in range(SIZE):
        memories = shared_memory(SIZE, half_bytes=1024, room_bytes=1024)
        memories[rank].flags(rank)[:, :, :] = 1
        rooms = [memories[rank].room(peer, number, (num_rows, dim), torch.float16) for peer in range(SIZE)]
        for room, part in zip(rooms, parts, strict=True):
            room.copy_(part)
        before = [part[FLAG_BYTES:].clone() for part in memories[rank].parts]
        found, sum_ = torch.empty_like(residual), torch.empty_like(residual)
        peer_add_rms_norm_into(found, sum_, rooms[rank], residual, weight, 1e-6, memories[rank], num_programs=2, parts=rooms)
        assert torch.equal(sum_, new_residual)
        assert over_budget(found, wanted, rounding_budget(wanted, wanted, torch.float16)) <= 1
        assert all(torch.equal(part[FLAG_BYTES:], was) for part, was in zip(memories[rank].parts, before, strict=True))
        for peer in set(range(SIZE)) - {rank}:
            assert (memories[rank].flags(peer)[0, :2, rank] == 1).all(), "its peers are told"


def test_two_rooms_and_two_halves_are_four_places() -> None:
    memory = shared_memory(2, half_bytes=1024, room_bytes=2048)[0]
    rooms = [memory.room(1, number, (16, 32), torch.float32) for number in range(2)]
    halves = [memory.data(1, call, torch.empty(256)) for call in range(2)]
    for value, place in enumerate([*rooms, *halves], start=1):
        place.fill_(value)
    assert [place.unique().tolist() for place in [*rooms, *halves]] == [[1.0], [2.0], [3.0], [4.0]]
    assert not memory.flags(1).any()


@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_argmax_is_the_first_of_the_largest(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    value_NR = torch.randint(-3, 3, (SIZE, num_rows), generator=generator).float()
    value_NR[:, ::7] = -torch.inf
    value_NR[1, ::5] = torch.inf
    index_NR = torch.randint(0, 1000, (SIZE, num_rows), generator=generator).masked_fill(value_NR.isinf(), -1)
    best_R = value_NR.argmax(0, keepdim=True)
    wanted = torch.where(value_NR.gather(0, best_R).isfinite(), index_NR.gather(0, best_R), -1)[0]
    for rank in range(SIZE):
        memories = shared_memory(SIZE, half_bytes=8192)
        for peer in set(range(SIZE)) - {rank}:
            memories[peer].data(peer, 1, index_NR[peer]).copy_(index_NR[peer])
            both = memories[peer].data(peer, 1, torch.empty(3 * num_rows))
            both[2 * num_rows :] = value_NR[peer]
            memories[rank].flags(rank)[:, :, peer] = 1
        assert peer_argmax(value_NR[rank], index_NR[rank], memories[rank]).tolist() == wanted.tolist()

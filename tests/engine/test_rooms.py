"""Where products go that ranks are to sum. Sending needs two GPUs: tests/multigpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.parallel.group import ProcessTPGroup
from engine.parallel.rooms import SENT_BYTES, Rooms
from engine.ranks.ranks import RankContext, RankFailure, Ranks
from tests.engine.kernels.peers import shared_memory

SHAPE = (3, 40)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("number", [0, 1])
def test_a_product_is_written_into_this_ranks_room_and_read_in_every_ranks(number: int, size: int) -> None:
    memory = shared_memory(size, room_bytes=1024)[1]
    wanted: list[slice] = []

    def product(rows: slice, out_TE: Tensor | None) -> Tensor:
        assert out_TE is not None, "a room is there to write into"
        wanted.append(rows)
        return out_TE.fill_(7)

    x_TE, placed = Rooms(memory, torch.device("cpu")).place(number, SHAPE, torch.float16, product)
    rooms = [memory.room(rank, number, SHAPE, torch.float16) for rank in range(size)]
    assert [each.rows for each in placed] == wanted == [slice(None)]
    assert [part.data_ptr() for part in placed[0].parts] == [room.data_ptr() for room in rooms]
    assert x_TE.data_ptr() == rooms[1].data_ptr()
    assert [room.unique().tolist() for room in rooms] == [[7.0] if rank == 1 else [0.0] for rank in range(size)]
    assert not memory.room(1, 1 - number, SHAPE, torch.float16).any()


def test_what_is_larger_than_a_room_is_not_held() -> None:
    rooms = Rooms(shared_memory(2, room_bytes=240)[0], torch.device("cpu"))
    assert rooms.hold(SHAPE, torch.float16)
    assert not rooms.hold(SHAPE, torch.float32)
    assert SENT_BYTES > 1024, "the products of these tests are not sent"


def place(context: RankContext) -> int:
    """Which room a product gets."""
    assert isinstance(context.tp, ProcessTPGroup), "the ranks are processes"
    memory = context.state.setdefault("memory", shared_memory(2, room_bytes=1024)[context.tp.rank])
    context.tp.rooms = context.tp.rooms or Rooms(memory, context.device)
    product = context.tp.partial_sum(SHAPE, torch.float16, lambda rows, out_TE: torch.zeros(1) if out_TE is None else out_TE)
    rooms = [memory.room(0, number, SHAPE, torch.float16).data_ptr() for number in range(2)]
    return rooms.index(product.placed[0].parts[0].data_ptr())


def place_three(context: RankContext) -> list[int]:
    numbers = []
    for _ in range(3):
        numbers.append(place(context))
        context.tp.all_reduce(torch.zeros(1))  # as the sum of the product would be
    return numbers


def fail_around_a_product(context: RankContext) -> None:
    if context.tp.rank == 0:
        place(context)
    raise KeyError("behind a product on rank 0, ahead of it on rank 1")


@pytest.mark.multirank
def test_products_take_the_rooms_in_turn_and_ranks_agree_on_them_behind_a_job_that_failed() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        before = ranks.run(place_three, timeout_s=30)
        with pytest.raises(RankFailure, match="behind a product"):
            ranks.run(fail_around_a_product, timeout_s=30)
        assert ranks.healthy
        for first, second in (before, ranks.run(place_three, timeout_s=30)):
            assert first == second
            assert first in ([0, 1, 0], [1, 0, 1])

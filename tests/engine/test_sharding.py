import doctest
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.parallel import sharding
from engine.parallel.sharding import (
    HeadShard,
    VocabShard,
    check_rank,
    divide,
    even_range,
    head_shard,
    query_head_range,
    scale_range,
    vocab_shard,
)
from tests.engine.support import FEW, MANY, TP_SIZES

SIZES = st.integers(1, 200)


@st.composite
def head_layouts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(num_q_heads, num_kv_heads, tp_size) with at least one query head a rank."""
    num_kv_heads = draw(st.integers(1, 9))
    num_q_heads = num_kv_heads * draw(st.integers(1, 9))
    return num_q_heads, num_kv_heads, draw(st.integers(1, min(12, num_q_heads)))


def head_shards(num_q_heads: int, num_kv_heads: int, tp_size: int) -> list[HeadShard]:
    return [head_shard(num_q_heads, num_kv_heads, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]


def assert_dealt_out(ranges: Iterable[Iterable[int]], total: int) -> None:
    """Every index is owned exactly once, and ranks own in ascending order."""
    assert list(chain.from_iterable(ranges)) == list(range(total))


def assert_even(lengths: Sequence[int]) -> None:
    """As even as it gets, and the first ranks take one more."""
    assert lengths[0] - lengths[-1] <= 1
    assert all(a >= b for a, b in pairwise(lengths)), lengths


@MANY
@given(SIZES, TP_SIZES)
@example(9, 4)
def test_every_index_has_one_owner_and_the_first_ranks_take_one_more(total: int, tp_size: int) -> None:
    if total < tp_size:
        with pytest.raises(ValueError, match=rf"size={total} .*tp_size={tp_size}\b"):
            even_range(total, tp_rank=0, tp_size=tp_size)
        return
    ranges = [even_range(total, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    assert_dealt_out(ranges, total)
    assert_even([len(owned) for owned in ranges])


@pytest.mark.parametrize(
    "ranges",
    [[range(2), range(3, 5)], [range(3), range(2, 5)], [range(3), range(3, 4)], [range(3, 5), range(3)]],
    ids=["gap", "overlap", "short", "swapped"],
)
def test_the_ownership_check_notices_a_wrong_partition(ranges: list[range]) -> None:
    with pytest.raises(AssertionError):
        assert_dealt_out(ranges, 5)


@pytest.mark.parametrize("lengths", [[2, 2, 3], [3, 1], [4, 2, 2]], ids=["last takes more", "uneven", "lump"])
def test_the_evenness_check_notices_a_wrong_partition(lengths: list[int]) -> None:
    with pytest.raises(AssertionError):
        assert_even(lengths)


@MANY
@given(head_layouts())
@example((9, 3, 2))
@example((8, 8, 3))
def test_query_heads_have_one_owner_each(layout: tuple[int, int, int]) -> None:
    num_q_heads, _, tp_size = layout
    shards = head_shards(*layout)
    assert_dealt_out([shard.q_heads for shard in shards], num_q_heads)
    assert_even([shard.local_num_q_heads for shard in shards])
    assert [shard.q_heads for shard in shards] == [
        query_head_range(num_q_heads, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)
    ]


@MANY
@given(head_layouts())
@example((9, 3, 2))
def test_a_rank_holds_just_the_kv_heads_that_its_query_heads_use(layout: tuple[int, int, int]) -> None:
    num_q_heads, num_kv_heads, _ = layout
    group = num_q_heads // num_kv_heads
    shards = head_shards(*layout)
    for shard in shards:
        assert set(shard.kv_heads) == {q_head // group for q_head in shard.q_heads}
        assert shard.local_num_kv_heads == len(shard.kv_heads)
        used = [shard.kv_heads[local] for local in shard.kv_of_q]
        assert used == [q_head // group for q_head in shard.q_heads]
    assert set(chain.from_iterable(shard.kv_heads for shard in shards)) == set(range(num_kv_heads))


@MANY
@given(head_layouts())
def test_starts_and_counts_say_the_same_as_the_map(layout: tuple[int, int, int]) -> None:
    for shard in head_shards(*layout):
        rebuilt = [kv_head for kv_head, count in enumerate(shard.q_counts) for _ in range(count)]
        assert tuple(rebuilt) == shard.kv_of_q
        assert [shard.kv_of_q[start] for start in shard.q_starts] == list(range(shard.local_num_kv_heads))
        assert shard.is_even == (len(set(shard.q_counts)) == 1)


def test_nine_query_heads_on_two_ranks_share_the_middle_kv_head() -> None:
    first, second = head_shards(9, 3, 2)
    assert (first.q_heads, second.q_heads) == (range(5), range(5, 9))
    assert (first.kv_heads, second.kv_heads) == (range(2), range(1, 3))
    assert (first.kv_of_q, second.kv_of_q) == ((0, 0, 0, 1, 1), (0, 1, 1, 1))
    assert (first.q_starts, first.q_counts, first.is_even) == ((0, 3), (3, 2), False)


@MANY
@given(SIZES, TP_SIZES)
@example(5, 4)
@example(49_152, 5)
@example(8, 8)
def test_every_token_id_has_one_owner_and_shards_are_equal(vocab_size: int, tp_size: int) -> None:
    if vocab_size < tp_size:
        with pytest.raises(ValueError, match=rf"vocab_size={vocab_size} .*tp_size={tp_size}\b"):
            vocab_shard(vocab_size, tp_rank=0, tp_size=tp_size)
        return
    shards = [vocab_shard(vocab_size, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    assert_dealt_out([shard.ids for shard in shards], vocab_size)
    assert len({shard.local_size for shard in shards}) == 1
    assert 0 <= shards[0].local_size * tp_size - vocab_size < tp_size, "more padding than equal shards need"
    # Cutting the gathered vocabulary off at vocab_size takes away all padding, and only that.
    for shard in shards:
        assert shard.local_size == len(shard.ids) or shard.ids.stop == vocab_size
        assert not shard.ids or shard.ids.start == shard.local_size * shards.index(shard)


def test_the_last_ranks_of_a_small_vocabulary_hold_padding_only() -> None:
    shards = [vocab_shard(5, tp_rank=rank, tp_size=4) for rank in range(4)]
    assert [list(shard.ids) for shard in shards] == [[0, 1], [2, 3], [4], []]
    assert [shard.local_size for shard in shards] == [2, 2, 2, 2]
    assert shards[3] == VocabShard(ids=range(5, 5), local_size=2)


@FEW
@given(st.integers(0, 20), st.integers(1, 8), st.integers(1, 64))
def test_scaled_heads_are_their_rows(start: int, count: int, width: int) -> None:
    rows = scale_range(range(start, start + count), width)
    assert list(rows) == [head * width + row for head in range(start, start + count) for row in range(width)]


@pytest.mark.parametrize(("total", "parts"), [(9, 2), (9, 0), (9, -3)])
def test_an_uneven_division_names_both_numbers(total: int, parts: int) -> None:
    with pytest.raises(ValueError, match=rf"heads={total} .*parts={parts}\b"):
        divide(total, parts, what="heads")


@FEW
@given(st.integers(0, 50), st.integers(1, 50))
def test_an_even_division_is_the_quotient(quotient: int, parts: int) -> None:
    assert divide(quotient * parts, parts) == quotient


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(-1, 2), (2, 2), (0, 0), (0, -1)])
def test_a_rank_outside_the_group_names_both_numbers(tp_rank: int, tp_size: int) -> None:
    for split in (
        lambda: check_rank(tp_rank, tp_size),
        lambda: even_range(8, tp_rank=tp_rank, tp_size=tp_size),
        lambda: vocab_shard(8, tp_rank=tp_rank, tp_size=tp_size),
        lambda: head_shard(8, 4, tp_rank=tp_rank, tp_size=tp_size),
    ):
        with pytest.raises(ValueError, match=rf"tp_rank={tp_rank} .*tp_size={tp_size}\b"):
            split()


def test_more_ranks_than_query_heads_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"num_q_heads=9 .*tp_size=10\b"):
        head_shard(9, 3, tp_rank=0, tp_size=10)


def test_query_heads_that_do_not_group_over_kv_heads_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"num_q_heads.*=9 .*=2\b"):
        head_shard(9, 2, tp_rank=0, tp_size=1)


def test_the_examples_in_the_docstrings_hold() -> None:
    outcome = doctest.testmod(sharding)
    assert outcome.attempted >= 6
    assert outcome.failed == 0

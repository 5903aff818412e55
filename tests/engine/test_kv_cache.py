from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.frontend.sampling import SamplingParams
from engine.scheduling.kv_cache import ROOT_HASH, BlockManager, hash_block
from engine.scheduling.sequence import Request, Sequence
from tests.engine.support import MANY

ROOT = Path(__file__).parents[2]
TOKENS = st.integers(0, 2**31)


def sequence_of(token_ids: list[int]) -> Sequence:
    request = Request(
        request_id=0,
        prompt_token_ids=tuple(token_ids),
        params=SamplingParams(),
        seed=0,
        max_tokens=100,
        stop_token_ids=frozenset(),
    )
    return Sequence.from_request(request)


def computed(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence that was run whole: it holds blocks, which the prefix cache knows."""
    sequence = sequence_of(token_ids)
    shared = manager.cached_prefix(sequence)
    assert manager.can_hold(sequence, len(token_ids), shared)
    manager.take_prefix(sequence, shared)
    manager.grow(sequence, len(token_ids))
    sequence.num_computed = len(token_ids)
    manager.register(sequence)
    return sequence


def chain(token_ids: list[int], block_size: int) -> list[bytes]:
    hashes = [ROOT_HASH]
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        hashes.append(hash_block(hashes[-1], token_ids[start : start + block_size]))
    return hashes[1:]


@MANY
@given(st.lists(TOKENS, max_size=8), st.lists(TOKENS, max_size=8), st.integers(1, 4))
def test_chained_hashes_agree_just_as_far_as_the_tokens_do(a: list[int], b: list[int], block_size: int) -> None:
    # Both share a first part, or little would be equal.
    a, b = [7, 7, 7, 7, *a], [7, 7, 7, 7, *b]
    for index, (hash_a, hash_b) in enumerate(zip(chain(a, block_size), chain(b, block_size), strict=False)):
        num_tokens = (index + 1) * block_size
        assert (hash_a == hash_b) == (a[:num_tokens] == b[:num_tokens])


def test_a_hash_is_the_same_in_every_process() -> None:
    # Python's own hash of bytes or strings is not: ranks would disagree on what is cached.
    code = "from engine.scheduling.kv_cache import hash_block; print(hash_block(hash_block(b'', [1, 2]), [3, 2**40]).hex())"
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hash_block(hash_block(b"", [1, 2]), [3, 2**40]).hex()


@MANY
@given(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.lists(st.integers(0, 1), min_size=1, max_size=20))
def test_a_hit_is_the_longest_common_prefix_of_whole_blocks_without_the_last_token(first: list[int], second: list[int]) -> None:
    block_size = 3
    manager = BlockManager(16, block_size)
    holder = computed(manager, first)
    common = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    expected = min(common, len(second) - 1) // block_size
    assert manager.cached_prefix(sequence_of(second)) == holder.blocks[:expected]


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    manager = BlockManager(8, 2)
    holder = computed(manager, [1, 2, 3, 4])
    assert manager.cached_prefix(sequence_of([1, 2, 3, 4])) == holder.blocks[:1]
    assert manager.cached_prefix(sequence_of([1, 2, 3, 4, 5])) == holder.blocks


def test_free_blocks_keep_their_content_until_they_are_handed_out() -> None:
    manager = BlockManager(4, 2)
    first = computed(manager, [1, 2, 3, 4])
    blocks = list(first.blocks)
    manager.release(first)
    assert manager.num_free == 4
    again = computed(manager, [1, 2, 3, 4, 5])
    assert again.blocks[:2] == blocks
    manager.release(again)
    manager.release(computed(manager, [9] * 8))
    assert manager.cached_prefix(sequence_of([1, 2, 3, 4, 5])) == []


def test_a_prefix_outlives_its_tail() -> None:
    manager = BlockManager(4, 1)
    manager.release(computed(manager, [1, 2, 3, 4]))
    computed(manager, [8, 9])
    assert len(manager.cached_prefix(sequence_of([1, 2, 3, 4, 5]))) == 2


def test_blocks_are_handed_out_least_recently_freed_first() -> None:
    manager = BlockManager(3, 1, enable_prefix_caching=False)
    first, second, third = (computed(manager, [token]) for token in range(3))
    freed = [*second.blocks, *first.blocks, *third.blocks]
    for sequence in (second, first, third):
        manager.release(sequence)
    assert computed(manager, [5, 6, 7]).blocks == freed


def test_a_shared_free_block_counts_against_the_room() -> None:
    manager = BlockManager(3, 1)
    manager.release(computed(manager, [1, 2]))
    holder = computed(manager, [9])
    sequence = sequence_of([1, 2, 3])
    shared = manager.cached_prefix(sequence)
    assert len(shared) == 2
    assert not manager.can_hold(sequence, 4, shared)
    assert manager.can_hold(sequence, 2, shared)
    manager.release(holder)
    assert manager.can_hold(sequence, 3, shared)


def test_equal_content_computed_twice_is_known_once() -> None:
    manager = BlockManager(4, 2)
    first, second = sequence_of([1, 2]), sequence_of([1, 2])
    for sequence in (first, second):
        manager.grow(sequence, 2)
        sequence.num_computed = 2
    manager.register(first)
    manager.register(second)
    assert manager.cached_prefix(sequence_of([1, 2, 3])) == first.blocks
    manager.release(first)
    manager.check_integrity()
    computed(manager, [5, 6, 7, 8, 9, 9])
    manager.check_integrity()


def test_a_block_is_not_offered_before_its_tokens_are_known() -> None:
    manager = BlockManager(4, 2)
    sequence = sequence_of([1, 2, 3])
    manager.grow(sequence, 4)
    # The fourth token is computed, but in flight: the host can't name the block's content yet.
    sequence.num_in_flight, sequence.num_computed = 1, 4
    manager.register(sequence)
    assert len(manager.hash_of_block) == 1
    sequence.append(4)
    manager.register(sequence)
    assert len(manager.hash_of_block) == 2


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    manager = BlockManager(8, 2, enable_prefix_caching=False)
    computed(manager, [1, 2, 3, 4])
    assert manager.cached_prefix(sequence_of([1, 2, 3, 4, 5])) == []


def test_a_prefix_is_not_taken_by_a_sequence_that_holds_blocks() -> None:
    manager = BlockManager(4, 2)
    holder = computed(manager, [1, 2, 3])
    with pytest.raises(AssertionError, match="already holds"):
        manager.take_prefix(holder, [0])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_cache_needs_blocks_with_room(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks} and block_size={block_size}"):
        BlockManager(num_blocks, block_size)


def lose_a_block(manager: BlockManager) -> None:
    manager.free.popitem()


def free_a_held_block(manager: BlockManager) -> None:
    manager.free[manager.ref_counts.index(1)] = None


def hold_too_little(manager: BlockManager) -> None:
    manager.ref_counts[next(iter(manager.free))] -= 1


def mix_up_the_prefix_cache(manager: BlockManager) -> None:
    manager.block_of_hash[next(iter(manager.block_of_hash))] = 3


@pytest.mark.parametrize("fault", [lose_a_block, free_a_held_block, hold_too_little, mix_up_the_prefix_cache])
def test_the_integrity_check_notices(fault) -> None:  # type: ignore[no-untyped-def]
    manager = BlockManager(4, 2)
    computed(manager, [1, 2, 3])
    manager.check_integrity()
    fault(manager)
    with pytest.raises(AssertionError):
        manager.check_integrity()


class BlocksComeAndGo(RuleBasedStateMachine):
    """The block manager alone against a list of what each sequence holds."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3), caching=st.booleans())
    def start(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.held: list[Sequence] = []
        self.content: dict[int, list[int]] = {}
        """All tokens up to a block's end, as last written into it."""

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def run(self, token_ids: list[int]) -> None:
        manager, sequence = self.manager, sequence_of(token_ids)
        shared = manager.cached_prefix(sequence)
        for index, block in enumerate(shared):
            assert self.content[block] == token_ids[: (index + 1) * manager.block_size]
        if not manager.can_hold(sequence, len(token_ids), shared):
            return
        before = manager.num_free
        manager.take_prefix(sequence, shared)
        manager.grow(sequence, len(token_ids))
        sequence.num_computed = len(token_ids)
        manager.register(sequence)
        assert before - manager.num_free <= len(sequence.blocks) == -(-len(token_ids) // manager.block_size)
        for index, block in enumerate(sequence.blocks[len(shared) :], start=len(shared)):
            self.content[block] = token_ids[: (index + 1) * manager.block_size]
        self.held.append(sequence)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.manager.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        self.manager.check_integrity()
        holders = [block for sequence in self.held for block in sequence.blocks]
        assert self.manager.ref_counts == [holders.count(block) for block in range(self.manager.num_blocks)]

    @invariant()
    def nobodys_content_was_written_over(self) -> None:
        for sequence in self.held:
            for index, block in enumerate(sequence.blocks):
                assert self.content[block] == sequence.token_ids[: (index + 1) * self.manager.block_size]


TestBlocksComeAndGo = BlocksComeAndGo.TestCase
TestBlocksComeAndGo.settings = settings(MANY, max_examples=40)

"""The KV check sees what goes wrong in the scheduler, the block manager and the size of the cache, and nothing elsewhere."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import engine.scheduling.kv_cache as kv_cache
from engine.scheduling.kv_cache import ROOT_HASH, BlockManager
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import Sequence
from harness.checks.base import from_json
from harness.checks.kv import KVCase, draw_cases
from harness.faults.layouts import LAYOUTS
from harness.subjects.engine_rank import EngineRank
from tests.harness.checking import again, assert_green, run_check
from tests.harness.conftest import MakeModel

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    return tiny_model(LAYOUTS["qwen2"].config)


@pytest.mark.parametrize("seed", range(3))
def test_the_engine_is_green(folder: Path, seed: int) -> None:
    assert_green(run_check("kv", folder, seed=seed))


def blocks_freed_while_another_holds_them(patch: pytest.MonkeyPatch) -> None:
    def release(self: BlockManager, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):
            self.ref_counts[block] = 0
            self.free[block] = None
        sequence.blocks.clear()
        sequence.num_registered = 0

    patch.setattr(BlockManager, "release", release)


def blocks_of_a_shared_prefix_never_given_back(patch: pytest.MonkeyPatch) -> None:
    take_prefix = BlockManager.take_prefix

    def take_twice(self: BlockManager, sequence: Sequence, blocks: list[int]) -> None:
        take_prefix(self, sequence, blocks)
        for block in blocks:
            self.ref_counts[block] += 1

    patch.setattr(BlockManager, "take_prefix", take_twice)


def hash_of_a_block_alone(patch: pytest.MonkeyPatch) -> None:
    hash_block = kv_cache.hash_block
    patch.setattr(kv_cache, "hash_block", lambda parent, token_ids: hash_block(ROOT_HASH, token_ids))


def blocks_of_others_kept_in_the_prefix_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_forget", lambda self, block: None)


def last_token_counts_as_cached(patch: pytest.MonkeyPatch) -> None:
    def cached_prefix(self: BlockManager, sequence: Sequence) -> list[int]:
        if not self.enable_prefix_caching:
            return []
        self._hash_known_blocks(sequence)
        blocks: list[int] = []
        for block_hash in sequence.block_hashes:
            if block_hash not in self.block_of_hash:
                break
            blocks.append(self.block_of_hash[block_hash])
        return blocks

    patch.setattr(BlockManager, "cached_prefix", cached_prefix)


def room_for_one_block_less_is_enough(patch: pytest.MonkeyPatch) -> None:
    can_hold = BlockManager.can_hold
    patch.setattr(BlockManager, "can_hold", lambda self, sequence, num_tokens, shared=None: can_hold(
        self, sequence, num_tokens - self.block_size, shared))


def preempted_sequences_keep_one_token(patch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def give_way(self: Scheduler, sequence: Sequence) -> None:
        preempt(self, sequence)
        sequence.token_ids = sequence.token_ids[: sequence.num_prompt_tokens + 1]

    patch.setattr(Scheduler, "_preempt", give_way)


def chunks_sample_before_their_end(patch: pytest.MonkeyPatch) -> None:
    take = Scheduler._take

    def sampling(self: Scheduler, sequence: Sequence, num_tokens: int) -> Chunk:
        chunk = take(self, sequence, num_tokens)
        if not chunk.samples and sequence.num_computed > sequence.num_prompt_tokens:
            sequence.num_in_flight += 1
            return chunk._replace(samples=True)
        return chunk

    patch.setattr(Scheduler, "_take", sampling)


@pytest.mark.parametrize("plant", [
    blocks_freed_while_another_holds_them, blocks_of_a_shared_prefix_never_given_back, hash_of_a_block_alone,
    blocks_of_others_kept_in_the_prefix_cache, last_token_counts_as_cached, room_for_one_block_less_is_enough,
    preempted_sequences_keep_one_token, chunks_sample_before_their_end,
])
def test_a_fault_in_the_bookkeeping_is_seen_and_can_be_replayed(folder: Path, plant: Plant,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch)
        outcome = run_check("kv", folder)
        found_again = again("kv", folder, outcome)
    assert outcome.module == "scheduler and block manager"
    assert found_again.finding is not None
    assert found_again.case == outcome.case
    assert_green(again("kv", folder, outcome))


def test_ranks_that_take_different_steps_are_the_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread asks second finds no prefix: one rank recomputes what the other shares."""
    cached_prefix, asked = BlockManager.cached_prefix, set[tuple[int, ...]]()

    def first_come(self: BlockManager, sequence: Sequence) -> list[int]:
        found = cached_prefix(self, sequence)
        key = (sequence.request.request_id, *sequence.token_ids)
        if found and key not in asked:
            asked.add(key)
            return []
        return found

    monkeypatch.setattr(BlockManager, "cached_prefix", first_come)
    outcome = run_check("kv", folder)
    assert outcome.finding is not None
    assert "than on rank 0" in outcome.finding


def test_a_cache_that_is_smaller_than_its_bookkeeping_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = EngineRank.load

    def load_and_lie(self: EngineRank, folder: Path, **how: Any) -> None:
        load(self, folder, **how)
        self.num_blocks += self.tp_rank

    monkeypatch.setattr(EngineRank, "load", load_and_lie)
    outcome = run_check("kv", folder)
    assert (outcome.module, outcome.rank) == ("cache", 1)


def test_schedules_come_under_pressure_and_repeat_prompts() -> None:
    cases = draw_cases(random.Random(0), 200)
    crowded = [case for case in cases if sum(-(-(len(prompt) + count) // case.block_size) for _, prompt, count in case.requests)
               > case.num_blocks]
    assert len(crowded) > 100
    prompts = [[prompt for _, prompt, _ in case.requests if len(prompt) % case.block_size == 0] for case in cases]
    assert sum(len(set(whole)) < len(whole) for whole in prompts) > 20
    assert all(from_json(KVCase, json.loads(json.dumps(asdict(case)))) == case for case in cases)

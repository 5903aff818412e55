"""Faults around the KV cache: where keys and values are written, whose blocks are read, who counts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import engine.execution.runner as runner_module
import engine.layers.attention as attention_module
import engine.scheduling.kv_cache as kv_cache_module
from engine.execution.runner import Runner
from engine.layers.attention_backends import TorchBackend
from engine.layers.attention_layout import LayerCache
from engine.parallel.group import TPGroup
from engine.scheduling.batch import StepBatch
from engine.scheduling.kv_cache import ROOT_HASH, BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from harness.faults.base import Patches, around, fault
from harness.faults.layers import BEFORE_O_PROJ


@fault(rows=(27,), layout="qwen2", checks=("logits",), module=BEFORE_O_PROJ)
def blocks_overlap(patch: Patches, tp: TPGroup) -> None:
    """A block's stride is computed from the wrong number of heads: half of each block lies in the next one."""

    def overlapping(cache: Tensor) -> Tensor:
        num_heads, block_size, head_dim = cache.shape[1:]
        strides = (-(-num_heads // tp.size) * block_size * head_dim, block_size * head_dim, head_dim, 1)
        return torch.empty_like(cache, memory_format=torch.contiguous_format).as_strided(cache.shape, strides)

    @patch.around(runner_module, "allocate_cache")
    def allocate_cache(original: Any, *arguments: Any, **options: Any) -> list[LayerCache]:
        return [LayerCache(overlapping(cache.k_PNBH), overlapping(cache.v_PNBH)) for cache in original(*arguments, **options)]


def _before_the_write(patch: Patches, change: Any) -> None:
    """``change(positions_T, slots_T, block_size)`` gives the positions and slots with which keys and values are written."""

    @patch.around(attention_module, "rope_store_kv_torch")
    def rope_store_kv(original: Any, qkv_TC: Tensor, positions_T: Tensor, cos: Tensor, sin: Tensor, k_PNBH: Tensor,
                      v_PNBH: Tensor, slots_T: Tensor, **norms: Any) -> Any:
        positions_T, slots_T = change(positions_T, slots_T, k_PNBH.shape[2])
        return original(qkv_TC, positions_T, cos, sin, k_PNBH, v_PNBH, slots_T, **norms)


@fault(rows=(27,), checks=("logits",), module=BEFORE_O_PROJ)
def last_slot_of_a_block_missed(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 takes blocks to be one token shorter: the last token of each goes where the one before it is."""
    if tp.rank == 1:
        _before_the_write(patch, lambda positions_T, slots_T, block_size: (
            positions_T, slots_T - (slots_T % block_size == block_size - 1).long()))


@fault(checks=("logits",), module=BEFORE_O_PROJ)
def positions_counted_in_the_step(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 rotates queries and keys by their place in the step, not in their sequence: right for one prompt alone."""
    if tp.rank == 1:
        _before_the_write(patch, lambda positions_T, slots_T, block_size: (torch.arange(len(positions_T)), slots_T))


@fault(checks=("attention", "logits"), module=BEFORE_O_PROJ)
def blocks_of_another_sequence(patch: Patches, tp: TPGroup) -> None:
    """With two sequences or more in a step, rank 1 reads each one's neighbour's blocks."""

    @patch.around(TorchBackend, "__call__")
    def call(original: Any, self: TorchBackend, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Any:
        if tp.rank == 1:
            batch = replace(batch, block_tables_SB=batch.block_tables_SB.roll(1, 0))
        return original(self, q_TQH, cache, batch)


@fault(rows=(73,), checks=("kv",))
@around(Runner, "make_cache")
def cache_sized_by_each_rank(original: Any, self: Runner) -> int:
    """Every rank has the blocks that its own memory allows, and rank 1 has less of it."""
    if self.tp.rank == 1 and self.config.num_kv_blocks is not None and self.config.num_kv_blocks > 1:
        self.config = replace(self.config, num_kv_blocks=self.config.num_kv_blocks - 1)
    self.tp.all_reduce_min = lambda value: value  # type: ignore[method-assign]  # of this one group
    try:
        num_blocks: int = original(self)
    finally:
        del self.tp.all_reduce_min
    return num_blocks


@fault(rows=(74,), checks=("kv",))
def prefix_found_on_one_rank_alone(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 looks a prefix up under another hash, never finds it, and computes what the others skip."""
    if tp.rank == 1:
        patch.replace(BlockManager, "cached_prefix", lambda original: lambda self, sequence: [])


@fault(rows=(74,), checks=("kv",))
def prefix_hash_without_what_came_before(patch: Patches, tp: TPGroup) -> None:
    """A block's hash covers its own tokens alone: the same words after another beginning are taken for a hit."""
    patch.replace(kv_cache_module, "hash_block", lambda original: lambda parent, token_ids: original(ROOT_HASH, token_ids))


@fault(rows=(76,), checks=("kv",))
def preempted_tokens_forgotten(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 starts a preempted sequence over from its prompt: the tokens drawn before are not sent again."""
    if tp.rank == 1:
        @patch.around(Scheduler, "_preempt")
        def preempt(original: Any, self: Scheduler, sequence: Sequence) -> None:
            original(self, sequence)
            del sequence.token_ids[sequence.num_prompt_tokens :]

"""What serving workloads need of a CPU's memory, estimated before they start: the system kills who takes too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from engine.config import ModelConfig
from engine.parallel.sharding import head_shard
from harness.bench.bounds import kv_bytes_per_token, num_parameters
from harness.bench.engines import LARGEST_BATCH, OWN, REFERENCE
from harness.bench.workloads import GenerateWork, Requests, Work

GIB = 2**30
_PROCESS_BYTES = 0.4 * GIB
"""An interpreter with torch in it: one for each engine, and one for each of several ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of engines that run one model. All of them live at once: they take turns, round by round."""

    config: ModelConfig
    itemsize: int

    def own(self, requests: Requests, tp_size: int, max_num_batched_tokens: int) -> float:
        """Of our engine, all ranks together: weights, a cache that holds all requests, one step's values."""
        config = self.config
        num_kv_heads = sum(head_shard(config.num_q_heads, config.num_kv_heads, tp_rank=rank, tp_size=tp_size).local_num_kv_heads
                           for rank in range(tp_size))
        num_prompt_tokens = sum(len(prompt) for prompt, _ in requests)
        cache = num_tokens(requests) * kv_bytes_per_token(config, self.itemsize, num_kv_heads)
        processes = 1 if tp_size == 1 else 1 + tp_size
        return (self._weights + cache + processes * _PROCESS_BYTES
                + tp_size * self._values(min(num_prompt_tokens, max_num_batched_tokens)))

    def reference(self, requests: Requests) -> float:
        """Of transformers' ``generate``, which computes the prompts of a whole batch at once, padded to the longest."""
        is_even = len({(len(prompt), count) for prompt, count in requests}) == 1
        batch_size = len(requests) if is_even else min(len(requests), LARGEST_BATCH)
        prompt_len, output_len = max(len(prompt) for prompt, _ in requests), max(count for _, count in requests)
        cache = batch_size * (prompt_len + output_len) * kv_bytes_per_token(self.config, self.itemsize)
        return self._weights + cache * (1 + 1 / self.config.num_layers) + self._values(batch_size * prompt_len) + _PROCESS_BYTES

    @property
    def _weights(self) -> float:
        return num_parameters(self.config) * self.itemsize

    def _values(self, num_tokens: int) -> float:
        # Of one layer at its widest: the residual stream and its norm, and gate, up and their product.
        return num_tokens * (4 * self.config.hidden_size + 3 * self.config.intermediate_size) * self.itemsize


def num_tokens(requests: Requests) -> int:
    """Prompts and answers together."""
    return sum(len(prompt) + count for prompt, count in requests)


def too_large(memory: Memory, works: Sequence[GenerateWork], peers_of: Callable[[GenerateWork], Sequence[str]], *,
              tp_sizes: Sequence[int], num_sides: int) -> dict[Work, str]:
    """Works that don't fit into the memory that is free, and why. Those that do, do so together.

    Args:
        memory: what engines hold of this model, in bytes.
        works: to be run one after the other.
        peers_of: the engines that run a case beside our own.
        tp_sizes: of our own engine.
        num_sides: checkouts that take turns.
    """
    available = float(psutil.virtual_memory().available)
    largest: dict[str, float] = {}  # an engine goes on from case to case
    refused: dict[Work, str] = {}
    for work, requests in sorted(((work, work.draw()) for work in works), key=lambda item: num_tokens(item[1])):
        needs = {f"{OWN} tp {size}": num_sides * memory.own(requests, size, work.limits.max_num_batched_tokens)
                 for size in tp_sizes}
        needs |= {REFERENCE: memory.reference(requests)} if REFERENCE in peers_of(work) else {}
        together = {name: max(needs.get(name, 0.0), largest.get(name, 0.0)) for name in (*needs, *largest)}
        if (needed := sum(together.values())) <= available:
            largest = together
        else:
            listed = ", ".join(f"{name} {each / GIB:.1f}" for name, each in together.items())
            refused[work] = (
                f"needs about {needed / GIB:.1f} GiB of memory ({listed}), and {available / GIB:.1f} GiB are free: name fewer "
                "tp_sizes or peers, or a smaller dtype")
    return refused

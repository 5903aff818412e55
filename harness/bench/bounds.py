"""What the hardware could do at best, from ceilings that were measured in the same run.

A step of a decoder reads every weight once and the keys and values of every sequence once, or multiplies every token with
every weight, whichever takes longer; with several ranks each does its share, and two all-reduces a layer come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """That a step reads: all but norms, and an input embedding with an LM head of its own beside it."""
    attention = 2 * config.head_dim * (config.num_q_heads + config.num_kv_heads)
    return config.hidden_size * (config.num_layers * (attention + 3 * config.intermediate_size) + config.vocab_size)


def kv_bytes_per_token(config: ModelConfig, itemsize: int, num_kv_heads: int | None = None) -> int:
    """Bytes of one token's keys and values in all layers. ``num_kv_heads``: on all ranks together, if some are on several."""
    return 2 * config.num_layers * (num_kv_heads or config.num_kv_heads) * config.head_dim * itemsize


def all_reduce_bytes(message_bytes: int, tp_size: int) -> float:
    """Bytes that each rank must send for an all-reduce (Patarasuk and Yuan 2009)."""
    return 2 * (tp_size - 1) / tp_size * message_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The least seconds that a model's steps can take.

    copy_bytes_per_s    read and written bytes of a large copy, on one rank's device
    matmul_flop_per_s   of a large matrix product in the dtype under test
    all_reduce_s        what one small all-reduce takes at the least; 0 where nothing is known
    """

    config: ModelConfig
    itemsize: int
    tp_size: int
    copy_bytes_per_s: float
    matmul_flop_per_s: float
    all_reduce_s: float = 0.0

    def decode_step_s(self, *, batch_size: float, context: float) -> float:
        """A step in which each of ``batch_size`` sequences of ``context`` tokens gets one more."""
        cache_bytes = batch_size * context * kv_bytes_per_token(self.config, self.itemsize)
        weights_s = self._weights_s(flop=2 * num_parameters(self.config) * batch_size)
        return self._over_ranks(weights_s + cache_bytes / self.copy_bytes_per_s)

    def prefill_s(self, prompt_lens: Sequence[int]) -> float:
        """These prompts together: every weight for every token, causal attention, one row of logits each."""
        head = self.config.vocab_size * self.config.hidden_size
        pair_flop = 4 * self.config.num_layers * self.config.num_q_heads * self.config.head_dim  # of a query and a key
        flop: float = 2 * (num_parameters(self.config) - head) * sum(prompt_lens) + 2 * head * len(prompt_lens)
        flop += pair_flop * sum(length * (length + 1) / 2 for length in prompt_lens)
        return self._over_ranks(self._weights_s(flop=flop))

    def generate_s(self, prompt_lens: Sequence[int], output_lens: Sequence[int]) -> float:
        """These requests, all there from the start and all running at once: one prefill, then decode steps."""
        total = self.prefill_s(prompt_lens)
        for step in range(1, max(output_lens)):
            contexts = [prompt + step for prompt, output in zip(prompt_lens, output_lens, strict=True) if output > step]
            total += self.decode_step_s(batch_size=len(contexts), context=sum(contexts) / len(contexts))
        return total

    def _weights_s(self, *, flop: float) -> float:
        return max(num_parameters(self.config) * self.itemsize / self.copy_bytes_per_s, flop / self.matmul_flop_per_s)

    def _over_ranks(self, seconds: float) -> float:
        return seconds / self.tp_size + (2 * self.config.num_layers * self.all_reduce_s if self.tp_size > 1 else 0.0)

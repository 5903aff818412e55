"""What the hardware could do at best, from ceilings that were measured in the same run.

A step of a decoder reads every weight once and the keys and values of every sequence once, or multiplies every token with
every weight, whichever takes longer; with several ranks each does its share, and two all-reduces a layer come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Of one rank's device.

    copy_bytes_per_s    read and written bytes of a large copy
    matmul_flop_per_s   of a large matrix product in the dtype under test
    all_reduce_s        what one small all-reduce takes at the least; 0 where nothing is known
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: float
    all_reduce_s: float = 0.0

    def seconds(self, *, num_bytes: float, flop: float = 0.0) -> float:
        """The least that work of this size can take."""
        return max(num_bytes / self.copy_bytes_per_s, flop / self.matmul_flop_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a step of a model costs.

    num_parameters        that a step reads: all but an input embedding with an LM head of its own beside it
    head_parameters       those of them in the LM head, which prefill needs for each prompt's last token only
    kv_bytes_per_token    of keys and values, all layers
    attention_flop        per pair of a query and a key, all layers
    """

    num_parameters: int
    head_parameters: int
    itemsize: int
    kv_bytes_per_token: int
    attention_flop: int
    num_layers: int

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int) -> ModelSize:
        hidden, head_dim = config.hidden_size, config.head_dim
        attention = hidden * head_dim * 2 * (config.num_q_heads + config.num_kv_heads)
        per_layer = attention + 3 * hidden * config.intermediate_size
        return cls(
            num_parameters=config.num_layers * per_layer + config.vocab_size * hidden,
            head_parameters=config.vocab_size * hidden,
            itemsize=itemsize,
            kv_bytes_per_token=2 * config.num_layers * config.num_kv_heads * head_dim * itemsize,
            attention_flop=4 * config.num_layers * config.num_q_heads * head_dim,
            num_layers=config.num_layers,
        )


def decode_step_s(size: ModelSize, ceilings: Ceilings, *, batch_size: float, context: float, tp_size: int) -> float:
    """Seconds of a step in which each of ``batch_size`` sequences of ``context`` tokens gets one more."""
    weights = ceilings.seconds(num_bytes=size.num_parameters * size.itemsize, flop=2 * size.num_parameters * batch_size)
    cache = ceilings.seconds(num_bytes=batch_size * context * size.kv_bytes_per_token)
    return (weights + cache) / tp_size + _all_reduces_s(size, ceilings, tp_size)


def prefill_s(size: ModelSize, ceilings: Ceilings, *, prompt_lens: Sequence[int], tp_size: int) -> float:
    """Seconds to compute these prompts together: every weight for every token, causal attention, one row of logits each."""
    flop: float = 2 * (size.num_parameters - size.head_parameters) * sum(prompt_lens)
    flop += 2 * size.head_parameters * len(prompt_lens)
    flop += size.attention_flop * sum(length * (length + 1) / 2 for length in prompt_lens)
    least = ceilings.seconds(num_bytes=size.num_parameters * size.itemsize, flop=flop)
    return least / tp_size + _all_reduces_s(size, ceilings, tp_size)


def generate_s(size: ModelSize, ceilings: Ceilings, *, prompt_lens: Sequence[int], output_lens: Sequence[int],
               tp_size: int) -> float:
    """Seconds to serve these requests, all there from the start and all running at once: one prefill, then decode steps."""
    total = prefill_s(size, ceilings, prompt_lens=prompt_lens, tp_size=tp_size)
    for step in range(1, max(output_lens)):
        contexts = [prompt + step for prompt, output in zip(prompt_lens, output_lens, strict=True) if output > step]
        total += decode_step_s(size, ceilings, batch_size=len(contexts), context=sum(contexts) / len(contexts), tp_size=tp_size)
    return total


def all_reduce_bytes(message_bytes: int, tp_size: int) -> float:
    """Bytes that each rank must send for an all-reduce (Patarasuk and Yuan 2009)."""
    return 2 * (tp_size - 1) / tp_size * message_bytes


def _all_reduces_s(size: ModelSize, ceilings: Ceilings, tp_size: int) -> float:
    return 2 * size.num_layers * ceilings.all_reduce_s if tp_size > 1 else 0.0

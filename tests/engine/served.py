"""The small model that talks, served on some ranks, and looks at what it gives and holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, CompletionOutput, RequestOutput, SamplingParams
from engine.ranks.ranks import RankContext

MakeLLM = Callable[[int], LLM]

PROMPTS = [[8, 9, 10, 8, 9, 10, 7, 11, 12, 0], [7, 10, 7], [9], [8, 9, 10, 8, 9, 10, 7, 11, 12, 0]]
SAMPLED = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
STREAMED = {
    "greedy": SamplingParams(temperature=0, max_tokens=30),
    "sampled": SAMPLED,
    "several": SamplingParams(n=3, seed=5, max_tokens=30, logprobs=2),
    "stop strings": SamplingParams(n=2, seed=5, max_tokens=40, stop=["a b", "cab", " c" * 8], ignore_eos=True),
    "stop strings kept": SamplingParams(seed=7, max_tokens=40, min_tokens=9, stop=["漢", "b\ufffd"],
                                        include_stop_str_in_output=True),
    "stop tokens": SamplingParams(seed=8, max_tokens=40, stop_token_ids=[12], logprobs=0, ignore_eos=True),
    "special tokens": SamplingParams(seed=9, max_tokens=20, skip_special_tokens=False, ignore_eos=True),
}
BOTH = pytest.mark.parametrize("tp_size", [1, 2])


def open_llm(folder: Path, tp_size: int, **options: Any) -> LLM:
    options = {"fabric": "threads" if tp_size > 1 else "solo", "num_kv_blocks": 200, "max_num_seqs": 16} | options
    return LLM(folder, tensor_parallel_size=tp_size, device="cpu", dtype="float32", block_size=4, **options)


def count_blocks(rank: RankContext) -> int:
    """Job: blocks of the rank's cache that some sequence holds."""
    blocks = rank.state["core"].scheduler.blocks
    return int(blocks.num_blocks - blocks.num_free)


def count_sequences(rank: RankContext) -> int:
    """Job: sequences that run or wait on the rank."""
    scheduler = rank.state["core"].scheduler
    return len(scheduler.running) + len(scheduler.waiting)


def blocks_in_use(llm: LLM) -> list[int]:
    return llm._ranks.run(count_blocks)


def plain(outputs: Sequence[RequestOutput]) -> list[list[CompletionOutput]]:
    """The completions of each prompt: all of what a request gives but its number and counts."""
    return [output.outputs for output in outputs]


def joined(items: Sequence[RequestOutput]) -> list[list[CompletionOutput]]:
    """What a stream's items make up, by prompt; checks what each says of itself."""
    whole: dict[int, dict[int, CompletionOutput]] = {}
    for item in items:
        completions = whole.setdefault(item.request_id, {})
        assert item.outputs, "an item with nothing new"
        for delta in item.outputs:
            completion = completions.setdefault(delta.index, CompletionOutput(index=delta.index))
            assert completion.finish_reason is None, "something came after the end"
            assert delta.text or delta.finish_reason, "an item with nothing new"
            completion.text += delta.text
            completion.token_ids += delta.token_ids
            if delta.logprobs is not None:
                completion.logprobs = (completion.logprobs or []) + delta.logprobs
            completion.cumulative_logprob = delta.cumulative_logprob
            completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        ended = all(completion.finish_reason for completion in completions.values())
        assert not item.finished or ended
        known = sum(len(completion.token_ids) for completion in completions.values())
        assert item.num_generated_tokens >= known
    return [[completions[index] for index in sorted(completions)] for _, completions in sorted(whole.items())]

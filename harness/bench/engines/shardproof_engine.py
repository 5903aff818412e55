"""The engine of this project, through its public interface."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from engine import LLM, SamplingParams
from engine.ranks.ranks import RankContext
from harness.bench.engines import EngineSpec
from harness.bench.figures import Answered, TokenTimes
from harness.bench.workloads import Requests


class ShardproofEngine:
    """``LLM``, with no more cache than the workload needs."""

    tp_invariant = False

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        block_size = 256 if spec.device == "cuda" else 16
        num_blocks = sum(-(-length // block_size) for length in spec.sequence_lens)
        self._llm = LLM(
            folder, tensor_parallel_size=spec.tp_size, fabric=spec.fabric, device=spec.device, dtype=spec.dtype,
            max_model_len=spec.limits.max_model_len, max_num_seqs=spec.limits.max_num_seqs,
            max_num_batched_tokens=spec.limits.max_num_batched_tokens, block_size=block_size,
            # What the workload needs and no more: engines that share a GPU must all find room.
            num_kv_blocks=max(num_blocks + 1, -(-spec.limits.max_model_len // block_size)), enable_prefix_caching=False,
            tp_invariant=self.tp_invariant,
        )
        self.fabric = self._llm._ranks.fabric

    def generate(self, requests: Requests, temperature: float) -> Answered:
        prompts, params = _split(requests, temperature)
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Answered(seconds=seconds, num_tokens=[len(output.outputs[0].token_ids) for output in outputs])

    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        prompts, params = _split(requests, temperature)
        times: list[list[float]] = [[] for _ in requests]
        started = time.perf_counter()
        stream = self._llm.stream(prompts, params)
        numbers = {request_id: number for number, request_id in enumerate(stream.request_ids)}
        for item in stream:
            now = time.perf_counter() - started
            times[numbers[item.request_id]].extend([now] * len(item.outputs[0].token_ids))
        return times

    def peak_device_bytes(self) -> int | None:
        held: list[int] = self._llm._ranks.run(_reserved_bytes)
        return sum(held)

    def close(self) -> None:
        self._llm.close()


class InvariantEngine(ShardproofEngine):
    """The same in the mode that gives equal bits at any tp_size: what those cost."""

    tp_invariant = True


def _split(requests: Requests, temperature: float) -> tuple[list[list[int]], list[SamplingParams]]:
    params = [SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True) for _, num_tokens in requests]
    return [prompt for prompt, _ in requests], params


def _reserved_bytes(rank: RankContext) -> int:
    """Job: what this rank's allocator has held at most."""
    return torch.cuda.max_memory_reserved(rank.device)

"""vLLM, through its offline interface."""

from __future__ import annotations

import importlib
import itertools
import time
from pathlib import Path
from typing import Any

from engine.config import DTYPES, ModelConfig
from engine.parallel.sharding import head_shard
from harness.bench.bounds import kv_bytes_per_token
from harness.bench.engines import EngineSpec
from harness.bench.figures import Answered, TokenTimes
from harness.bench.workloads import Requests

_BLOCK = 64
"""Tokens by which a sequence's room is rounded up: its own blocks are smaller, or as large."""
_LEAST_FREE = 0.01
"""Share of a GPU that must be free when it starts. It sizes nothing where the cache's bytes are given."""


class VllmEngine:
    """vLLM with token ids in and out: no tokenizer, no prefix caching."""

    fabric = "own"

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        self._names = itertools.count()
        self._llm = self._vllm.LLM(
            str(folder), skip_tokenizer_init=True, tensor_parallel_size=spec.tp_size, dtype=spec.dtype,
            max_model_len=spec.limits.max_model_len, max_num_seqs=spec.limits.max_num_seqs,
            max_num_batched_tokens=spec.limits.max_num_batched_tokens, enable_prefix_caching=False,
            kv_cache_memory_bytes=cache_bytes(spec), gpu_memory_utilization=_LEAST_FREE,
        )

    def generate(self, requests: Requests, temperature: float) -> Answered:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [self._params(num_tokens, temperature) for _, num_tokens in requests]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Answered(seconds=seconds, num_tokens=[len(output.outputs[0].token_ids) for output in outputs])

    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        engine = self._llm.llm_engine
        times: dict[str, list[float]] = {}
        started = time.perf_counter()
        for prompt, num_tokens in requests:
            name = f"stream-{next(self._names)}"
            times[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, self._params(num_tokens, temperature))
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                stamps = times[output.request_id]
                stamps.extend([now] * (len(output.outputs[0].token_ids) - len(stamps)))
        return list(times.values())

    def _params(self, num_tokens: int, temperature: float) -> Any:
        return self._vllm.SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True, detokenize=False)

    def peak_device_bytes(self) -> int | None:
        return None  # it lives in processes of its own

    def close(self) -> None:
        del self._llm


def cache_bytes(spec: EngineSpec) -> int:
    """Of one rank's cache: what the workload needs and no more, as ours is given.

    Engines that share a GPU must all find room, and one that looks how much is free while others start finds chance.
    """
    config = ModelConfig.from_folder(spec.folder)
    num_kv_heads = head_shard(config.num_q_heads, config.num_kv_heads, tp_rank=0, tp_size=spec.tp_size).local_num_kv_heads
    lengths = [*spec.sequence_lens, _BLOCK]  # one block stays empty
    num_tokens = max(sum(-(-length // _BLOCK) for length in lengths) * _BLOCK, spec.limits.max_model_len + _BLOCK)
    return num_tokens * kv_bytes_per_token(config, DTYPES[spec.dtype].itemsize, num_kv_heads)

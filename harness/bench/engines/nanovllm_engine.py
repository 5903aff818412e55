"""nano-vllm. It insists on a tokenizer, which token ids don't need: it gets one that knows nothing."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import torch

from harness.bench.engines import EngineSpec
from harness.bench.figures import Answered, TokenTimes
from harness.bench.workloads import Requests


class _NoTokenizer:
    eos_token_id = -1

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> _NoTokenizer:
        return cls()

    def decode(self, token_ids: Any) -> str:
        return ""


class NanoVllmEngine:
    """nano-vllm, one process a rank of its own."""

    fabric = "own"

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        self._nanovllm: Any = importlib.import_module("nanovllm")
        llm_engine: Any = importlib.import_module("nanovllm.engine.llm_engine")
        llm_engine.AutoTokenizer = _NoTokenizer
        # Its share counts what other processes hold, too.
        free, total = torch.cuda.mem_get_info()
        self._llm = self._nanovllm.LLM(
            str(folder), tensor_parallel_size=spec.tp_size, max_model_len=spec.limits.max_model_len,
            max_num_seqs=spec.limits.max_num_seqs,
            max_num_batched_tokens=max(spec.limits.max_num_batched_tokens, spec.limits.max_model_len),
            gpu_memory_utilization=min(0.95, 1 - free / total + spec.memory_share),
        )

    def generate(self, requests: Requests, temperature: float) -> Answered:
        prompts, params = [prompt for prompt, _ in requests], [self._params(n, temperature) for _, n in requests]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Answered(seconds=seconds, num_tokens=[len(output["token_ids"]) for output in outputs])

    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        started = time.perf_counter()
        for prompt, num_tokens in requests:
            self._llm.add_request(prompt, self._params(num_tokens, temperature))
        sequences = list(self._llm.scheduler.waiting)
        times: list[list[float]] = [[] for _ in sequences]
        while not self._llm.is_finished():
            self._llm.step()
            now = time.perf_counter() - started
            for stamps, sequence in zip(times, sequences, strict=True):
                stamps.extend([now] * (sequence.num_completion_tokens - len(stamps)))
        return times

    def _params(self, num_tokens: int, temperature: float) -> Any:
        return self._nanovllm.SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True)

    def peak_device_bytes(self) -> int | None:
        return None  # its other ranks are processes of their own

    def close(self) -> None:
        self._llm.exit()

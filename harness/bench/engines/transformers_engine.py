"""Hugging Face transformers: ``generate`` on padded batches, and its continuous batching."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from harness.bench.engines import LARGEST_BATCH, EngineSpec
from harness.bench.figures import Answered, TokenTimes
from harness.bench.workloads import Requests


class _TransformersEngine:
    """A model on one device."""

    fabric = "own"

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        self._device = torch.device(spec.device)
        self._limits = spec.limits
        self._memory_share = spec.memory_share
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa", local_files_only=True
        ).to(self._device).eval()
        # What a call leaves out is taken from here: the checkpoint's end-of-sequence tokens, penalties and the like.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Requests, temperature: float) -> Answered:
        times = self.stream(requests, temperature)
        return Answered(seconds=max(stamps[-1] for stamps in times if stamps), num_tokens=[len(stamps) for stamps in times])

    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        raise NotImplementedError

    def peak_device_bytes(self) -> int | None:
        return torch.cuda.max_memory_reserved(self._device)

    def close(self) -> None:
        del self._model


class GenerateEngine(_TransformersEngine):
    """``model.generate`` on left-padded batches. Padding is computed and not counted."""

    @torch.inference_mode()
    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        started = time.perf_counter()
        times: list[list[float]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda number: (requests[number][1], len(requests[number][0])))
        is_even = len({(len(prompt), num_tokens) for prompt, num_tokens in requests}) == 1
        size = len(requests) if is_even else LARGEST_BATCH
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            stamps = self._run([requests[number] for number in batch], temperature, started)
            for number in batch:
                times[number] = stamps[: requests[number][1]]
        return times

    def _run(self, requests: Requests, temperature: float, started: float) -> list[float]:
        """When each request of the batch got its tokens: as nothing ends one by itself, all get theirs in the same steps."""
        longest = max(len(prompt) for prompt, _ in requests)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt, _ in requests]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in requests]
        stamps = _Stamps(started, self._device)
        config = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, eos_token_id=None,
                                  pad_token_id=0, max_new_tokens=max(num_tokens for _, num_tokens in requests))
        answer = self._model.generate(input_ids=torch.tensor(padded, device=self._device), generation_config=config,
                                      attention_mask=torch.tensor(mask, device=self._device),
                                      stopping_criteria=StoppingCriteriaList([stamps]))
        return stamps.times[: answer.shape[1] - longest]


class _Stamps(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Stops nothing: it is asked after every token, and notes the time."""

    def __init__(self, started: float, device: torch.device) -> None:
        self.times: list[float] = []
        self._started = started
        self._device = device

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter() - self._started)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class ContinuousBatchingEngine(_TransformersEngine):
    """Continuous batching with a paged cache; requests go in at once and come back as they finish.

    It turns the model's attention into one that pages by itself, by flash-attn where that is installed.
    """

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        super().__init__(spec, folder)
        self._manager: Any = None
        self._temperature: float | None = None

    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        manager = self._started_manager(temperature)
        started = time.perf_counter()
        ids = [manager.add_request(prompt, max_new_tokens=num_tokens, record_timestamps=True, eos_token_id=-1)
               for prompt, num_tokens in requests]
        if None in ids:
            raise RuntimeError("transformers' continuous batching takes no more requests")
        stamps: dict[str, list[float]] = {}
        while len(stamps) < len(ids):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended before its requests were done")
            elif result.error is not None:
                raise RuntimeError(f"transformers' continuous batching: {result.error}")
            elif result.is_finished():
                # It notes the time of some tokens that it then throws away.
                num_tokens = len(result.generated_tokens)
                stamps[result.request_id] = [stamp - started for stamp in result.timestamps[:num_tokens]]
        return [stamps[request_id] for request_id in ids]

    def _started_manager(self, temperature: float) -> Any:
        if self._manager is None or temperature != self._temperature:
            self._stop()
            config = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, eos_token_id=-1,
                                      pad_token_id=0, max_new_tokens=self._limits.max_model_len)
            self._temperature = temperature
            self._manager = self._model.init_continuous_batching(generation_config=config)
            self._manager.start()
        return self._manager

    def _stop(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=10)
            self._manager = None

    def close(self) -> None:
        self._stop()
        super().close()

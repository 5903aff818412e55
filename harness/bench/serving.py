"""What a worker does for requests: start an engine, run them on it, say what it took."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from engine.checkpoint.checkpoint_files import CONFIG_FILE, INDEX_FILE, weight_files
from engine.config import DTYPES, ModelConfig
from harness.bench.bounds import Bounds
from harness.bench.engines import ENGINES, Engine, EngineSpec
from harness.bench.figures import (
    Answered,
    Figures,
    Measured,
    TokenTimes,
    decode_figures,
    first_token_figures,
    inter_token_figures,
    per_token_figures,
    prompt_figures,
)
from harness.bench.measurement import Measurement, Ready, Task
from harness.bench.workloads import ENGINE_CASE, Requests

NVLINK_ALL_REDUCE_S = 5e-6
"""The least that an all-reduce of a few KiB is taken to cost between GPUs; one-shot over NVLink takes 6 µs in a graph."""
_OF_TIMES = {"itl": inter_token_figures, "ttft": first_token_figures, "tpot": per_token_figures}
_DECODE_TRIES = 3
"""A hiccup of the machine can make one token slower than many. Such a pair of runs tells nothing, and is run again."""


class ShortAnswerError(RuntimeError):
    """An engine gave back more or fewer tokens than it was asked for: its time is one for other work."""


class ServingMeasurement(Measurement):
    """An engine, for one case after the other. Its answers are counted before their time is taken for a figure."""

    lasts = True

    def __init__(self, task: Task) -> None:
        self._spec = self._spec_of(task)
        self._is_whole = True  # what an engine left undone would come back in the next case
        self._runs = itertools.count()
        self._folder = TemporaryDirectory()
        try:
            self._engine: Engine = ENGINES[task.engine].load()(self._spec, _weights_alone(task.folder, Path(self._folder.name)))
        except BaseException:
            self._folder.cleanup()
            raise
        self.take(task)

    def take(self, task: Task) -> bool:
        if self._spec_of(task) != self._spec or not self._is_whole:
            return False
        self.task = task
        self.ready = Ready(fabric=self._engine.fabric, bounds={task.work.case: self._bounds()})
        return True

    @cached_property
    def _config(self) -> ModelConfig:
        """Read when it is first asked for: after the engine has started, whose time must not hold what no user waits for."""
        return ModelConfig.from_folder(self.task.folder)

    def _spec_of(self, task: Task) -> EngineSpec:
        return EngineSpec(folder=task.folder, tp_size=task.tp_size, fabric=task.fabric, device=task.device, dtype=task.dtype,
                          limits=task.work.limits,
                          sequence_lens=task.sequence_lens, memory_share=task.memory_share)

    def measure(self) -> Measured:
        """One round: run the requests as the figures need it, and compute these.

        Raises:
            ShortAnswerError: if the engine gave back more or fewer tokens than it was asked for.
        """
        return {(self.task.work.case, self.task.engine): self._figures(self.task.work.figures)}

    def _figures(self, wanted: tuple[str, ...]) -> Figures:
        requests = self.task.requests
        found: Figures = {}
        if wanted in (("throughput",), ("start",)):
            answered = self._generate(requests)
            return {"output_tokens_per_s": sum(answered.num_tokens) / answered.seconds}
        if "decode" in wanted:
            found |= self._decode(requests)
        times = self._stream(requests)
        for name, compute in _OF_TIMES.items():
            if name in wanted:
                found |= compute(times)
        if "throughput" in wanted:
            found["output_tokens_per_s"] = sum(map(len, times)) / max(request[-1] for request in times)
        if "prompt" in wanted:
            found |= prompt_figures(times, sum(len(prompt) for prompt, _ in requests))
        return found

    def _decode(self, requests: Requests) -> Figures:
        first_tokens = [(prompt, 1) for prompt, _ in requests]
        for _ in range(_DECODE_TRIES):
            short_s, long_s = (self._generate(asked).seconds for asked in (first_tokens, requests))
            if long_s > short_s:
                break
        return decode_figures(short_s, long_s, requests[0][1] - 1)

    def _generate(self, requests: Requests) -> Answered:
        self._is_whole = False
        answered = self._engine.generate(self._fresh(requests), self.task.work.temperature)
        _expect_all(requests, answered.num_tokens)
        self._is_whole = True
        return answered

    def _stream(self, requests: Requests) -> TokenTimes:
        self._is_whole = False
        times = self._engine.stream(self._fresh(requests), self.task.work.temperature)
        _expect_all(requests, [len(request) for request in times])
        self._is_whole = True
        return times

    def _fresh(self, requests: Requests) -> Requests:
        """Requests whose prompts nobody has seen yet, in their first token: one engine can't switch prefix caching off."""
        number = next(self._runs)
        return [([(prompt[0] + number) % self._config.vocab_size, *prompt[1:]], num_tokens) for prompt, num_tokens in requests]

    def _bounds(self) -> Figures:
        """Of the figures of one round, by the ceilings of one rank that has the whole machine, or a whole GPU."""
        task, wanted = self.task, self.task.work.figures
        copy, matmul = (task.ceiling(ENGINE_CASE, metric) for metric in ("copy_gb_per_s", "matmul_tflop_per_s"))
        if copy is None or matmul is None:
            return {}
        on_gpu = task.device == "cuda"
        least = Bounds(config=self._config, itemsize=DTYPES[task.dtype].itemsize, copy_bytes_per_s=copy * 1e9,
                       matmul_flop_per_s=matmul * 1e12, all_reduce_s=NVLINK_ALL_REDUCE_S if on_gpu else 0.0,
                       tp_size=task.tp_size if on_gpu else 1)  # the ceilings are the whole machine's, which ranks share
        prompt_lens, output_lens = [len(prompt) for prompt, _ in task.requests], [count for _, count in task.requests]
        found: Figures = {}
        if "throughput" in wanted:
            found["output_tokens_per_s"] = sum(output_lens) / least.generate_s(prompt_lens, output_lens)
        if "prompt" in wanted:
            found["prompt_tokens_per_s"] = sum(prompt_lens) / least.prefill_s(prompt_lens)
        if "itl" in wanted:
            step_s = least.decode_step_s(batch_size=len(prompt_lens), context=prompt_lens[0] + output_lens[0] / 2)
            found |= {name: 1e3 * step_s for name in ("ms_per_token", "itl_ms") if name == "itl_ms" or "decode" in wanted}
        return found

    def memory(self) -> Figures:
        peak = self._engine.peak_device_bytes() if self.task.device == "cuda" else _peak_resident_bytes()
        return {} if peak is None else {"memory_gib": peak / 2**30}

    def close(self) -> None:
        try:
            self._engine.close()
        finally:
            self._folder.cleanup()


def _expect_all(requests: Requests, num_tokens: Sequence[int]) -> None:
    asked = [count for _, count in requests]
    if list(num_tokens) == asked:
        return
    if len(num_tokens) != len(asked):
        raise ShortAnswerError(f"{len(num_tokens)} answers came back for {len(asked)} requests")
    wrong = [number for number, (got, count) in enumerate(zip(num_tokens, asked, strict=True)) if got != count]
    first = wrong[0]
    raise ShortAnswerError(
        f"{sum(num_tokens)} tokens came back of {sum(asked)} asked for: {len(wrong)} of {len(asked)} requests differ, "
        f"number {first} with {num_tokens[first]} of {asked[first]}; such a run is no measurement")


def _peak_resident_bytes() -> int | None:
    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # not Linux, or the process has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    return total or None


def _weights_alone(folder: Path, scratch: Path) -> Path:
    """``folder`` without its tokenizer: prompts and answers are token ids, and no engine spends time on text."""
    others = (folder / name for name in (CONFIG_FILE, "generation_config.json", INDEX_FILE))
    for path in (*filter(Path.is_file, others), *weight_files(folder)):
        link = scratch / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return scratch


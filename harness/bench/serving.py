"""What a worker does for a serving workload: start an engine, run cases on it, say what it took."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from engine.checkpoint.checkpoint_files import CONFIG_FILE, INDEX_FILE, weight_files
from harness.bench.engines import ENGINES
from harness.bench.engines.base import Engine, EngineSpec
from harness.bench.figures import (
    Answered,
    Figures,
    TokenTimes,
    decode_figures,
    first_token_figures,
    inter_token_figures,
    per_token_figures,
    prompt_figures,
    throughput,
)
from harness.bench.workloads import Requests

State = dict[str, Any]
_OF_TIMES = {"itl": inter_token_figures, "ttft": first_token_figures, "tpot": per_token_figures}
_DECODE_TRIES = 3
"""A hiccup of the machine can make one token slower than many. Such a pair of runs tells nothing, and is run again."""


class ShortAnswerError(RuntimeError):
    """An engine gave back more or fewer tokens than it was asked for: its time is one for other work."""


class _Started:
    """An engine with the folder it was given. Its answers are counted before their time is taken for a figure.

    ``is_whole``: every run so far was answered in full. What an engine left undone would come back in the next case.
    """

    def __init__(self, name: str, spec: EngineSpec) -> None:
        self.spec = spec
        self.is_whole = True
        self._runs = itertools.count()
        self._folder = TemporaryDirectory()
        try:
            self.engine: Engine = ENGINES[name].load()(spec, _weights_alone(spec.folder, Path(self._folder.name)))
        except BaseException:
            self._folder.cleanup()
            raise

    def fresh(self, requests: Requests) -> Requests:
        """Requests whose prompts nobody has seen yet, in their first token: one engine can't switch prefix caching off."""
        number = next(self._runs)
        return [([(prompt[0] + number) % self.spec.vocab_size, *prompt[1:]], num_tokens) for prompt, num_tokens in requests]

    def generate(self, requests: Requests, temperature: float) -> Answered:
        self.is_whole = False
        answered = self.engine.generate(self.fresh(requests), temperature)
        _expect_all(requests, answered.num_tokens)
        self.is_whole = True
        return answered

    def stream(self, requests: Requests, temperature: float) -> TokenTimes:
        self.is_whole = False
        times = self.engine.stream(self.fresh(requests), temperature)
        _expect_all(requests, [len(request) for request in times])
        self.is_whole = True
        return times

    def close(self) -> None:
        try:
            self.engine.close()
        finally:
            self._folder.cleanup()


def start(state: State, name: str, spec: EngineSpec) -> str:
    """Have an engine with this ``spec`` running; the fabric that joins its ranks."""
    started: _Started | None = state.get("engine")
    if started is None or started.spec != spec or not started.is_whole:
        stop(state)
        started = state["engine"] = _Started(name, spec)
    return started.engine.fabric


def stop(state: State) -> None:
    """End the engine if one runs."""
    if (started := state.pop("engine", None)) is not None:
        started.close()


def run_case(state: State, requests: Requests, figures: tuple[str, ...], temperature: float) -> Figures:
    """One round: run the requests as the figures need it, and compute these.

    Raises:
        ShortAnswerError: if the engine gave back more or fewer tokens than it was asked for.
    """
    started: _Started = state["engine"]
    found: Figures = {}
    if figures == ("throughput",):
        answered = started.generate(requests, temperature)
        return throughput(sum(answered.num_tokens), answered.seconds)
    if "decode" in figures:
        found |= _decode(started, requests, temperature)
    times = started.stream(requests, temperature)
    for name, compute in _OF_TIMES.items():
        if name in figures:
            found |= compute(times)
    if "throughput" in figures:
        found |= throughput(sum(map(len, times)), max(request[-1] for request in times))
    if "prompt" in figures:
        found |= prompt_figures(times, sum(len(prompt) for prompt, _ in requests))
    return found


def _decode(started: _Started, requests: Requests, temperature: float) -> Figures:
    first_tokens = [(prompt, 1) for prompt, _ in requests]
    for _ in range(_DECODE_TRIES):
        short_s, long_s = (started.generate(asked, temperature).seconds for asked in (first_tokens, requests))
        if long_s > short_s:
            break
    return decode_figures(short_s, long_s, requests[0][1] - 1)


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


def first_token(state: State, name: str, spec: EngineSpec, prompt: list[int]) -> str:
    """Start an engine and have it give one token; the fabric that joins its ranks."""
    fabric = start(state, name, spec)
    state["engine"].generate([(prompt, 1)], 0.6)
    return fabric


def peak_bytes(state: State) -> int | None:
    """Most memory that the engine's processes have held together: of the GPUs, or resident in RAM. None: unknown."""
    started: _Started = state["engine"]
    if started.spec.device == "cuda":
        return started.engine.peak_device_bytes()
    return _peak_resident_bytes()


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


"""What a worker measures of an engine, on one whose answers are scripted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.checkpoint.checkpoint_files import INDEX_FILE, read_headers
from harness.bench import figures, measuring, serving
from harness.bench.engines import ENGINES, EngineKind, EngineSpec, shardproof_engine
from harness.bench.measurement import Task
from harness.bench.serving import ServingMeasurement
from harness.bench.workloads import GenerateWork, Limits, Requests, equal_requests
from reference.checkpoints import random_checkpoint
from tests.reference.tiny import small_config

REQUESTS = equal_requests(2, 8, 5)
Counts = Callable[[Requests], list[int]]


def as_asked(requests: Requests) -> list[int]:
    return [count for _, count in requests]


class ScriptedEngine:
    """Takes the next of ``short_s`` for one token of each request, and ``long_s`` for all of them; ``counts`` come back."""

    fabric = "own"
    short_s: Iterator[float]
    long_s = 3.0
    counts: Counts
    log: list[str]

    def __init__(self, spec: EngineSpec, folder: Path) -> None:
        self.log.append("start")

    def generate(self, requests: Requests, temperature: float) -> figures.Answered:
        seconds = next(self.short_s) if requests[0][1] == 1 else self.long_s
        return figures.Answered(seconds=seconds, num_tokens=type(self).counts(requests))

    def stream(self, requests: Requests, temperature: float) -> list[list[float]]:
        return [[1.0 + number for number in range(count)] for count in type(self).counts(requests)]

    def peak_device_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self.log.append("close")


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """A worker's state in which a scripted engine has started, or goes on, or starts again where it must."""
    monkeypatch.setitem(ENGINES, "scripted", EngineKind(target=f"{__name__}:ScriptedEngine", needs="torch", devices=("cpu",)))
    limits = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64)
    folder = random_checkpoint(tmp_path / "model", small_config("llama"))
    states: list[dict[str, Any]] = []

    def started(*wanted: str, counts: Counts = as_asked, short_s: tuple[float, ...] = (1.0,) * 9,
                state: dict[str, Any] | None = None) -> dict[str, Any]:
        if state is None:
            ScriptedEngine.log = []
            states.append(state := {})
        ScriptedEngine.counts, ScriptedEngine.short_s = staticmethod(counts), iter(short_s)
        work = GenerateWork(workload="serve", case="a case", draw=list, figures=wanted, rounds=1, limits=limits)
        measuring.start(state, Task(work=work, engine="scripted", folder=folder, tp_size=1, fabric="solo", device="cpu",
                                    dtype="float32", requests=REQUESTS))
        return state

    yield started
    for state in states:
        assert isinstance(state["measurement"], ServingMeasurement)
        state["measurement"].close()


def figures_of(state: dict[str, Any]) -> figures.Figures:
    """Of one round."""
    return measuring.measure(state)["a case", "scripted"]


def test_an_engine_has_started_before_its_worker_reads_the_config(
    scripted: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a start would take the seconds that reading it takes twice: no user of the engine reads it first."""
    read = serving.ModelConfig.from_folder

    def noted(folder: Path) -> Any:
        ScriptedEngine.log.append("config")
        return read(folder)

    monkeypatch.setattr(serving.ModelConfig, "from_folder", noted)
    figures_of(scripted("ttft"))
    assert ScriptedEngine.log == ["start", "config"]


def test_a_hiccup_in_the_short_run_has_both_runs_made_again(scripted: Callable[..., dict[str, Any]]) -> None:
    assert figures_of(scripted("decode", short_s=(9.0, 1.0))) == {"ms_per_token": 500.0}


def test_decode_steps_that_cost_nothing_time_and_again_are_not_reported(scripted: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="4 more tokens took no longer"):
        figures_of(scripted("decode", short_s=(9.0, 8.0, 7.0)))


def stops_at_once(requests: Requests) -> list[int]:
    return [1] * len(requests)


def one_stops_early(requests: Requests) -> list[int]:
    return [*as_asked(requests)[:-1], 3]


def says_nothing(requests: Requests) -> list[int]:
    return [0] * len(requests)


def loses_a_request(requests: Requests) -> list[int]:
    return as_asked(requests)[:-1]


def goes_on_too_long(requests: Requests) -> list[int]:
    return [count + 1 for _, count in requests]


def counts_its_prompts(requests: Requests) -> list[int]:
    return [len(prompt) + count for prompt, count in requests]


@pytest.mark.parametrize(("counts", "says"), [
    (stops_at_once, "2 tokens came back of 10 asked for: 2 of 2 requests differ, number 0 with 1 of 5"),
    (one_stops_early, "8 tokens came back of 10 asked for: 1 of 2 requests differ, number 1 with 3 of 5"),
    (says_nothing, "0 tokens came back of 10"),
    (loses_a_request, "1 answers came back for 2 requests"),
    (goes_on_too_long, "12 tokens came back of 10"),
    (counts_its_prompts, "26 tokens came back of 10"),
])
@pytest.mark.parametrize("asked_for", [
    ("throughput", "tpot"), ("itl",), ("ttft",), ("prompt",), ("throughput",), ("decode",)], ids="-".join)
def test_an_engine_is_paid_only_for_what_it_gave_back(
    counts: Counts, says: str, asked_for: tuple[str, ...], scripted: Callable[..., dict[str, Any]]
) -> None:
    def but_for_short_runs(requests: Requests) -> list[int]:
        return as_asked(requests) if requests[0][1] == 1 else counts(requests)

    with pytest.raises(RuntimeError, match=says):
        figures_of(scripted(*asked_for, counts=but_for_short_runs))


def test_what_came_back_is_what_a_throughput_counts(scripted: Callable[..., dict[str, Any]]) -> None:
    assert figures_of(scripted("throughput")) == {"output_tokens_per_s": 10 / 3.0}
    assert figures_of(scripted("throughput", "ttft"))["output_tokens_per_s"] == 10 / 5.0


def test_an_engine_that_failed_starts_anew_for_the_next_case_and_one_that_did_not_goes_on(
    scripted: Callable[..., dict[str, Any]]
) -> None:
    state = scripted("ttft", counts=one_stops_early)
    with pytest.raises(RuntimeError, match="came back"):
        figures_of(state)
    scripted("ttft", state=state)
    assert ScriptedEngine.log == ["start", "close", "start"], "what it had left undone would come back in the next case"
    figures_of(state)
    scripted("ttft", state=state)
    assert ScriptedEngine.log == ["start", "close", "start"]


def test_an_engine_gets_the_files_of_the_checkpoint_wherever_they_lie_and_no_tokenizer(tmp_path: Path) -> None:
    whole, scratch = tmp_path / "whole", tmp_path / "scratch"
    scratch.mkdir()
    random_checkpoint(whole, small_config("llama"), max_shard_size="40KB")
    index = json.loads((whole / INDEX_FILE).read_text())
    (whole / "shards").mkdir()
    for name in set(index["weight_map"].values()):
        (whole / name).rename(whole / "shards" / name)
    index["weight_map"] = {tensor: f"shards/{name}" for tensor, name in index["weight_map"].items()}
    (whole / INDEX_FILE).write_text(json.dumps(index))
    (whole / "tokenizer.json").write_text("{}")
    linked = serving._weights_alone(whole, scratch)
    assert not (linked / "tokenizer.json").exists()
    assert read_headers(linked).keys() == read_headers(whole).keys()


@pytest.mark.parametrize(("name", "tp_invariant"), [("shardproof", False), ("shardproof-invariant", True)])
def test_our_engine_in_its_other_mode_is_a_peer(monkeypatch: pytest.MonkeyPatch, name: str, tp_invariant: bool) -> None:
    started: dict[str, Any] = {}

    class Recorded:
        def __init__(self, folder: Path, **options: Any) -> None:
            started.update(options)
            self._ranks = SimpleNamespace(fabric="solo")

    monkeypatch.setattr(shardproof_engine, "LLM", Recorded)
    limits = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64)
    ENGINES[name].load()(EngineSpec(folder=Path(), tp_size=1, fabric="auto", device="cpu", dtype="float32", limits=limits,
                                    sequence_lens=(13, 13)), Path())
    assert started["tp_invariant"] is tp_invariant

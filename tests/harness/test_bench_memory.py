"""What would not fit into a CPU's memory is refused with numbers before it starts, and what fits is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from engine.config import ModelConfig
from harness.bench.bench import BenchRun, Watcher, Workers
from harness.bench.plan import BenchPlan
from tests.harness.conftest import MakeModel
from tests.reference.tiny import tiny_config

SMOLLM2: dict[str, Any] = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                           "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192}


@pytest.fixture
def large_model(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder whose config is taken for SmolLM2's: nothing of it is loaded."""
    folder = tiny_model(tiny_config())
    config = ModelConfig.from_folder(folder)
    sizes = {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64, "num_layers": 30}
    for name, value in (SMOLLM2 | sizes).items():
        if hasattr(config, name):
            object.__setattr__(config, name, value)
    monkeypatch.setattr(ModelConfig, "from_folder", lambda folder: config)
    return folder


def run_of(folder: Any, free_gib: float, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> BenchRun:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gib * 2**30))
    values: dict[str, Any] = {"workloads": ("decode",), "tp_sizes": (1, 2), "device": "cpu", "dtype": "float32"}
    return BenchRun(BenchPlan(model="smollm2", folder=folder, **(values | changes)), Watcher(), Workers())


def test_a_case_for_which_memory_is_too_small_is_refused_with_what_it_needs_and_what_there_is(
    large_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = run_of(large_model, 20, monkeypatch)
    assert [work.case for work in bench.works] == [f"batch {size}, context 1024" for size in (1, 8, 64)]
    (item,) = bench.missing
    assert (item.workload, item.case) == ("decode", "batch 256, context 1024")
    assert item.reason == (
        "needs about 50.9 GiB of memory (shardproof tp 1 13.1, shardproof tp 2 18.3, transformers 19.5), and 20.0 GiB are free: "
        "name fewer tp_sizes or peers, or a smaller dtype")


@pytest.mark.parametrize(("free_gib", "changes", "cases"), [
    (64, {}, 4), (20, {"tp_sizes": (1,), "peers": ()}, 4), (12, {"tp_sizes": (1,), "peers": ()}, 3),
    (12, {"tp_sizes": (1,), "peers": (), "dtype": "bfloat16"}, 4), (5, {}, 1), (1, {}, 0)])
def test_the_fewer_engines_and_the_smaller_the_dtype_the_more_cases_fit(
    free_gib: float, changes: dict[str, Any], cases: int, large_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = run_of(large_model, free_gib, monkeypatch, **changes)
    assert len(bench.works) == cases
    assert len(bench.missing) == 4 - cases


def test_workloads_without_requests_and_small_models_are_never_refused(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = run_of(tiny_model(tiny_config()), 4, monkeypatch, workloads=("quick", "layers", "load"))
    assert not [item for item in bench.missing if "memory" in item.reason]

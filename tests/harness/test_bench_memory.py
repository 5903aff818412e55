"""What would not fit into a CPU's memory is refused with numbers before it starts, and what fits is run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from engine.config import ModelConfig
from harness.bench.bench import BenchRun, Watcher, Workers
from harness.bench.engines import EngineSpec
from harness.bench.engines.vllm_engine import cache_bytes
from harness.bench.plan import BenchPlan
from harness.bench.workloads import Limits
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


def test_vllm_gets_room_for_the_workload_on_each_rank_and_no_more(tiny_model: MakeModel) -> None:
    folder = tiny_model(tiny_config(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2))
    limits = Limits(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64)
    spec = EngineSpec(folder=folder, tp_size=1, fabric="auto", device="cuda", dtype="bfloat16", limits=limits,
                      sequence_lens=(65, 10))
    a_token = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, features, bytes
    assert cache_bytes(spec) == (128 + 64 + 64) * a_token  # in blocks, and one that stays empty
    assert cache_bytes(replace(spec, tp_size=2)) == cache_bytes(spec) // 2
    assert cache_bytes(replace(spec, tp_size=4)) == cache_bytes(spec) // 2  # two ranks keep a KV head each
    assert cache_bytes(replace(spec, sequence_lens=(1,))) == (128 + 64) * a_token  # a sequence may be longer than any is

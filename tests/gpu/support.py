"""What the tests on GPUs share: small models, loaded ranks, and faults that are planted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.execution.runner import Runner
from engine.layers.attention_layout import AttentionBackend, LayerCache
from engine.parallel.group import SoloGroup
from engine.ranks.ranks import RankContext, Ranks
from engine.scheduling.batch import StepBatch
from harness.checks import all_checks
from harness.checks.base import CheckContext, Outcome, together
from harness.subjects.base import Loaded, Placement
from harness.subjects.engine import EngineSubject
from harness.subjects.engine_rank import EngineRank
from harness.subjects.on_ranks import load_on
from harness.verification.reference_results import ReferenceResults
from reference.checkpoints import random_checkpoint

DEVICE = "cuda"
OPTIONS = {"block_size": 16, "num_kv_blocks": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Small blocks, so that sequences have several; decode graphs for 1, 2, 4 and 8 sequences."""

Plant = Callable[..., None]
"""Job: change the subject that the rank holds."""
MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """``small_model(config, dtype)``: the folder of a random model, written once a session."""
    written: dict[str, Path] = {}

    def make(config: dict[str, Any], dtype: str) -> Path:
        key = json.dumps([config, dtype], sort_keys=True)
        if key not in written:
            written[key] = random_checkpoint(tmp_path_factory.mktemp("model"), config, dtype=dtype)
        return written[key]

    return make


@pytest.fixture(autouse=True)
def _quiet_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # triton 3.9 warns that a default will change; warnings are errors here.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def check(name: str, ranks: Ranks, results: ReferenceResults, plant: Plant | None = None, *arguments: Any,
          **options: Any) -> Outcome:
    """One check on ranks that hold a freshly loaded engine, with a fault planted into it or without."""
    options = OPTIONS | options
    subject = EngineSubject(Placement(tp_size=ranks.tp_size, device=DEVICE, ranks=ranks))
    subject.load(results.folder, dtype=results.dtype, options=options)
    if plant is not None:
        ranks.run(plant, *arguments, timeout_s=60.0)
    return together(list(all_checks()[name].run(CheckContext(results=results, subject=subject, options=options, seed=0))))


# --- jobs ---


def load(rank: RankContext, folder: Path, dtype: str, options: dict[str, Any]) -> None:
    """Let this rank hold the engine."""
    load_on(rank, EngineRank, Loaded(folder=folder, dtype=dtype, options=options))


def engine_of(rank: RankContext) -> EngineRank:
    engine: EngineRank = rank.state["subject"]
    return engine


def generate(rank: RankContext, prompts: list[list[int]], params: dict[str, Any]) -> list[list[int]]:
    """Token ids after each prompt, all of them drawn alike."""
    rank.phase = "generate"
    return engine_of(rank).generate(prompts, [params] * len(prompts))


def runner_of(rank: RankContext) -> Runner:
    return engine_of(rank).runner


def shift_slots(rank: RankContext, tp_rank: int) -> None:
    """This rank writes each token's key and value one slot too early."""
    runner = runner_of(rank)
    if rank.tp.rank == tp_rank:
        forward = runner.forward

        def shifted(batch: StepBatch) -> Tensor:
            return forward(replace(batch, slots_T=torch.where(batch.slots_T > 0, batch.slots_T - 1, batch.slots_T)))

        runner.forward = shifted  # type: ignore[method-assign]


def skip_all_reduce(rank: RankContext, layer: int) -> None:
    """Every rank keeps its own part of one MLP's output."""
    down_proj: Any = runner_of(rank).model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    down_proj.tp = SoloGroup()


def exchange_keys_and_values(rank: RankContext, layer: int) -> None:
    """One layer takes values for keys and keys for values."""
    attention: Any = runner_of(rank).model.get_submodule(f"model.layers.{layer}.self_attn.attn")
    attention.backend = _Exchanged(attention.backend)


class _Exchanged:
    def __init__(self, backend: AttentionBackend) -> None:
        self.name, self.capturable, self._backend = backend.name, backend.capturable, backend

    def __call__(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        return self._backend(q_TQH, LayerCache(cache.v_PNBH, cache.k_PNBH), batch)


def count_replays(rank: RankContext) -> None:
    """From now on ``rank.state["replays"]`` counts them."""
    graphs = runner_of(rank).graphs
    assert graphs is not None, "the runner captured no graphs"
    run = graphs.run
    rank.state["replays"] = 0

    def counted(batch: StepBatch) -> tuple[Tensor, Tensor]:
        rank.state["replays"] += 1
        return run(batch)

    graphs.run = counted  # type: ignore[method-assign]


def num_replays(rank: RankContext) -> int:
    count: int = rank.state["replays"]
    return count


def has_graphs(rank: RankContext) -> bool:
    return runner_of(rank).graphs is not None

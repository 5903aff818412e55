"""Decode steps as CUDA graphs on one GPU, against the same steps launched kernel by kernel, and against the reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.execution.decode_graph import StepInputs
from engine.layers.flash_attention import FlashAttnBackend
from engine.parallel.group import SoloGroup
from engine.ranks.ranks import RankContext
from engine.scheduling.batch import StepBatch
from harness.verification.budgets import Comparison, computation
from harness.verification.reference_results import ReferenceResults
from tests.gpu.support import (
    DEVICE,
    OPTIONS,
    MakeModel,
    count_replays,
    engine_of,
    generate,
    load,
    num_replays,
    runner_of,
)
from tests.reference.tiny import small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


flash_attn = pytest.param("flash_attn", marks=[
    pytest.mark.skipif(not FlashAttnBackend.is_installed(), reason="no flash-attn package is installed"),
    # Its own: flash-attn-4 uses names that its compiler deprecates, and its compiler warns about flash-attn-4's arguments.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::UserWarning"),
])


def loaded(small_model: MakeModel, dtype: str, *, eager: bool, **options: Any) -> RankContext:
    """A rank that holds the engine, in this thread."""
    rank = RankContext(tp=SoloGroup(), device=torch.device(DEVICE, 0))
    folder = small_model(small_config("qwen3", num_q_heads=8, num_kv_heads=2), dtype)
    load(rank, folder, dtype, OPTIONS | {"enforce_eager": eager} | options)
    if eager:
        assert runner_of(rank).graphs is None
    else:
        count_replays(rank)
    return rank


def compare(rank: RankContext, results: ReferenceResults) -> Comparison:
    found = engine_of(rank).logits(results.schedule)
    return computation(torch.cat(found), torch.cat(results.baseline_logits), torch.cat(results.exact_logits), results.dtype)


def test_graphs_draw_the_ids_that_kernel_by_kernel_are_drawn(small_model: MakeModel) -> None:
    """In float32, where rounding turns no margin of this model round. Other prompts each time, other numbers of them."""
    graphs, eager = (loaded(small_model, "float32", eager=eager) for eager in (False, True))
    draw = random.Random(0)
    for num_prompts, params in [
        (1, {"temperature": 0.0, "max_tokens": 30}),
        (5, {"temperature": 0.0, "max_tokens": 30}),
        (8, {"temperature": 0.8, "max_tokens": 12}),
        (3, {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "max_tokens": 12}),  # the graph's draw is put right behind it
        (2, {"temperature": 0.0, "max_tokens": 30}),
    ]:
        prompts = [[draw.randrange(131) for _ in range(draw.randint(1, 40))] for _ in range(num_prompts)]
        before = num_replays(graphs)
        assert generate(graphs, prompts, params) == generate(eager, prompts, params)
        assert num_replays(graphs) > before


@pytest.mark.parametrize("backend", ["triton", flash_attn])
def test_graphs_give_logits_within_budget_on_every_new_input(small_model: MakeModel, backend: str) -> None:
    rank = loaded(small_model, "bfloat16", eager=False, attention_backend=backend)
    assert runner_of(rank).attention_backend.name == backend
    folder = small_model(small_config("qwen3", num_q_heads=8, num_kv_heads=2), "bfloat16")
    for seed in range(3):
        before = num_replays(rank)
        comparison = compare(rank, ReferenceResults(folder, dtype="bfloat16", seed=seed, device=DEVICE))
        assert comparison.ok, f"seed {seed}: {comparison.error_over_budget:.3g} of the budget"
        assert num_replays(rank) > before


def test_a_graph_that_reads_an_old_length_is_over_budget(small_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = loaded(small_model, "bfloat16", eager=False)
    folder = small_model(small_config("qwen3", num_q_heads=8, num_kv_heads=2), "bfloat16")
    fill = StepInputs.fill

    def one_behind(self: StepInputs, batch: StepBatch) -> None:
        fill(self, batch)
        self.context_S.sub_(1).clamp_(min=0)

    monkeypatch.setattr(StepInputs, "fill", one_behind)
    assert not compare(rank, ReferenceResults(folder, dtype="bfloat16", device=DEVICE)).ok

"""The attention check sees what goes wrong between the fused projection and ``o_proj``, and nothing where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.kernels.attention_torch as attention_torch
import engine.kernels.rope as rope
import engine.layers.rotary as rotary
from engine.layers.attention_backends import TorchBackend
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.scheduling.batch import StepBatch
from harness.checks.attention import NUM_CASES
from harness.checks.base import Outcome, together
from harness.faults.layouts import LAYOUTS
from tests.harness.checking import again, assert_green, run_check, run_kinds
from tests.harness.conftest import MakeModel

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    return tiny_model(LAYOUTS["llama-yarn"].config)


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_is_green(folder: Path, tp_size: int, dtype: str) -> None:
    kinds = run_kinds("attention", folder, dtype, tp_size=tp_size)
    assert_green(together(kinds))
    assert kinds[1].extra["modules"] == ["attention (torch)"]


@pytest.mark.parametrize(("tp_size", "compared"), [(1, 50_128), (2, 41_512)])
def test_every_case_is_judged_by_all_of_its_values(folder: Path, tp_size: int, compared: int) -> None:
    """Four lengths of rotary tables, the drawn steps and the long prompt."""
    outcome = run_check("attention", folder, tp_size=tp_size)
    assert (outcome.cases, outcome.compared) == (4 + NUM_CASES + 1, compared)


@pytest.mark.parametrize("layout", ["qwen3", "llama-nine-heads"])
def test_other_layouts_are_green(tiny_model: MakeModel, layout: str) -> None:
    assert_green(run_check("attention", tiny_model(LAYOUTS[layout].config)))


def call_with(change: Callable[[StepBatch], StepBatch]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        call = TorchBackend.__call__
        patch.setattr(TorchBackend, "__call__", lambda self, q, cache, batch: call(self, q, cache, change(batch)))

    return plant


def sequences_read_their_neighbours_blocks(patch: pytest.MonkeyPatch) -> None:
    call_with(lambda batch: replace(batch, block_tables_SB=batch.block_tables_SB.roll(1, 0)))(patch)


def contexts_are_one_too_short(patch: pytest.MonkeyPatch) -> None:
    call_with(lambda batch: replace(batch, context_lens_S=(batch.context_lens_S - 1).clamp(min=1)))(patch)


def query_heads_share_the_wrong_keys(patch: pytest.MonkeyPatch) -> None:
    init = TorchBackend.__init__

    def wrong(self: TorchBackend, layout: AttentionLayout) -> None:
        init(self, layout)
        self.kv_of_q = self.kv_of_q[::-1]

    patch.setattr(TorchBackend, "__init__", wrong)


def scaled_by_the_number_of_heads(patch: pytest.MonkeyPatch) -> None:
    init = TorchBackend.__init__

    def wrong(self: TorchBackend, layout: AttentionLayout) -> None:
        init(self, layout)
        self.scale = (layout.head_dim * len(self.kv_of_q)) ** -0.5

    patch.setattr(TorchBackend, "__init__", wrong)


def parts_of_a_long_prompt_see_everything(patch: pytest.MonkeyPatch) -> None:
    """Right for every prompt whose scores fit into one tensor."""
    attend = attention_torch._attend

    def wrong(q: Tensor, k: Tensor, v: Tensor, contexts: Tensor, kv_heads: list[int], scale: float) -> Tensor:
        step = max(1, attention_torch._MAX_SCORES // (q.shape[0] * len(kv_heads) * k.shape[2]))
        return torch.cat([attend(part, k, v, contexts, kv_heads, scale) for part in q.split(step, dim=1)], dim=1)

    patch.setattr(attention_torch, "_attend", wrong)


def softmax_in_half_precision(patch: pytest.MonkeyPatch) -> None:
    """An error that is rounding, and too much of it for float32."""
    call = TorchBackend.__call__

    def wrong(self: TorchBackend, q: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        return call(self, q, LayerCache(cache.k_PNBH.half().float(), cache.v_PNBH), batch)

    patch.setattr(TorchBackend, "__call__", wrong)


@pytest.mark.parametrize("plant", [
    sequences_read_their_neighbours_blocks, contexts_are_one_too_short, query_heads_share_the_wrong_keys,
    scaled_by_the_number_of_heads, parts_of_a_long_prompt_see_everything, softmax_in_half_precision,
])
def test_a_fault_in_attention_is_seen_and_can_be_replayed(folder: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch)
        outcome = run_check("attention", folder)
        found_again = again("attention", folder, outcome)
    assert outcome.module == "attention (torch)"
    assert found_again.finding is not None
    assert (found_again.case, found_again.cases) == (outcome.case, 1)
    assert_green(again("attention", folder, outcome))


def tables_scaled_only_where_they_are_long(patch: pytest.MonkeyPatch) -> None:
    tables = rotary.rope_tables

    def wrong(hf_config: Any, head_dim: int, num_positions: int, **options: Any) -> tuple[Tensor, Tensor]:
        factor = 1 if num_positions > 75 else 4
        cos, sin = tables(hf_config, head_dim, num_positions * factor, **options)
        return cos[::factor], sin[::factor]

    patch.setattr(rotary, "rope_tables", wrong)


def tables_too_short(patch: pytest.MonkeyPatch) -> None:
    tables = rotary.rope_tables
    patch.setattr(rotary, "rope_tables", lambda config, dim, num_positions, **options: tables(
        config, dim, num_positions - 1, **options))


def positions_counted_in_half_precision(patch: pytest.MonkeyPatch) -> None:
    """Right for the first 256 positions."""
    arange = torch.arange

    def wrong(*numbers: Any, **options: Any) -> Tensor:
        return arange(*numbers, **options).bfloat16().to(options.get("dtype", torch.int64))

    patch.setattr(rotary, "torch", _TorchWith(wrong))


class _TorchWith:
    """``torch`` with another ``arange``, for one module."""

    def __init__(self, arange: Callable[..., Tensor]) -> None:
        self.arange = arange

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.parametrize("plant", [tables_scaled_only_where_they_are_long, tables_too_short,
                                   positions_counted_in_half_precision])
def test_wrong_rotary_tables_are_seen(tiny_model: MakeModel, plant: Plant,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(LAYOUTS["llama-yarn"].config | {"max_position_embeddings": 300, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 75}})
    with monkeypatch.context() as patch:
        plant(patch)
        outcome = run_check("attention", folder)
        assert again("attention", folder, outcome).case == outcome.case
    assert outcome.module == "rotary"
    assert outcome.finding is not None
    assert "table" in outcome.finding
    assert_green(again("attention", folder, outcome))


def rotation_the_other_way_round(patch: pytest.MonkeyPatch) -> None:
    turn = rope._norm_and_rotate_torch
    patch.setattr(rope, "_norm_and_rotate_torch", lambda x, cos, sin, weight, eps: turn(x, cos, -sin, weight, eps))


def unstored_tokens_written_to_the_last_slot(patch: pytest.MonkeyPatch) -> None:
    def wrong(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        slots = slots % (k_cache.shape[0] * k_cache.shape[2])
        size = k_cache.shape[2]
        k_cache[slots // size, :, slots % size] = k
        v_cache[slots // size, :, slots % size] = v

    patch.setattr(rope, "store_kv_torch", wrong)


def keys_normed_with_the_weight_of_queries(patch: pytest.MonkeyPatch) -> None:
    turn = rope.apply_rope_torch
    patch.setattr(rope, "apply_rope_torch", lambda q, k, positions, cos, sin, q_norm, k_norm, eps: turn(
        q, k, positions, cos, sin, q_norm, q_norm, eps))


@pytest.mark.parametrize(("plant", "says"), [
    (rotation_the_other_way_round, "queries are off"),
    (unstored_tokens_written_to_the_last_slot, "slots were written"),
    (keys_normed_with_the_weight_of_queries, "keys are off"),
])
def test_a_fault_in_rotation_or_writing_is_seen(tiny_model: MakeModel, plant: Plant, says: str,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    outcome: Outcome = run_check("attention", tiny_model(LAYOUTS["qwen3"].config))
    assert outcome.module == "rotary"
    assert outcome.finding is not None
    assert says in outcome.finding

"""The attention check sees what goes wrong between the fused projection and ``o_proj``, and nothing where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import engine.kernels.attention_torch as attention_torch
import engine.kernels.rope as rope
import engine.layers.rotary as rotary
from engine.layers.attention_backends import TorchBackend
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.scheduling.batch import StepBatch
from harness.checks.attention import NUM_CASES, AttentionCase, run_case
from harness.checks.base import Outcome, together
from harness.checks.rotary import _rotate
from harness.faults.layouts import LAYOUTS
from harness.subjects.rank import AttentionStep, Rank
from harness.verification.budgets import rounding
from tests.harness.checking import again, alone, assert_green, run_check, run_kinds
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


TINY = AttentionCase(num_q_heads=8, num_kv_heads=2, head_dim=16, block_size=16, dtype="float16", shared=16, sharpness=8.0,
                     chunks=((0, 48), (0, 12), (17, 1)), seed=507882004)
"""Drawn as the check draws: one key has all the weight but a trace, and an element of its value is all but 0 in float16."""


def test_a_result_may_be_subnormal_but_not_flushed_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    (answer,) = run_case(alone(), TINY)
    assert answer.problem is None
    call, smallest = TorchBackend.__call__, torch.finfo(torch.float16).smallest_normal

    def flushed(self: TorchBackend, q: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        found = call(self, q, cache, batch)
        return found.where(found.abs() >= smallest, 0)

    monkeypatch.setattr(TorchBackend, "__call__", flushed)
    (answer,) = run_case(alone(), TINY)
    assert "of the budget" in (answer.problem or "")


class DividesBeforeItRounds:
    """Attention over keys in a row, as in transformers: float32 shares of one are rounded to the dtype, then they meet values."""

    def __init__(self, too_large: float = 0.0) -> None:
        self.too_large = too_large

    def heads(self, num_q_heads: int, num_kv_heads: int) -> tuple[range, range]:
        return range(num_q_heads), range(num_kv_heads)

    def attend(self, step: AttentionStep) -> dict[str, list[Tensor]]:
        (q_IQH,), (k_LNH,), (v_LNH,) = step.queries, step.keys, step.values
        score_QIL = torch.einsum("iqh,lqh->qil", q_IQH.float(), k_LNH.float()) * step.head_dim**-0.5
        later_IL = torch.ones(score_QIL.shape[1:], dtype=torch.bool).triu(1 + len(k_LNH) - len(q_IQH))
        share_QIL = score_QIL.masked_fill(later_IL, -torch.inf).softmax(-1).to(step.dtype)
        return {"own": [torch.einsum("qil,lqh->iqh", share_QIL.float() * (1 + self.too_large), v_LNH.float()).to(step.dtype)]}


def test_softmax_weights_of_a_long_context_may_be_subnormal() -> None:
    """Each key has a share of 7.6e-6: float16 holds that to 7 bits."""
    case = AttentionCase(num_q_heads=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float16", chunks=((131_068, 4),),
                         shared=0, sharpness=0.125, seed=0)

    def problem(too_large: float) -> str | None:
        (answer,) = run_case(cast(Rank, SimpleNamespace(tp_rank=0, attention=DividesBeforeItRounds(too_large))), case)
        return answer.problem

    assert problem(0.0) is None
    assert "of the budget" in (problem(0.02) or "")


@pytest.mark.parametrize("has_norm", [False, True])
def test_a_rotation_may_round_tables_and_products_that_are_subnormal(has_norm: bool) -> None:
    """As in transformers everything is rounded to float16; queries are small there, or so are the weights of their norm."""
    generator, num_tokens, dim = torch.Generator().manual_seed(0), 64, 16
    x_TNH = torch.randn((num_tokens, 4, dim), generator=generator).mul(1 if has_norm else 2e-5).half()
    norm_H = torch.randn(dim, generator=generator).mul(2e-5).half() if has_norm else None
    angle_TR = torch.arange(num_tokens)[:, None] * 1e4 ** -(torch.arange(dim // 2) / (dim // 2))
    tables = angle_TR.cos(), angle_TR.sin()
    exact, variance = (value.flatten(0, 1) for value in _rotate(x_TNH, tables, norm_H, 1e-6, "float16"))
    cos, sin = (torch.cat((table, table), -1)[:, None].half() for table in tables)
    y = x_TNH
    if norm_H is not None:
        y = norm_H * (x_TNH.float() * torch.rsqrt(x_TNH.float().square().mean(-1, keepdim=True) + 1e-6)).half()
    first, second = y.chunk(2, -1)
    found = (y * cos + torch.cat((-second, first), -1) * sin).flatten(0, 1)
    assert rounding(found, exact, variance, shared=has_norm).ok
    smallest = torch.finfo(torch.float16).smallest_normal
    assert not rounding(found.where(found.abs() >= smallest, 0), exact, variance, shared=has_norm).ok

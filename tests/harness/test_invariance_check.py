"""The invariance check passes the invariant mode, and is red where anything that makes it so is taken away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.execution.runner as runner
import engine.layers.invariant as invariant
from engine.kernels import ieee
from engine.kernels.attention_torch import paged_attention_torch
from engine.kernels.invariant_matmul import leaf_sums_torch
from engine.layers.invariant import INVARIANT
from engine.models.parts import ORDINARY
from harness.checks import invariance as invariance_check
from harness.checks.base import Outcome, together
from harness.faults.layouts import LAYOUTS
from harness.verification.verify import VerifyPlan, verify
from tests.harness.checking import assert_green, context_of, run_kinds
from tests.harness.conftest import MakeModel

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    return tiny_model(LAYOUTS["llama-cut-group"].config)


def red_kinds(folder: Path, *, seed: int = 0, tp_size: int = 3, kind: str | None = None) -> dict[str, Outcome]:
    outcomes = run_kinds("invariance", folder, seed=seed, tp_size=tp_size, kind=kind)
    assert all(outcome.error is None for outcome in outcomes), outcomes
    return {outcome.kind: outcome for outcome in outcomes if outcome.finding is not None}


@pytest.mark.parametrize("tp_size", [1, 3])
def test_the_invariant_mode_is_green(folder: Path, tp_size: int) -> None:
    outcomes = run_kinds("invariance", folder, tp_size=min(tp_size, 6), seed=tp_size)
    assert [outcome.kind for outcome in outcomes] == ["layouts", "served", "rollout", "model"]
    for outcome in outcomes:
        assert_green(outcome)


def parts(patch: pytest.MonkeyPatch, **other: Any) -> None:
    patch.setattr(invariant, "INVARIANT", replace(INVARIANT, **other))


def everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner, "parts_of", lambda config, device: ORDINARY)


def column_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(invariant, "linear_in_order_torch", torch.nn.functional.linear)


def integer_sums(patch: pytest.MonkeyPatch) -> None:
    """Leaves are added as float32, as an all-reduce of floating-point numbers would."""

    def leaf_sums(x: Tensor, weight: Tensor, *, leaf: int, **scheme: Any) -> Tensor:
        total = torch.zeros((2, x.shape[0], weight.shape[0]))
        for a, b in zip(x.split(leaf, 1), weight.split(leaf, 1), strict=True):
            total[0] += ieee.exact_matmul(a.double(), b.double()).float()
        return total

    def value(sums: Tensor, quantum: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return (sums[0] if bias is None else sums[0] + bias).to(dtype)

    patch.setattr(invariant, "leaf_sums_torch", leaf_sums)
    patch.setattr(invariant, "value_of_sums_torch", value)


def whole_quantum(patch: pytest.MonkeyPatch) -> None:
    """The quantum is that of the rank's shard, and a coarse one, so that it is seen."""

    def load(self: Any, param: Any, loaded: Any) -> None:
        super(invariant.InvariantRowParallelLinear, self).weight_loader(param, loaded)
        self.quantum = invariant.quantum_exponent(param.data.double() * self.tp.rank) - 20

    patch.setattr(invariant.InvariantRowParallelLinear, "weight_loader", load)


def attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(invariant, "paged_attention_in_order_torch", lambda *args: paged_attention_torch(*args))


def functions(patch: pytest.MonkeyPatch) -> None:
    """torch's own float32 sigmoid, which is another at the end of a tensor."""
    parts(patch, silu_mul=lambda x: (torch.nn.functional.silu(x.float().chunk(2, -1)[0]) * x.float().chunk(2, -1)[1]).to(x.dtype))


INGREDIENTS: tuple[Plant, ...] = (everything, column_order, integer_sums, whole_quantum, attention, functions)
SEEN_IN = dict.fromkeys(INGREDIENTS, "layouts") | {functions: "model"}
"""Ingredient -> the kind that misses it at seed 0: the smallest one where several do."""


@pytest.mark.parametrize("plant", INGREDIENTS, ids=lambda plant: plant.__name__)
def test_what_makes_it_invariant_is_missed_where_it_is_taken_away(folder: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch,
                                                                  ) -> None:
    plant(monkeypatch)
    assert red_kinds(folder, kind=SEEN_IN[plant])


def test_the_ordinary_engine_s_rollout_is_not_what_one_rank_scores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything(monkeypatch)
    assert "was drawn with another log-probability than" in (red_kinds(folder, kind="rollout")["rollout"].finding or "")


@pytest.mark.parametrize("kind", ["model", "rollout"])
@pytest.mark.parametrize("limit", ["sliding_window", "max_position_embeddings"])
def test_a_model_of_short_sequences_gets_short_ones(tiny_model: MakeModel, limit: str, kind: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """In the long rollout too, which GPUs run: the engine has no windows, and refuses what is longer."""
    monkeypatch.setattr(invariance_check, "LARGE_ROLLOUT", (4, 400))
    config = {key: value for key, value in LAYOUTS["llama"].config.items() if not key.endswith("_bias")}
    with context_of(tiny_model({**config, "model_type": "mistral", limit: 9}), "float32", tp_size=1, kind=kind) as context:
        context.results.device = "cuda" if kind == "rollout" else "cpu"  # nothing is computed there
        outcome = together(list(invariance_check.CHECK.run(context)))
    assert_green(outcome)
    assert outcome.compared == {"model": 2 * (9 + 5) * config["vocab_size"], "rollout": 4 * 4}[kind]


@pytest.mark.endurance
@pytest.mark.parametrize("seed", range(1, 10))
@pytest.mark.parametrize("plant", INGREDIENTS, ids=lambda plant: plant.__name__)
def test_it_is_missed_at_every_seed(folder: Path, plant: Plant, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert red_kinds(folder, seed=seed)


@pytest.mark.endurance
@pytest.mark.parametrize("tp_size", range(1, 9))
@pytest.mark.parametrize("seed", range(5))
def test_the_grid_is_green(tiny_model: MakeModel, tp_size: int, seed: int) -> None:
    layout = list(LAYOUTS)[seed]
    config = LAYOUTS[layout].config
    tp_size = min(tp_size, config["num_attention_heads"])
    for outcome in run_kinds("invariance", tiny_model(config), tp_size=tp_size, seed=10 * tp_size + seed):
        assert_green(outcome)


def test_a_finding_says_where_it_begins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaf_sums(x: Tensor, weight: Tensor, **scheme: Any) -> Tensor:
        sums = leaf_sums_torch(x, weight, **scheme)
        if x.shape[1] == 16:  # o_proj, of the ranks that have two of the six heads: at tp 1 nobody has
            sums[0, -1] += 1 << 10
        return sums

    monkeypatch.setattr(invariant, "leaf_sums_torch", leaf_sums)
    found = red_kinds(folder, kind="model")["model"]
    assert found.module == "model.layers.0.self_attn.o_proj"
    assert "first in model.layers.0.self_attn.o_proj on rank 0, token" in (found.finding or "")
    assert found.tensors.keys() == {"found", "expected"}


def test_a_subject_that_does_not_promise_it_is_not_asked(folder: Path) -> None:
    report = verify(VerifyPlan(model="tiny", folder=folder, tp_sizes=(2,), subject="tests.harness.hand_cut:HandCut",
                               checks=("invariance",)))
    assert {row.verdict for row in report.checks} == {"skipped"}
    assert "does not declare 'invariance'" in report.checks[0].message

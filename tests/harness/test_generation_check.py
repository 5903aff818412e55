"""What the generation check rests on: how hard sampled tokens are to believe, and a model without positive logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.batch import SamplingBatch
from engine.layers.sampler import filter_top_k_top_p, sample
from harness.budgets import improbability
from harness.checks.generation import NUM_SAMPLED, SAMPLING, negative_logits_checkpoint
from harness.checks.weights import small_twin
from harness.faults.layouts import LAYOUTS
from harness.truth import Truth

NUM_DRAWS = 60


def draw_logits(seed: int, *, spread: float = 2.0, vocab_size: int = 131) -> Tensor:
    return spread * torch.randn(NUM_SAMPLED, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def engine_draws(logits_TV: Tensor, seed: int) -> list[int]:
    """Tokens that the engine's sampler draws from these logits, in float32."""
    size = len(logits_TV)
    ids: list[int] = sample(logits_TV.float(), SamplingBatch(
        temperature_R=torch.full((size,), SAMPLING["temperature"]), top_k_R=torch.zeros(size, dtype=torch.int32),
        top_p_R=torch.full((size,), SAMPLING["top_p"]), seed_R=torch.full((size,), seed), position_R=torch.arange(size),
        banned_row_X=torch.zeros(0, dtype=torch.int64), banned_token_X=torch.zeros(0, dtype=torch.int64),
        all_greedy=False, filters=True)).tolist()
    return ids


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_what_the_engine_draws_can_be_believed(spread: float) -> None:
    worst = 0.0
    for seed in range(NUM_DRAWS):
        logits_TV = draw_logits(seed, spread=spread)
        worst = max(worst, improbability(logits_TV.float(), logits_TV, engine_draws(logits_TV, seed), **SAMPLING))
    assert 0 <= worst < 0.5


def test_tokens_of_other_logits_can_not_be_believed() -> None:
    logits_TV = [draw_logits(seed, spread=3.0) for seed in range(NUM_DRAWS)]
    caught = sum(improbability(own.float(), own, engine_draws(other, 0), **SAMPLING) > 1
                 for own, other in zip(logits_TV, [*logits_TV[1:], logits_TV[0]], strict=True))
    assert caught == NUM_DRAWS


def test_tokens_from_outside_the_nucleus_can_not_be_believed() -> None:
    logits_TV = draw_logits(0, spread=3.0)
    size = len(logits_TV)
    kept = filter_top_k_top_p(logits_TV, torch.full((size,), SAMPLING["temperature"]), torch.zeros(size, dtype=torch.int32),
                              torch.full((size,), SAMPLING["top_p"]))
    outside = logits_TV.masked_fill(kept > -torch.inf, -torch.inf)
    assert improbability(logits_TV.float(), logits_TV, engine_draws(outside, 0), **SAMPLING) > 1


def test_nothing_drawn_is_nothing_to_disbelieve() -> None:
    logits_TV = draw_logits(0)
    assert improbability(logits_TV, logits_TV, [], **SAMPLING) == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_twin_has_no_positive_logit_and_a_padded_vocabulary(name: str, tmp_path: Path) -> None:
    for tp_size in (2, 4):
        config = small_twin(LAYOUTS[name].config, tp_size)
        assert config["vocab_size"] % tp_size
        folder = negative_logits_checkpoint(tmp_path / str(tp_size), config, dtype=LAYOUTS[name].dtype, seed=tp_size)
        truth = Truth(folder, dtype=LAYOUTS[name].dtype)
        assert max(logits.max().item() for logits in truth.exact_logits) < 0

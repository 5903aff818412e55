"""What the generation check rests on: which tokens may be turned round, how hard drawn ones are to believe, the sampler alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import engine.execution.runner as runner
import engine.layers.sampler as sampler
import harness.checks.draws as draws_check
from engine.layers.sampler import filter_top_k_top_p, sample
from engine.scheduling.batch import SamplingBatch
from harness.checks.base import CheckContext, Outcome, from_json
from harness.checks.draws import DrawCase, draw_cases, run_sampler
from harness.checks.generation import NUM_SAMPLED, SAMPLING, check_model, compare
from harness.checks.talker import negative_logits_checkpoint
from harness.checks.weights import narrow_config
from harness.faults.layouts import LAYOUTS
from harness.subjects import engine_rank
from harness.verification.budgets import improbability, improbable_counts, near_tie_margins
from harness.verification.reference_results import NUM_NEW_TOKENS, ReferenceResults
from tests.harness.checking import alone, assert_green, context_of, on_threads, outcome_of, run_kinds
from tests.harness.conftest import MakeModel

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
        filters=True)).tolist()
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
        config = narrow_config(LAYOUTS[name].config, tp_size)
        assert config["vocab_size"] % tp_size
        folder = negative_logits_checkpoint(tmp_path / str(tp_size), config, dtype=LAYOUTS[name].dtype, seed=tp_size)
        results = ReferenceResults(folder, dtype=LAYOUTS[name].dtype)
        assert max(logits.max().item() for logits in results.exact_logits) < 0


def test_counts_that_chance_gives_can_be_believed_and_others_not() -> None:
    p_V = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    for seed in range(50):
        drawn = torch.multinomial(p_V, 400, replacement=True, generator=torch.Generator().manual_seed(seed))
        assert improbable_counts(drawn.bincount(minlength=4), p_V) < 1
    assert improbable_counts(torch.tensor([320, 40, 40, 0]), p_V) > 1
    assert improbable_counts(torch.tensor([200, 100, 99, 1]), p_V) == float("inf")


@pytest.mark.parametrize(("dtype", "seed"), [("float32", 0), ("bfloat16", 1), ("float16", 2)])
def test_the_sampler_by_itself_is_green(dtype: str, seed: int) -> None:
    answers = [answer for case in draw_cases(random.Random(seed), dtype, 1) for answer in run_sampler(alone(), case)]
    assert [answer.problem for answer in answers] == [None] * draws_check.NUM_CASES


Plant = Callable[[pytest.MonkeyPatch], None]


def with_params(change: Callable[[SamplingBatch], dict[str, Any]]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(engine_rank, "sample", lambda logits, sampling: sample(logits, replace(sampling, **change(sampling))))

    return plant


def nucleus_of_the_whole_vocabulary(patch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
        return torch.minimum(filter_top_k_top_p(logits, temperature, top_k, torch.ones_like(top_p)),
                             filter_top_k_top_p(logits, temperature, torch.zeros_like(top_k), top_p))

    patch.setattr(sampler, "filter_top_k_top_p", wrong)


def nucleus_before_the_temperature(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sampler, "filter_top_k_top_p", lambda logits, temperature, top_k, top_p: filter_top_k_top_p(
        logits, torch.ones_like(temperature), top_k, top_p))


@pytest.mark.parametrize("plant", [
    nucleus_of_the_whole_vocabulary, nucleus_before_the_temperature,
    with_params(lambda given: {"top_k_R": given.top_k_R.max().expand_as(given.top_k_R)}),
    with_params(lambda given: {"top_k_R": torch.where(given.top_k_R > 1, given.top_k_R + 1, given.top_k_R)}),
    with_params(lambda given: {"position_R": torch.zeros_like(given.position_R)}),
    with_params(lambda given: {"seed_R": torch.zeros_like(given.seed_R)}),
    with_params(lambda given: {"temperature_R": given.temperature_R.clamp(max=1.0)}),
    with_params(lambda given: {"position_R": given.position_R + torch.arange(len(given.position_R))}),
    with_params(lambda given: {"banned_row_X": given.banned_row_X[:0], "banned_token_X": given.banned_token_X[:0]}),
], ids=["nucleus of the whole vocabulary", "nucleus before the temperature", "one top_k for all rows", "top_k one too large",
        "no position", "no seed", "temperature at most 1", "place in the batch", "nothing banned"])
def test_a_fault_in_the_sampler_is_seen_and_can_be_replayed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_threads(2) as subject:
        context = CheckContext(results=cast(ReferenceResults, SimpleNamespace(dtype="bfloat16")), subject=subject, options={},
                               seed=0, kind="sampler")
        with monkeypatch.context() as patch:
            plant(patch)
            outcome = outcome_of("generation", context)
            again = outcome_of("generation", replace(context, case=outcome.case))
        assert outcome.finding is not None
        assert again.finding is not None
        assert outcome.module == again.module == "sampler"
        assert asdict(from_json(DrawCase, json.loads(json.dumps(outcome.case)))) == outcome.case
        assert_green(outcome_of("generation", replace(context, case=outcome.case)))


def flipped(step: int, *, drop_last: bool = False) -> Outcome:
    """What comes of the second-best token in this step of five. Rounding may turn steps 0 and 1 round, the first by far."""
    generator = torch.Generator().manual_seed(0)
    exact_TV = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    top_TK = exact_TV.topk(2).indices
    noise_TV = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    # The baseline happens to be good everywhere; simulated rounding tells which rows magnify it.
    baseline_TV = exact_TV + 1e-3 * noise_TV
    simulated_TV = exact_TV + 2.0**-8 * torch.tensor([3000.0, 10.0, 1.0, 1.0, 1.0])[:, None] * noise_TV
    ties_T = near_tie_margins(baseline_TV, exact_TV, "bfloat16", [simulated_TV])
    margins_T = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5]) * ties_T
    margins_T[2:] = ties_T[0] / 2  # no tie for these rows, though it would be for the first
    ids = top_TK[:, 0].tolist()
    drawn = [*ids[:step], int(top_TK[step, 1]), *ids[step + 1 :]]
    results = SimpleNamespace(
        dtype="bfloat16", config={"vocab_size": 40}, prompts=((1, 2),), num_new_tokens=NUM_NEW_TOKENS,
        greedy=[SimpleNamespace(token_ids=ids, margins=margins_T.tolist())], greedy_baseline_logits=[baseline_TV],
        greedy_exact_logits=[exact_TV], greedy_simulated_logits=[simulated_TV[None]],
        exact=SimpleNamespace(logits=lambda sequences: [torch.zeros(len(sequences[0]), 40)]),
        baseline=SimpleNamespace(logits=lambda sequences: [torch.zeros(len(sequences[0]), 40)]))

    def draw(prompts: Any, params: Any) -> list[list[int]]:
        done = len(prompts[0]) - 2
        greedy = drawn[done:] if done <= step else ids[done:]
        sampled = list(range(own["max_tokens"])) if (own := params[-1])["temperature"] else []
        return [greedy[:-1] if drop_last else greedy, *([sampled] if sampled else [])]

    return compare(cast(ReferenceResults, results), 0, draw)


def test_a_tie_is_excused_by_what_its_own_row_allows() -> None:
    for step in (0, 1):
        outcome = flipped(step)
        assert outcome.finding is None
        assert outcome.compared == 5 + NUM_SAMPLED
    for step in (2, 3, 4):
        finding = flipped(step).finding
        assert finding is not None
        assert finding.startswith(f"prompt 0, step {step}: expected token")


def test_an_answer_that_is_too_short_is_a_finding() -> None:
    assert "has 4 tokens, max_tokens=5" in (flipped(0, drop_last=True).finding or "")


@pytest.mark.parametrize(("name", "tp_size"), [
    ("llama", 1), *(pytest.param(name, 2, marks=pytest.mark.endurance) for name in ("llama", "qwen3"))])
def test_what_is_judged_is_counted_kind_by_kind(tiny_model: MakeModel, name: str, tp_size: int) -> None:
    kinds = run_kinds("generation", tiny_model(LAYOUTS[name].config), tp_size=tp_size)
    sampler, model, requests = kinds
    for part in kinds:
        assert_green(part)
    assert [part.kind for part in kinds] == ["sampler", "model", "requests"]
    assert (sampler.cases, sampler.compared) == (draws_check.NUM_CASES, draws_check.NUM_CASES * 13 * draws_check.NUM_DRAWS)
    # Four prompts, each greedy and sampled; a tie that rounding turned round costs no token.
    assert (model.cases, model.compared) == (8, 4 * (NUM_NEW_TOKENS + NUM_SAMPLED))
    assert requests.cases == 80
    assert requests.compared > 2500


@pytest.mark.parametrize("limit", ["sliding_window", "max_position_embeddings"])
def test_a_model_of_short_sequences_gets_short_prompts_and_answers(tiny_model: MakeModel, limit: str) -> None:
    config = {key: value for key, value in LAYOUTS["llama"].config.items() if not key.endswith("_bias")}
    with context_of(tiny_model({**config, "model_type": "mistral", limit: 9}), "float32") as context:
        model = check_model(context)
    assert_green(model)
    assert (model.cases, model.compared) == (8, 4 * (4 + 4))


def test_always_the_same_token_is_seen_where_the_real_model_runs(tiny_model: MakeModel,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "sample", lambda logits, sampling: torch.full((len(logits),), 7))
    kinds = run_kinds("generation", tiny_model(LAYOUTS["llama"].config))
    assert [part.kind for part in kinds if part.finding is not None] == ["model"]
    assert kinds[-1].skipped == "not run after a finding in model"

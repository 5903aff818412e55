"""The logits check sees a wrong eps in any norm, which only rows near eps show; and it compares every logit of every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import harness.checks.logits as logits_check
from engine.layers.norm import RMSNorm
from harness.checks.logits import MODEL, NEAR_EPS, compare_logits, near_eps_model
from harness.faults.layouts import LAYOUTS
from harness.subjects.engine_rank import EngineRank
from harness.verification.cases import load_case
from harness.verification.places import Search
from harness.verification.reference_results import SCHEDULE_LENGTHS, ReferenceResults
from harness.verification.verify import VerifyPlan, replay, verify
from tests.harness.checking import assert_green, context_of, outcome_of, run_kinds
from tests.harness.conftest import MakeModel
from tests.reference.tiny import small_config

FAMILIES = ("llama", "qwen2", "qwen3")
SEEDS = 10
ONE_THEN_ALL = pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, SEEDS), marks=pytest.mark.endurance)], ids=str)
NORMS = {
    "every norm": ("",), "the final norm": ("model.norm",), "norms before attention": ("input_layernorm",),
    "norms before the MLP": ("post_attention_layernorm",), "the last layer's first norm": ("layers.1.input_layernorm",),
    "the last layer's second norm": ("layers.1.post_attention_layernorm",), "norms of heads": ("q_norm", "k_norm"),
    "the last layer's norms of heads": ("layers.1.self_attn.q_norm", "layers.1.self_attn.k_norm"),
}
"""Which norms are wrong, by how their modules' names end."""


def set_eps(rank: EngineRank, ends: tuple[str, ...], times: float, eps: float) -> None:
    """Job: ``times * eps`` in the norms whose names end so, ``eps`` in the others."""
    model = rank.runner.model
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.eps = times * eps if name.endswith(ends) else eps


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_logit_of_every_token_is_judged_in_both_kinds(tiny_model: MakeModel, tp_size: int) -> None:
    kinds = run_kinds("logits", tiny_model(LAYOUTS["llama"].config), tp_size=tp_size)
    vocab_size = 60 + 7 * tp_size + (tp_size > 1)
    assert {part.kind: (part.cases, part.compared) for part in kinds} == {
        MODEL: (3, sum(SCHEDULE_LENGTHS) * 131), NEAR_EPS: (3, (17 + 11 + 5) * vocab_size)}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_tokens_on_both_sides_of_every_shard_border_are_among_the_inputs(tiny_model: MakeModel, seed: int) -> None:
    results = ReferenceResults(tiny_model(small_config()), dtype="bfloat16", seed=seed)
    vocab_size, sequences = results.config["vocab_size"], results.schedule.sequences
    sizes = {-(-vocab_size // tp_size) for tp_size in range(2, 7)}
    borders = {cut - side for size in sizes for cut in range(size, vocab_size, size) for side in (0, 1)}
    assert borders <= {token_id for sequence in sequences for token_id in sequence}
    assert all(vocab_size - 1 in sequence for sequence in sequences)


@pytest.mark.parametrize(("dtype", "tp_size"), [
    ("float32", 1), pytest.param("bfloat16", 1, marks=pytest.mark.endurance), ("bfloat16", 2)])
@pytest.mark.parametrize("family", FAMILIES)
@ONE_THEN_ALL
def test_a_wrong_eps_is_seen_in_any_norm_and_the_right_one_is_not(tiny_model: MakeModel, family: str, dtype: str, tp_size: int,
                                                                  seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_check, "search", lambda *_: Search(place=None))  # it takes longer than all the rest
    missed = []
    with context_of(tiny_model(LAYOUTS[family].config), dtype, tp_size=tp_size) as context:
        for seed in seeds:
            with near_eps_model(replace(context, seed=seed)) as small:
                assert_green(compare_logits(small))
                plants = [("every norm", times) for times in (0.1, 10.0, 0.0)]
                plants += [(norms, 0.1) for norms in NORMS if seed < 2 and (family == "qwen3" or "heads" not in norms)]
                for norms, times in plants:
                    small.subject.run(set_eps, NORMS[norms], times, small.results.config["rms_norm_eps"])
                    if compare_logits(small).finding is None:
                        missed.append(f"{times} eps in {norms}, seed={seed}")
    assert not missed


@pytest.mark.parametrize(("eps", "tp_size"), [
    (1e-5, 2), (1e-12, 1),
    *(pytest.param(eps, tp_size, marks=pytest.mark.endurance) for eps, tp_size in ((1e-5, 1), (1e-6, 1), (1e-6, 2), (1e-12, 2)))])
@pytest.mark.parametrize("family", FAMILIES)
@ONE_THEN_ALL
def test_float16_is_green_however_small_eps_is(tiny_model: MakeModel, family: str, eps: float, tp_size: int,
                                               seeds: range) -> None:
    """Its smallest numbers are larger than the square root of some models' eps."""
    with context_of(tiny_model({**LAYOUTS[family].config, "rms_norm_eps": eps}), "float16", tp_size=tp_size) as context:
        for seed in seeds if eps == 1e-5 else seeds[:1]:
            with near_eps_model(replace(context, seed=seed)) as small:
                assert_green(compare_logits(small))


def test_no_row_that_is_normed_is_far_from_eps(tiny_model: MakeModel) -> None:
    for family in FAMILIES:
        with context_of(tiny_model(LAYOUTS[family].config), "bfloat16") as context, near_eps_model(context) as small:
            eps, exact = small.results.config["rms_norm_eps"], small.results.exact_activations(0)
            hidden = exact.outputs["model.embed_tokens"]
            for number in range(2):
                for branch in ("self_attn.o_proj", "mlp.down_proj"):
                    sizes_T = hidden.square().mean(-1) / eps
                    assert 0.1 < sizes_T.median() < 4
                    hidden = hidden + exact.outputs[f"model.layers.{number}.{branch}"]
                if family == "qwen3":
                    for name in ("q_proj", "k_proj"):
                        heads = exact.outputs[f"model.layers.{number}.self_attn.{name}"].unflatten(-1, (-1, 4))
                        assert 0.1 < (heads.square().mean(-1) / eps).median() < 4
            assert 0.1 < (hidden.square().mean(-1) / eps).median() < 4


def tenth(patch: pytest.MonkeyPatch) -> None:
    init = RMSNorm.__init__
    patch.setattr(RMSNorm, "__init__", lambda self, size, eps, **how: init(self, size, eps / 10, **how))


def test_a_wrong_eps_is_a_finding_of_its_kind_names_the_first_norm_and_runs_again(
        tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(LAYOUTS["llama"].config, "bfloat16")
    plan = VerifyPlan(model=str(folder), folder=folder, tp_sizes=(2,), fabric="threads", checks=("logits",),
                      cases_folder=tmp_path)
    with monkeypatch.context() as patch:
        tenth(patch)
        model, near_eps = verify(plan).checks
        assert (model.kind, model.verdict) == (MODEL, "pass")
        assert (near_eps.kind, near_eps.verdict) == (NEAR_EPS, "finding")
        assert near_eps.module == "model.layers.0.input_layernorm"
        assert near_eps.message.startswith(
            "not TP: differs at tp_size=1 too, first at model.layers.0.input_layernorm; "
            "a small model of 2 layers with mean squares near eps=1e-05: logits of ")
        saved = load_case(tmp_path / "logits-near-eps-tp2-threads.safetensors")
        assert replay(saved, folder)[1] == "it fails again, to the bit"
    assert replay(saved, folder)[1] == "it passes now"


def test_the_model_is_back_on_its_ranks_whatever_became_of_the_small_one(tiny_model: MakeModel,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def own(rank: EngineRank) -> int:
        return rank.model_config.vocab_size

    def planted(*arguments: Any, **how: Any) -> None:
        raise ValueError("planted")

    with context_of(tiny_model(LAYOUTS["llama"].config), "float32") as context:
        assert_green(outcome_of("logits", context))
        assert context.subject.run(own) == [131, 131]
        with monkeypatch.context() as patch:
            patch.setattr(EngineRank, "load", planted)
            assert "planted" in (outcome_of("logits", context).error or "")
        assert context.subject.run(own) == [131, 131]
        assert_green(outcome_of("logits", context))

"""``verify`` on tiny random models of every layout: green on correct code, and red where something is wrong."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import harness.verification.verify
from harness.checks import CHECK_NAMES, all_checks
from harness.checks.base import Check, CheckContext, Outcome
from harness.strategies import model_configs
from harness.subjects.engine_rank import EngineRank
from harness.verification.verify import VerifyPlan, verify
from reference.checkpoints import random_checkpoint
from reports.records import CheckRow, Report, whole_checks
from tests.harness.checking import check_of
from tests.harness.conftest import MakeModel
from tests.reference.tiny import small_config

MANY_SIZES = (2, 3, 4, 5, 6, 8)


QUICK = tuple(name for name in CHECK_NAMES if name != "lifecycle")
"""Without the one that takes ten seconds and does not depend on the model."""
WITHOUT_GENERATION = tuple(name for name in QUICK if name != "generation")


@pytest.fixture
def without_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go to a model of the check's own, whatever the layout: ``test_processes_are_green_too`` runs them."""
    check = all_checks()["generation"]
    parts = tuple(part for part in check.parts if part.kinds != ("requests",))
    assert len(parts) == len(check.parts) - 1
    monkeypatch.setitem(all_checks(), "generation", replace(check, parts=parts))


def green(folder: Path, tp_sizes: tuple[int, ...], fabric: str, **options: Any) -> Report:
    options.setdefault("checks", QUICK)
    report = verify(VerifyPlan(model="tiny", folder=folder, tp_sizes=tp_sizes, fabric=fabric, **options))
    assert [row.message for row in report.checks if row.verdict != "pass"] == []
    assert [(row.tp_size, row.check) for row in whole_checks(report.checks)] == [
        (tp_size, check) for tp_size in tp_sizes for check in options["checks"]]
    assert report.exit_code == 0
    return report


@pytest.mark.usefixtures("without_requests")
@pytest.mark.parametrize(("family", "num_q_heads", "num_kv_heads", "dtype", "tp_sizes"), [
    ("llama", 9, 3, "bfloat16", (2,)),  # KV heads shared by two ranks; fewer than ranks are below
    pytest.param("llama", 9, 3, "bfloat16", (5,), marks=pytest.mark.endurance),
    pytest.param("qwen2", 10, 5, "float32", (4,), marks=pytest.mark.endurance),
    pytest.param("qwen3", 8, 8, "bfloat16", (8,), marks=pytest.mark.endurance),
    pytest.param("qwen3", 4, 4, "bfloat16", (4,), marks=pytest.mark.endurance),
    pytest.param("llama", 8, 1, "float16", (3,), marks=pytest.mark.endurance),
    pytest.param("mistral", 8, 2, "float32", (3,), marks=pytest.mark.endurance),
    pytest.param("phi3", 8, 8, "bfloat16", (2,), marks=pytest.mark.endurance),  # Phi-3-mini's layout; Phi-4-mini's is below
])
def test_any_layout_is_green_on_any_number_of_ranks(tiny_model: MakeModel, family: str, num_q_heads: int, num_kv_heads: int,
                                                    dtype: str, tp_sizes: tuple[int, ...]) -> None:
    folder = tiny_model(small_config(family, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads), dtype)
    report = green(folder, tp_sizes, "threads", checks=WITHOUT_GENERATION)
    green(folder, tp_sizes[:1], "threads", checks=("generation",))
    assert {row.fabric for row in report.checks} == {"threads"}
    assert {row.dtype for row in report.checks} == {dtype}
    assert report.run.switches["reference attention"] == "sdpa"


@pytest.mark.usefixtures("without_requests")
def test_heads_that_turn_in_part_and_by_longrope_are_green(tiny_model: MakeModel) -> None:
    """The layout of Phi-4-mini: three query heads a KV head, tied, fused on disk; a sequence ends at the original length."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}
    config = small_config("phi3", num_q_heads=6, num_kv_heads=2, hidden_size=96, tie_word_embeddings=True, sliding_window=128,
                          partial_rotary_factor=0.75, original_max_position_embeddings=96,
                          rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors})
    folder = tiny_model(config, "bfloat16")
    green(folder, (3,), "threads", checks=WITHOUT_GENERATION)
    green(folder, (2,), "threads", checks=("generation",))


@pytest.mark.multirank
@pytest.mark.parametrize(("family", "checks"), [
    ("llama", QUICK), pytest.param("qwen3", WITHOUT_GENERATION, marks=pytest.mark.endurance)])
@pytest.mark.endurance
def test_processes_are_green_too(tiny_model: MakeModel, family: str, checks: tuple[str, ...]) -> None:
    folder = tiny_model(small_config(family, num_q_heads=9, num_kv_heads=3), "bfloat16")
    report = green(folder, (1, 3), "auto", checks=checks)
    assert [row.fabric for row in report.checks if row.name == "logits: model"] == ["solo", "gloo"]


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), tp_size=st.sampled_from(MANY_SIZES), dtype=st.sampled_from(["bfloat16", "float16", "float32"]))
@pytest.mark.endurance
def test_drawn_models_are_green(data: st.DataObject, tp_size: int, dtype: str) -> None:
    config = data.draw(model_configs(tp_size))
    with tempfile.TemporaryDirectory() as folder:
        green(random_checkpoint(folder, config, dtype=dtype), (tp_size,), "threads", checks=WITHOUT_GENERATION)


class Given(NamedTuple):
    """A part that finds what the test says."""

    parts: tuple[Outcome, ...]
    needs: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(part.kind for part in self.parts)

    def outcomes(self, context: CheckContext) -> tuple[Outcome, ...]:
        return self.parts


def doze(rank: EngineRank) -> None:
    time.sleep(600)


def test_a_check_of_several_kinds_has_a_row_for_each(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind in which nothing was judged is an error, and the findings of the others are told."""
    kinds = (Outcome(kind="a", cases=2, compared=5), Outcome(kind="b", cases=3, compared=0),
             Outcome(kind="c", cases=1, compared=7, finding="off", error_over_budget=2.0))
    done: list[CheckRow] = []

    def rows(*parts: Outcome) -> list[CheckRow]:
        monkeypatch.setitem(all_checks(), "collectives", Check(name="collectives", question="?", parts=(Given(parts),)))
        return verify(VerifyPlan(model="tiny", folder=tiny_model(small_config()), tp_sizes=(1,), checks=("collectives",)),
                      on_row=done.append).checks

    assert [(row.name, row.verdict, row.cases, row.compared) for row in rows(*kinds)] == [
        ("collectives: a", "pass", 2, 5), ("collectives: b", "error", 3, 0), ("collectives: c", "finding", 1, 7)]
    assert [(row.name, row.verdict, row.cases, row.message) for row in done] == [("collectives", "finding", 6, "c: off")]
    _, empty = rows(*kinds[:2])
    assert (empty.verdict, done[-1].verdict) == ("error", "error")
    assert "kind='b': nothing was judged in cases=3" in empty.message


@pytest.mark.multirank
def test_a_job_that_hangs_is_a_finding_and_the_next_check_runs(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(context: CheckContext) -> Outcome:
        context.subject.run(doze)
        raise AssertionError("it ended")

    monkeypatch.setattr(harness.verification.verify, "JOB_TIMEOUT_S", 5.0)
    monkeypatch.setitem(all_checks(), "collectives", check_of(hangs, name="collectives", needs_model=False))
    report = verify(VerifyPlan(model="tiny", folder=tiny_model(small_config()), tp_sizes=(2,), fabric="gloo",
                               checks=("collectives", "weights")))
    assert [row.verdict for row in whole_checks(report.checks)] == ["finding", "pass"]
    assert "no answer within timeout_s=5" in report.checks[0].message


def test_a_nan_in_a_checkpoint_is_a_finding_of_weights_at_every_tp_size_and_stops_no_other_check(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, small_config())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify(VerifyPlan(model="tiny", folder=folder, tp_sizes=(1, 2), fabric="threads",
                               checks=("logits", "weights", "layers")))
    assert [row.verdict for row in whole_checks(report.checks)] == ["error", "finding", "pass"] * 2
    for row in whole_checks(report.checks)[:2]:
        assert "model.layers.0.mlp.up_proj.weight[3, 5] is nan" in row.message
    assert report.exit_code == 1

"""Faults declare what they must, leave nothing behind, and the gate says what the checks make of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from engine.config import ModelConfig
from engine.frontend.sampling import SamplingParams
from engine.parallel.group import ThreadGroup, TPGroup
from engine.ranks.ranks import RankContext
from engine.scheduling.batch import SamplingBatch, StepBatch
from harness.checks import CHECK_NAMES, all_checks
from harness.checks.base import CheckContext, Outcome, together
from harness.cli import app
from harness.faults import FAULTS, base
from harness.faults.base import LOAD, Fault, Patches, Where
from harness.faults.catalogue import BUGS, NOT_PLANTED
from harness.faults.layouts import LAYOUTS
from harness.faults.run import LOCALISATION, Examination, FaultPlan, checks_of, run_faults
from harness.interrupted import WHY
from harness.subjects.engine import EngineSubject
from harness.verification.classify import Kind
from harness.verification.localise import points
from reference.checkpoints import as_config
from reports.by_seed import CONTROL
from reports.records import CheckRow, Report, read_report
from tests.harness.checking import check_of
from tests.harness.installed import ROOT

everyone = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def alone(rank: int, size: int) -> RankContext:
    """A rank whose others are not there: for patches, which need no collective."""
    return RankContext(tp=TPGroup(rank, size, "alone"), device=torch.device("cpu"))


def the_engine() -> dict[tuple[str, str], int]:
    """What every class and module of the engine consists of, by (owner, attribute)."""
    found: dict[tuple[str, str], int] = {}
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "engine"]:
        owners = [module, *(each for each in vars(module).values() if isinstance(each, type))]
        for owner in owners:
            if owner is module or owner.__module__ == module.__name__:
                found |= {(f"{module.__name__}:{owner.__name__}", name): id(value) for name, value in vars(owner).items()}
    return found


@contextmanager
def planted(fault: Fault, rank: int) -> Iterator[None]:
    """The fault, in this process as in that rank."""
    patches = base.planted(fault, TPGroup(rank, fault.tp_sizes[0], "alone"))
    try:
        yield
    finally:
        patches.close()


def test_there_are_faults_enough_and_controls_enough() -> None:
    controls = [fault for fault in FAULTS.values() if fault.is_control]
    assert len(FAULTS) - len(controls) >= 30
    assert len(controls) >= 6


@everyone
def test_a_fault_declares_what_it_must(fault: Fault) -> None:
    assert fault.what[0].isupper()
    assert fault.what.endswith(".")
    assert set(fault.rows) <= BUGS.keys()
    assert set(fault.checks) <= {LOAD, *CHECK_NAMES}
    assert fault.layout in LAYOUTS
    assert fault.where in get_args(Where)
    model = ModelConfig.from_hf(as_config(LAYOUTS[fault.layout].config))
    assert fault.tp_sizes
    fewest = 1 if fault.device == "cuda" else 2  # a graph can be wrong on one rank alone
    assert all(fewest <= tp_size <= model.num_q_heads for tp_size in fault.tp_sizes)
    rows = EngineSubject.modules(LAYOUTS[fault.layout].config)
    assert fault.module is None or fault.module in {point.label for point in points(rows)}
    assert fault.effect is None or (fault.effect in get_args(Kind) and fault.module is not None)
    assert (fault.module is not None) <= ("logits" in fault.checks), "localisation begins with the logits"


def test_every_public_bug_is_planted_or_there_is_a_reason() -> None:
    planted = {number for fault in FAULTS.values() for number in fault.rows}
    assert planted | NOT_PLANTED.keys() == BUGS.keys()
    assert not planted & NOT_PLANTED.keys()


def test_every_kind_of_effect_is_made_by_some_fault() -> None:
    assert {fault.effect for fault in FAULTS.values()} - {None} == set(get_args(Kind))


@everyone
def test_a_fault_changes_the_engine_and_taking_it_out_restores_it(fault: Fault) -> None:
    before = the_engine()
    was_changed = False
    for rank in range(fault.tp_sizes[0]):
        with planted(fault, rank):
            was_changed |= the_engine() != before
        assert the_engine() == before
    assert was_changed


@pytest.mark.parametrize(("name", "in_rank", "in_driver"), [
    ("reduced-twice", True, False), ("killed-rank-not-seen", False, True), ("first-eos-alone", True, True)])
def test_a_fault_is_planted_where_it_belongs(name: str, in_rank: bool, in_driver: bool) -> None:
    before, rank = the_engine(), alone(0, 2)
    base.plant(rank, name)
    assert (the_engine() != before) is in_rank
    base.remove(rank)
    patches = base.planted_in_driver(FAULTS[name])
    assert (the_engine() != before) is in_driver
    patches.close()
    assert the_engine() == before


NEEDS_NO_FAULT = {
    **dict.fromkeys(("StepBatch.num_decodes", "StepBatch.prefill_cu_seqlens_S1", "StepBatch.max_decode_context_len",
                     "StepBatch.max_prefill_len"), "the kernels of a GPU alone read it, and the gate's ranks run on a CPU"),
    "StepBatch.sampling": "its own fields have faults",
    "ModelConfig.rms_norm_eps": "planted in the norms that compute with it, not where it is read",
}
"""Reasons, by field."""


def test_every_field_that_a_request_a_model_or_a_step_has_is_got_wrong_by_some_fault() -> None:
    there = {f"{kind.__name__}.{field.name}" for kind in (SamplingParams, ModelConfig, SamplingBatch, StepBatch)
             for field in fields(kind)}
    wrong = {fault.field for fault in FAULTS.values() if not fault.is_control} - {""}
    assert wrong | NEEDS_NO_FAULT.keys() == there
    assert not wrong & NEEDS_NO_FAULT.keys()


def test_no_two_faults_patch_the_same_thing_in_the_same_way() -> None:
    assert len({fault.plant for fault in FAULTS.values()}) == len(FAULTS)
    assert len({fault.what for fault in FAULTS.values()}) == len(FAULTS)


def test_threads_are_refused_for_they_share_what_is_patched() -> None:
    rank = RankContext(tp=ThreadGroup.create(2)[0], device=torch.device("cpu"))
    with pytest.raises(ValueError, match="fabric=threads"):
        base.plant(rank, "reduced-twice")


def test_a_fault_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(patch: Patches, tp: TPGroup) -> None:
        patch.replace(TPGroup, "barrier", lambda original: None)
        raise RuntimeError("no further")

    monkeypatch.setitem(FAULTS, "half", replace(FAULTS["reduced-twice"], name="half", plant=half))
    before = TPGroup.barrier
    rank = alone(0, 2)
    with pytest.raises(RuntimeError, match="no further"):
        base.plant(rank, "half")
    assert TPGroup.barrier is before
    assert rank.state == {}


def test_what_a_class_only_inherits_is_not_patched() -> None:
    with pytest.raises(KeyError):
        Patches().replace(ThreadGroup, "barrier", lambda original: None)


def test_uprooting_takes_the_subject_along() -> None:
    rank = alone(1, 2)
    before = the_engine()
    base.plant(rank, "row-bias-on-every-rank")
    assert the_engine() != before
    rank.state["subject"] = "built under the fault"
    base.remove(rank)
    assert the_engine() == before
    assert rank.state == {}


@pytest.mark.parametrize(("plan", "message"), [
    ({"only": ("no-such",)}, "no-such"), ({"tp_sizes": (1, 2)}, "2 or more"), ({"tp_sizes": (0,)}, "2 or more"),
    ({"device": "tpu"}, "cpu or cuda"),
])
def test_a_plan_that_makes_no_sense_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultPlan(**plan)


def test_each_fault_runs_on_the_fewest_ranks_that_show_it_unless_told() -> None:
    cases, invisible = FaultPlan().cases()
    assert [(fault.name, tp_size) for fault, tp_size in cases] == [
        (name, fault.tp_sizes[0]) for name, fault in FAULTS.items() if fault.device == "cpu"]
    assert {reason for _, reason in invisible} == {"not planted: it needs CUDA graphs"}
    assert [fault.name for fault, _ in invisible] == [name for name, fault in FAULTS.items() if fault.device == "cuda"]
    cases, invisible = FaultPlan(only=("reduced-twice", "kv-heads-dealt-in-turn"), tp_sizes=(4,)).cases()
    assert [(fault.name, tp_size) for fault, tp_size in cases] == [("kv-heads-dealt-in-turn", 4)]
    assert [fault.name for fault, _ in invisible] == ["reduced-twice"]


def test_a_fault_runs_the_checks_that_must_see_it_and_a_control_all_of_them() -> None:
    assert checks_of(FAULTS["minimum-became-a-sum"]) == ["collectives"]
    assert checks_of(FAULTS["row-bias-through-the-weights-loader"]) == ["layers"], "to load is no check"
    assert checks_of(FAULTS["killed-rank-not-seen"]) == ["lifecycle"]
    assert checks_of(FAULTS["one-barrier-more"]) == [name for name in CHECK_NAMES if name != "lifecycle"]
    assert checks_of(FAULTS["answers-awaited-in-short-naps"]) == list(CHECK_NAMES)


def test_on_a_gpu_what_needs_graphs_is_planted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cases, rest = FaultPlan(device="cuda").cases()
    assert cases
    assert {(fault.device, tp_size) for fault, tp_size in cases} == {("cuda", 1)}
    assert {fault.name: reason for fault, reason in rest}["reduce-faked-while-capturing"] == \
        "not planted: it needs 2 GPUs, and there are 1"
    assert {fault.name: reason for fault, reason in rest}["reduced-twice"] == "not planted: it is one of a CPU"


def test_what_is_not_visible_at_the_sizes_asked_for_is_skipped_and_told() -> None:
    report = run_faults(FaultPlan(only=("reduced-twice",), tp_sizes=(7,)))
    (row,) = report.checks
    assert (row.verdict, "tp_sizes=(2,) alone" in row.message) == ("skipped", True)
    assert report.exit_code == 3


def test_the_smallest_case_is_what_a_check_tells_of_it() -> None:
    red = Outcome(cases=1, compared=1, finding="other ids\nat step 3")
    for outcome, smallest in ((red, "generation: other ids"),
                              (replace(red, extra={"smallest_case": "two requests"}), "generation: two requests")):
        assert Examination(outcomes={"generation": outcome}, crashed={}, seconds=0.0).smallest == smallest


# Caught by different checks: those of weights and layers, of collectives and logits, of the generation.
REPRESENTATIVE = ("same-rows-on-every-rank", "logits-of-the-step-before", "seed-of-each-rank")
MORE = ("bias-left-at-zero", "reduced-twice", "last-slot-of-a-block-missed", "row-bias-on-every-rank",
        "row-bias-through-the-weights-loader")
LEFT_ALONE = "sums-in-two-messages"


def run_on_the_command_line(faults: tuple[str, ...], out: Path, *, control: str | None = None) -> Report:
    only = [word for name in (*faults, control) if name is not None for word in ("--only", name)]
    result = CliRunner().invoke(app, ["faults", *only, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"{len(faults)} of {len(faults)} faults seen" in result.output
    assert ("1 of 1 controls left alone" in result.output) == bool(control)
    return read_report(out)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_on_the_command_line(REPRESENTATIVE, tmp_path_factory.mktemp("faults"))


def row_of(report: Report, name: str) -> CheckRow:
    (row,) = [row for row in report.checks if row.fault == name]
    return row


def assert_seen_and_placed(report: Report, name: str) -> None:
    fault, row = FAULTS[name], row_of(report, name)
    assert row.verdict == "pass"
    assert set(fault.checks) <= set(row.extra["red"])
    assert (row.module, row.extra["effect"]) == (fault.module, fault.effect)
    assert row.extra["smallest"]


@pytest.mark.multirank
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_planted_fault_is_seen_by_its_checks_and_placed(report: Report, name: str) -> None:
    assert_seen_and_placed(report, name)


@pytest.mark.multirank
@pytest.mark.endurance
def test_more_faults_are_seen_by_their_checks_and_placed_and_a_control_turns_nothing_red(tmp_path: Path) -> None:
    report = run_on_the_command_line(MORE, tmp_path, control=LEFT_ALONE)
    for name in MORE:
        assert_seen_and_placed(report, name)
    row = row_of(report, LEFT_ALONE)
    assert (row.verdict, row.extra["red"]) == ("pass", {})
    assert row.compared >= 5


@pytest.mark.multirank
def test_a_fault_that_is_missed_a_control_that_is_minded_and_a_wrong_module_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    # The ranks plant by name, so they plant the same as ever: only what is expected of it changes, here.
    monkeypatch.setitem(FAULTS, "one-barrier-more", replace(FAULTS["one-barrier-more"], checks=("logits",)))
    monkeypatch.setitem(FAULTS, "last-rank-left-out", replace(FAULTS["last-rank-left-out"], checks=(), module=None, effect=None))
    monkeypatch.setitem(FAULTS, "reduced-twice", replace(FAULTS["reduced-twice"], module="lm_head"))
    monkeypatch.setattr("harness.faults.run.CHECK_NAMES", ("collectives", "logits"))  # instead of all
    report = run_faults(FaultPlan(only=("one-barrier-more", "last-rank-left-out", "reduced-twice")))
    assert {row.fault: row.verdict for row in report.checks} == {
        "one-barrier-more": "finding", "last-rank-left-out": "finding", "reduced-twice": "pass", LOCALISATION: "finding"}
    assert row_of(report, "one-barrier-more").message.startswith("missed by logits")
    assert row_of(report, "last-rank-left-out").message.startswith("a control must stay green: collectives")
    assert "model.layers.0.mlp.down_proj for lm_head" in row_of(report, LOCALISATION).message
    assert report.exit_code == 1


@pytest.mark.multirank
def test_a_check_that_raises_under_a_fault_is_an_error_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: CheckContext) -> Outcome:
        raise IndexError("no such row")

    monkeypatch.setitem(all_checks(), "weights", check_of(broken))
    (row,) = [row for row in run_faults(FaultPlan(only=("bias-left-at-zero",))).checks if row.fault != LOCALISATION]
    assert (row.verdict, "weights: IndexError: no such row" in row.message) == ("error", True)
    assert "logits" in row.extra["red"]


def cannot_plant(rank: RankContext, name: str) -> None:
    raise LookupError(f"no text to edit for {name}")


@pytest.mark.multirank
def test_a_fault_that_cannot_be_planted_is_an_error_and_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.faults.models.plant", cannot_plant)
    row, *others = run_faults(FaultPlan(only=("reduced-twice",))).checks
    assert (row.verdict, row.extra.get("red", {})) == ("error", {})
    assert "no text to edit for reduced-twice" in str(row.extra)
    assert others == []


@pytest.mark.multirank
def test_ctrl_c_loses_no_fault_that_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collectives, calls = all_checks()["collectives"], []

    def press_at_the_second(context: CheckContext) -> Outcome:
        calls.append(context)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return together(list(collectives.run(context)))

    monkeypatch.setitem(all_checks(), "collectives", check_of(press_at_the_second, name="collectives"))
    names = ("minimum-became-a-sum", "last-rank-left-out", "reduced-twice")
    result = CliRunner().invoke(app, ["faults", *(word for name in names for word in ("--only", name)), "--out", str(tmp_path)])
    assert result.exit_code == 3
    assert "interrupted" in result.stderr
    assert "1 of 1 faults seen" in result.stdout
    done, *rest = read_report(tmp_path).checks
    assert (done.fault, done.verdict) == (names[0], "pass")
    assert [(row.fault, row.verdict, row.message) for row in rest] == [
        (name, "error", f"{name}, {WHY}") for name in names[1:]]


def test_the_table_by_seed_has_every_fault_and_each_as_it_must_be() -> None:
    lines = (ROOT / "docs" / "faults_by_seed.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    must = {name: ", ".join(fault.checks) or CONTROL for name, fault in FAULTS.items() if fault.device == "cpu"}
    assert {fault: checks for _, fault, _, checks, _, _ in cells} == must
    assert {tuple(row[4:]) for row in cells} == {("0–9", "–")}


def test_an_unknown_fault_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["faults", "--only", "no-such", "--out", str(tmp_path)])
    assert result.exit_code == 2

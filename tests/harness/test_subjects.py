"""The wall: checks judge any subject by what it declares, without the engine, and nothing that is wrong or missing is green."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from harness.checks import CHECK_NAMES, all_checks
from harness.checks.base import Cases, CheckContext, Outcome, together
from harness.errors import UsageError
from harness.faults.layouts import LAYOUTS
from harness.subjects import subject_class
from harness.subjects.base import CAPABILITIES, Placement
from harness.subjects.engine import EngineSubject
from harness.subjects.engine_rank import EngineRank
from harness.subjects.on_ranks import OnRanks
from harness.subjects.rank import LayerSpec, StepInputs
from harness.verification.cases import load_case
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import VerifyPlan, replay, verify
from reference.hf import Activations
from reports.records import CheckRow, read_report, whole_checks
from tests.harness.conftest import MakeModel
from tests.harness.hand_cut import MISTAKES, HandCut, HandCutRank, OneAtATime, with_mistake
from tests.harness.installed import ROOT
from tests.harness.test_exit_codes import run
from tests.test_architecture import SHARED

OPTIONS = {"block_size": 16, "num_kv_blocks": 20, "max_num_batched_tokens": 64, "max_num_seqs": 8}
PAGE = ROOT / "docs" / "verify.md"
UNDECLARED = {"requests", "invariance", "processes"}


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    """Every bias, and a KV head that two ranks share."""
    return tiny_model({**LAYOUTS["llama"].config, "num_attention_heads": 6, "num_key_value_heads": 3}, "float32")


def outcomes_of(make: type[HandCut], folder: Path, checks: Sequence[str] = CHECK_NAMES) -> dict[str, list[Outcome]]:
    """What each check says of the subject on two ranks."""
    with make(Placement(tp_size=2)) as subject:
        context = CheckContext(results=ReferenceResults(folder, dtype="float32"), subject=subject, options=OPTIONS, seed=0)
        subject.load(folder, dtype="float32", options=OPTIONS)
        return {name: list(all_checks()[name].run(context)) for name in checks}


def test_another_rule_of_cutting_is_green_and_what_is_not_declared_is_not_applicable(folder: Path) -> None:
    report = verify(VerifyPlan(model="tiny", folder=folder, tp_sizes=(1, 2, 3), subject="tests.harness.hand_cut:HandCut",
                               checks=tuple(name for name in CHECK_NAMES if name != "generation")))
    assert [row.message for row in report.checks if row.verdict not in ("pass", "skipped")] == []
    assert {row.name for row in report.checks if row.verdict == "skipped"} == {"lifecycle"}
    assert [row.check for row in whole_checks(report.checks) if row.tp_size == 2 and row.verdict == "pass"] == [
        name for name in CHECK_NAMES if name not in ("generation", "lifecycle")]
    (row,) = [row for row in report.checks if row.check == "lifecycle" and row.tp_size == 2]
    assert "not applicable: subject=hand-cut does not declare 'processes'" in row.message


def test_its_generation_is_green_and_its_requests_are_not_applicable(folder: Path) -> None:
    sampler, model, requests = outcomes_of(HandCut, folder, ["generation"])["generation"]
    assert (sampler.finding, model.finding, sampler.error, model.error) == (None,) * 4
    assert min(sampler.compared, model.compared) > 0
    assert (requests.compared, (requests.skipped or "").partition(":")[0]) == (0, "not applicable")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_is_red_at_the_right_module(folder: Path, mistake: str) -> None:
    check, module = MISTAKES[mistake]
    found = {name: together(kinds) for name, kinds in outcomes_of(with_mistake(mistake), folder, [check, "logits"]).items()}
    assert {name for name, outcome in found.items() if outcome.finding is None} == set()
    assert found["logits"].module == module, found["logits"].finding


def test_every_check_runs_where_the_engine_can_not_be_imported(folder: Path) -> None:
    """But for the modules that say what a checkpoint's folder holds, which know of no rank and no shard."""
    script = f"""
import importlib.abc, sys
from pathlib import Path

ALLOWED = {{"engine", "engine.checkpoint", *{SHARED["reference"]!r}}}

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "engine" and name not in ALLOWED:
            raise ImportError(f"{{name}}: there is no engine here")

sys.meta_path.insert(0, Wall())
from harness.verification.verify import VerifyPlan, replay, verify

report = verify(VerifyPlan(model="tiny", folder=Path({str(folder)!r}), tp_sizes=(2,), subject="tests.harness.hand_cut:HandCut"))
assert not [name for name in sys.modules if name.partition(".")[0] == "engine" and name not in ALLOWED]
for row in report.checks:
    print(row.check, row.verdict, row.message.partition(":")[0])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == set(CHECK_NAMES)
    assert {line[1] for line in lines} == {"pass", "skipped"}
    assert {line[2] for line in lines if line[1] == "skipped"} == {"not applicable"}


# Subjects that are no good

Spoil = Callable[[Tensor], Tensor]


class _SpoiledScheduler(OneAtATime):
    """Brings tokens that are none."""

    def step(self) -> list[tuple[int, int]]:
        return [(number, -1) for number, _ in super().step()]


def spoiled(spoil: Spoil) -> type[HandCut]:
    """A subject that does this to all that it shows."""

    class SpoiledRank(HandCutRank):
        def shards(self) -> dict[str, Tensor]:
            return {name: spoil(shard) for name, shard in super().shards().items()}

        def logits(self, script: Any) -> list[Tensor]:
            return [spoil(logits) for logits in super().logits(script)]

        def activations(self, script: Any, sequence: int) -> Activations:
            seen = super().activations(script, sequence)
            return Activations(*({name: spoil(x) for name, x in side.items()} for side in (seen.inputs, seen.outputs)))

        def generate(self, prompts: Any, params: Any, before_step: Any = None) -> list[list[int]]:
            return [spoil(torch.tensor(ids, dtype=torch.float64)).nan_to_num(-1).long().tolist()
                    for ids in super().generate(prompts, params)]

        @property
        def collectives(self) -> Any:
            return _SpoiledCollectives(self, spoil)

        def layer(self, spec: LayerSpec) -> Callable[[Tensor], Tensor]:
            show = super().layer(spec)
            return lambda given: spoil(show(given))

        def attend(self, step: Any) -> dict[str, list[Tensor]]:
            return {name: [spoil(x) for x in parts] for name, parts in super().attend(step).items()}

        def rotary_tables(self, config: Mapping[str, Any], num_positions: int) -> tuple[Tensor, Tensor]:
            cos, sin = super().rotary_tables(config, num_positions)
            return spoil(cos), spoil(sin)

        def draw(self, logits: Tensor, rows: Any) -> Tensor:
            return spoil(super().draw(logits, rows).double()).nan_to_num(-1).long()

        def scheduler(self, limits: Any, launch: Callable[[StepInputs], list[int]]) -> OneAtATime:
            return _SpoiledScheduler(limits, launch)

        def cache_blocks(self) -> tuple[int, int]:
            return 0, 0

    return type("SpoiledHandCut", (HandCut,), {"rank_class": SpoiledRank})


class _SpoiledCollectives:
    def __init__(self, rank: HandCutRank, spoil: Spoil) -> None:
        self._rank, self._spoil = rank, spoil

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._spoil(self._rank.all_reduce(x))

    def all_gather(self, x: Tensor, *, dim: int) -> Tensor:
        return self._spoil(self._rank.all_gather(x, dim=dim))

    def all_reduce_min(self, value: int) -> int:
        self._rank.all_reduce_min(value)
        return -(2**40)


@pytest.mark.parametrize("spoil", [
    pytest.param(torch.zeros_like, id="zeros"), pytest.param(lambda x: x[:-1], id="too few"),
    pytest.param(lambda x: torch.full_like(x, float("nan")), id="NaN", marks=pytest.mark.endurance)])
def test_what_shows_nothing_right_has_no_green_row(folder: Path, spoil: Spoil) -> None:
    found = outcomes_of(spoiled(spoil), folder)
    kinds = [(name, outcome) for name, outcomes in found.items() for outcome in outcomes]
    green = [f"{name}: {outcome.kind}" for name, outcome in kinds
             if outcome.finding is outcome.error is outcome.skipped is None]
    assert green == []
    assert {name for name, outcome in kinds if outcome.finding} == set(CHECK_NAMES) - {"lifecycle"}


class Raising(HandCut):
    """Starts, and can nothing of what it declares."""

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        pass

    def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Any:
        raise RuntimeError("planted")

    shards = logits = activations = generate = run = layout  # type: ignore[assignment]


class Declaring(HandCut):
    """Declares all there is."""

    capabilities: ClassVar[frozenset[str]] = frozenset(CAPABILITIES)


def test_what_raises_has_no_green_row(folder: Path) -> None:
    found = outcomes_of(Raising, folder)
    for name, outcomes in found.items():
        errors = [outcome for outcome in outcomes if outcome.error is not None]
        assert errors or name == "lifecycle", name
        assert all(outcome.error or outcome.skipped for outcome in outcomes), name


def test_what_is_declared_and_missing_is_an_error_and_no_skip(folder: Path) -> None:
    found = outcomes_of(Declaring, folder, ["lifecycle", "generation"])
    assert [outcome.error is not None or outcome.finding is not None for outcome in found["lifecycle"]] == [True]
    assert found["generation"][-1].kind == "requests"
    assert found["generation"][-1].error is not None or found["generation"][-1].finding is not None


def test_another_ranks_shard_is_no_green_row_where_ranks_differ(folder: Path) -> None:
    class Turned(HandCutRank):
        def _cut(self, config: Mapping[str, Any], name: str, whole: Tensor) -> Tensor:
            mine, self.tp_rank = self.tp_rank, (self.tp_rank + 1) % self.tp_size
            try:
                return super()._cut(config, name, whole)
            finally:
                self.tp_rank = mine

    found = outcomes_of(type("TurnedHandCut", (HandCut,), {"rank_class": Turned}), folder,
                        ["weights", "layers", "logits", "generation"])
    green = {f"{name}: {outcome.kind}" for name, outcomes in found.items() for outcome in outcomes
             if outcome.finding is outcome.error is outcome.skipped is None}
    assert green == {"generation: sampler"}, "it has no shards"


def test_a_layout_that_leaves_an_element_out_is_a_finding_whatever_is_loaded(folder: Path) -> None:
    class Short(HandCut):
        def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Any:
            owned = super().layout(config, name, shape)
            if name.endswith("up_proj.weight"):
                object.__setattr__(owned, "indices", (owned.indices[0][:-1], *owned.indices[1:]))
            return owned

    outcome = together(outcomes_of(Short, folder, ["weights"])["weights"])
    assert outcome.finding is not None
    assert "model.layers.0.mlp.up_proj.weight" in outcome.finding
    assert "no rank is to hold 1 of 52 indices along dim=0, first 25" in outcome.finding


def test_too_few_ranks_that_answer_are_an_error(folder: Path) -> None:
    class Silent(HandCut):
        def run(self, job: Callable[..., Any], *args: Any, **how: Any) -> list[Any]:
            return super().run(job, *args, **how)[:1]

    found = outcomes_of(Silent, folder, ["collectives", "layers"])
    assert all("1 ranks answered, tp_size=2" in (together(kinds).error or "") for kinds in found.values())


class Plain(OnRanks):
    """The engine by what its ranks can do alone."""

    name: ClassVar[str] = "plain"
    rank_class = EngineRank


def test_ranks_alone_generate_what_the_front_door_does_and_load_again_what_broke(folder: Path) -> None:
    prompts, params = [[1, 2, 3], [7, 8, 9, 10]], [{"temperature": 0.0, "max_tokens": 5, "ignore_eos": True}] * 2
    answers = []
    for make in (Plain, EngineSubject):
        with make(Placement(tp_size=2, fabric="threads")) as subject:
            subject.load(folder, dtype="float32", options=OPTIONS)
            answers.append(subject.generate(prompts, params))
            subject.restart()
            assert subject.generate(prompts, params) == answers[-1]
    assert answers[0] == answers[1]


# From the command line


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of one's own with a subject in it, and the current one."""
    (tmp_path / "my_tp.py").write_text(
        "from tests.harness.hand_cut import HandCut\n\n\nclass Mine(HandCut):\n    name = 'mine'\n"
        "    mistake = 'never reduced'\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_tp", None)


def test_a_subject_from_outside_is_verified_and_its_findings_run_again_by_its_name_alone(folder: Path, elsewhere: Path) -> None:
    result = run("verify", folder, "--tp", "2", "--check", "logits", "--subject", "my_tp:Mine", "--out", elsewhere / "out")
    assert result.exit_code == 1, result.output
    (row, *_) = [row for row in read_report(elsewhere / "out").checks if row.verdict == "finding"]
    assert row.module == "model.layers.0.mlp.down_proj"
    assert row.replay is not None
    assert row.replay.endswith("--subject my_tp:Mine")
    (case,) = (elsewhere / "out" / "cases").iterdir()
    assert load_case(case).subject == "my_tp:Mine"
    refused = run("verify", "--case", case, "--out", elsewhere / "again")
    assert (refused.exit_code, "give --subject my_tp:Mine to have its code run" in refused.stderr) == (2, True)
    again = run("verify", "--case", case, "--subject", "my_tp:Mine", "--out", elsewhere / "again")
    assert (again.exit_code, "it fails again, to the bit" in again.stdout) == (1, True)


def test_a_finding_of_all_kinds_together_runs_again_and_one_of_no_kind_is_an_error(folder: Path, tmp_path: Path,
                                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: HandCutRank, spec: LayerSpec) -> Any:
        raise OSError("planted")

    plan = VerifyPlan(model=str(folder), folder=folder, tp_sizes=(2,), subject="tests.harness.hand_cut:HandCut",
                      checks=("layers",), cases_folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HandCutRank, "layer", lost)
        (row,) = verify(plan).checks
        assert (row.verdict, row.kind) == ("finding", "")
        (case,) = tmp_path.iterdir()
        assert replay(load_case(case), folder)[1] == "it fails again"
    assert replay(load_case(case), folder)[1] == "it passes now"
    report, says = replay(dataclasses.replace(load_case(case), kind="rows"), folder)
    assert (says, report.exit_code) == ("it did not run", 3)
    assert "kind='rows' is none of check=layers: it has replicated, " in report.checks[0].message


def test_a_case_that_another_version_saved_is_an_error_that_says_so(folder: Path) -> None:
    with HandCut(Placement(tp_size=2)) as subject:
        context = CheckContext(results=ReferenceResults(folder, dtype="float32"), subject=subject, options=OPTIONS, seed=0,
                               kind="row", case={"kind": "row", "seed": 0})
        (outcome,) = all_checks()["layers"].run(context)
    assert "the case has kind, seed, which is no LayerCase: another version saved it" in (outcome.error or "")


@pytest.mark.parametrize(("name", "says"), [
    ("engin", "there are: engine, transformers, transformers-ep, vllm, vllm-graphs, torch:package.module:function, or your own"),
    ("no.such.module:Class", "can't be imported"),
    ("my_tp:Other", "can't be imported"),
    ("json:JSONDecoder", "must be a subclass of harness.subjects.base.Subject"),
    ("harness.subjects.base:Subject", "lacks"),
])
def test_what_is_no_subject_is_refused_as_that(name: str, says: str, elsewhere: Path) -> None:
    with pytest.raises(UsageError, match=says):
        subject_class(name)


def test_every_capability_is_needed_by_some_part_and_declared_by_the_engine() -> None:
    needed = {part.needs for check in all_checks().values() for part in check.parts}
    assert needed - {None} == set(CAPABILITIES) == EngineSubject.capabilities
    assert CAPABILITIES.keys() - HandCut.capabilities == UNDECLARED


def test_no_two_kinds_of_a_check_share_a_name_and_every_check_goes_by_its_files() -> None:
    for name, check in all_checks().items():
        kinds = [kind for part in check.parts for kind in part.kinds]
        assert len(kinds) == len(set(kinds))
        assert check.name == name
        assert f"| `{name}` | {check.question} |" in PAGE.read_text(), "docs/verify.md is to say what the check asks"
        assert all(part.case.__name__ for part in check.parts if isinstance(part, Cases))


def test_rows_of_what_is_not_applicable_are_skipped_and_say_why(folder: Path) -> None:
    report = verify(VerifyPlan(model="tiny", folder=folder, tp_sizes=(2,), subject="tests.harness.hand_cut:HandCut",
                               checks=("lifecycle",)))
    rows: list[CheckRow] = report.checks
    assert [row.verdict for row in rows] == ["skipped"]
    assert report.exit_code != 0, "a run that compared nothing has not passed"

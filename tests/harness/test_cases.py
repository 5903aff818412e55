"""Case files: what was found is written down whole, runs again alone, and nothing else is taken for one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from engine.parallel.group import TPGroup
from harness.cli import app
from harness.faults.layouts import LAYOUTS
from harness.verification.cases import HEADER, SavedCase, compare_replay, load_case, save_case
from harness.verification.verify import VerifyPlan, replay, verify
from tests.harness.conftest import MakeModel

SAVED = SavedCase(check="layers", model="no/such", tp_size=2, fabric="threads", device="cpu", dtype="bfloat16", subject="engine",
                  seed=3, case={"kind": "row", "sizes": [1, 2]}, finding="rank 1: off", kind="row with bias",
                  tensors={"found": torch.tensor([1.0, -0.0, float("nan")], dtype=torch.bfloat16), "none": torch.zeros(0, 3)})


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    return tiny_model(LAYOUTS["qwen2"].config)


def test_a_case_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = save_case(tmp_path / "new" / "folder", SAVED)
    assert path.name == "layers-row-with-bias-tp2-threads.safetensors"
    loaded = load_case(path)
    assert {name: value for name, value in vars_of(loaded).items() if name != "tensors"} == \
        {name: value for name, value in vars_of(SAVED).items() if name != "tensors"}
    assert compare_replay(loaded, "rank 1: off", SAVED.tensors) == "it fails again, to the bit"


def vars_of(saved: SavedCase) -> dict[str, object]:
    return asdict(replace(saved, tensors={})) | {"tensors": saved.tensors}


def test_a_later_finding_of_the_same_check_kind_and_layout_takes_the_place(tmp_path: Path) -> None:
    save_case(tmp_path, SAVED)
    save_case(tmp_path, replace(SAVED, finding="another"))
    (path,) = tmp_path.iterdir()
    assert load_case(path).finding == "another"
    save_case(tmp_path, replace(SAVED, kind="row"))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_from_before_there_were_kinds_is_read(tmp_path: Path) -> None:
    path = save_case(tmp_path, SAVED)
    header = {name: value for name, value in header_of(path).items() if name != "kind"}
    save_file(SAVED.tensors, path, metadata={HEADER: json.dumps(header)})
    assert load_case(path).kind == ""


def test_how_a_replay_compares_is_told_in_words() -> None:
    assert compare_replay(SAVED, None, {}) == "it passes now"
    assert compare_replay(SAVED, "off", {}) == "it fails again"
    assert compare_replay(SAVED, "off", {**SAVED.tensors, "found": torch.zeros(3, dtype=torch.bfloat16)}) == \
        "it fails again, with other values"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text('{"check": "layers"}')


def a_checkpoint(path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(2)}, path, metadata={"format": "pt"})


def header_of(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, object] = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][HEADER])
    return header


def of_a_later_version(path: Path) -> None:
    """It knows a field more."""
    save_file({}, path, metadata={HEADER: json.dumps(header_of(path) | {"mesh": [2, 2]})})


def of_an_earlier_version(path: Path) -> None:
    """It knew a field less."""
    save_file({}, path, metadata={HEADER: json.dumps({key: value for key, value in header_of(path).items() if key != "subject"})})


def header_that_is_no_object(path: Path) -> None:
    save_file({}, path, metadata={HEADER: "[1, 2]"})


@pytest.mark.parametrize("damage", [cut_short, cut_in_the_header, emptied, text, a_checkpoint, of_a_later_version,
                                    of_an_earlier_version, header_that_is_no_object])
def test_anything_else_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = save_case(tmp_path, SAVED)
    damage(path)
    with pytest.raises(ValueError, match="is not a case file") as refusal:
        load_case(path)
    assert f"case={path}" in str(refusal.value)
    result = CliRunner().invoke(app, ["verify", "--case", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert "is not a case file" in result.stderr


def test_a_case_whose_check_is_gone_is_refused(tmp_path: Path, folder: Path) -> None:
    path = save_case(tmp_path, replace(SAVED, check="taste", model=str(folder)))
    result = CliRunner().invoke(app, ["verify", "--case", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert "checks=['taste'] are unknown" in result.stderr


def test_a_case_whose_model_is_gone_could_not_run(tmp_path: Path) -> None:
    path = save_case(tmp_path, replace(SAVED, model=str(tmp_path / "none")))
    result = CliRunner().invoke(app, ["verify", "--case", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert str(tmp_path / "none") in result.stderr


@pytest.mark.parametrize("check", ["collectives", "layers", "logits"])
def test_a_finding_runs_again_alone_from_its_file(folder: Path, tmp_path: Path, check: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """And only that: of the drawn cases the one that failed."""
    plan = VerifyPlan(model=str(folder), folder=folder, tp_sizes=(2,), fabric="threads", checks=(check,), cases_folder=tmp_path,
                      seed=1)
    with monkeypatch.context() as patch:
        all_reduce = TPGroup.all_reduce
        patch.setattr(TPGroup, "all_reduce", lambda self, x: all_reduce(self, x * 2 if self.rank else x))
        rows = [row for row in verify(plan).checks if row.verdict == "finding"]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            f"{check}{row.kind and '-'}{row.kind.replace(' ', '-')}-tp2-threads.safetensors" for row in rows)
        saved_cases = []
        for row in rows:
            assert row.replay is not None
            command, _, path = row.replay.rpartition(" ")
            assert command == "shardproof verify --case"
            saved = load_case(Path(path))
            assert (saved.check, saved.kind, saved.finding) == (check, row.kind, row.message)
            assert (saved.seed, saved.dtype) == (1, "float32")
            report, words = replay(saved, folder)
            assert words.startswith("it fails again")
            again = next(it for it in report.checks if it.kind == row.kind)
            assert again.verdict == "finding"
            if saved.case:
                assert (again.cases, len(report.checks)) == (1, 1)
            saved_cases.append(saved)
    assert saved_cases
    for saved in saved_cases:
        report, words = replay(saved, folder)
        assert ({row.verdict for row in report.checks}, words) == ({"pass"}, "it passes now")

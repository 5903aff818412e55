import json
import os
from pathlib import Path
from typing import Any

import pytest

from reports import files
from reports.records import read_report, write_report
from reports.typed_json import RecordError
from tests.reports.builders import a_bench, a_check, a_report


def good_data(tmp_path: Path) -> Any:
    path = write_report(tmp_path / "good", a_report(a_check(), a_bench()))
    return json.loads(path.read_text())


def changed(data: Any, path: list[Any], value: Any) -> Any:
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "somebody-else", 'no report of ours: "format" is not "shardproof-report"'),
        (["format"], ..., "no report of ours"),
        (["format_version"], 2, "format_version=2: this code reads 1"),
        (["format_version"], ..., "format_version=None"),
        (["run"], ..., "Report lacks run"),
        (["run", "machine", "cores"], "two", r"run\.machine\.cores: must be a whole number, got str 'two'"),
        (["run", "seconds"], -1, r"run\.seconds: seconds=-1"),
        (["checks"], {}, "checks: must be a list, got dict"),
        (["checks", 0], 5, r"checks\[0\]: must be an object \(CheckRow\), got int 5"),
        (["checks", 0, "tp_size"], ..., r"checks\[0\]: CheckRow lacks tp_size"),
        (["checks", 0, "tolerance"], 1, r"checks\[0\]: CheckRow has no field tolerance"),
        (["checks", 0, "verdict"], "ok", r"checks\[0\]\.verdict: must be one of"),
        (["checks", 0, "compared"], 0, r"checks\[0\]\.compared: compared=0"),
        (
            ["benches", 0, "samples", "output_tokens_per_s"],
            [],
            r"benches\[0\]\.samples\.output_tokens_per_s: has zero",
        ),
        (
            ["benches", 0, "samples", "output_tokens_per_s", 2],
            None,
            r"output_tokens_per_s\[2\]: must be a number",
        ),
        (["benches", 0, "samples", "output_tokens_per_s", 2], "inf", r"output_tokens_per_s\[2\]: inf"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused_by_file_and_path(path: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(changed(good_data(tmp_path), path, value)))
    with pytest.raises(RecordError, match=message) as caught:
        read_report(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(("old", "new", "problem"), [
    ('"case": "two"', '"case": 2', r"benches\[1\]\.case: must be a string"),
    ('"samples": {"step_ms": [2.5]}', '"samples": {"step_ms": []}', r"benches\[1\]\.samples\.step_ms: has zero samples"),
    ('"samples": {"step_ms": [2.5]}', '"samples": {"step_ms": [NaN]}', r"benches\[1\]\.samples\.step_ms\[0\]: nan: a measure"),
    ('"samples": {"step_ms": [2.5]}', '"samples": {"step_ms": [2.5', r"line 22, column \d+: not JSON, or cut short"),
])  # fmt: skip
def test_a_damaged_row_is_named_by_its_path_and_a_cut_one_by_its_line(old: str, new: str, problem: str, tmp_path: Path) -> None:
    rows = (a_bench("one \"NaN\"", samples={"step_ms": [1.5]}), a_bench("two", samples={"step_ms": [2.5]}))
    path = write_report(tmp_path, a_report(a_check(message="NaN, said the rank"), *rows))
    text = path.read_text()
    damaged = text.replace(old, new)
    assert damaged != text
    path.write_text(damaged)
    with pytest.raises(RecordError, match=problem):
        read_report(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1, column 1: not JSON, or cut short"),
        (b"[1, 2]", "no report of ours"),
        (b"null", "no report of ours"),
        (b"<html></html>", "line 1, column 1: not JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b'{"format": "shardproof-report", "format_version": 1, "x": NaN}', "Report lacks run"),
        (b'{"format": "a", "format": "b"}', r"twice in one object: \['format'\]"),
        (b"[" * 200_000, "not JSON|not a report's JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not a report's JSON"),
    ],
)
def test_a_file_that_is_no_report_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.json"
    file.write_bytes(text)
    with pytest.raises(RecordError, match=message) as caught:
        read_report(file)
    assert caught.value.file == str(file)


def test_a_report_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_report(tmp_path, a_report(a_check(), a_bench())).read_bytes().rstrip()
    file = tmp_path / "cut.json"
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        with pytest.raises(RecordError, match=r"line .*: not JSON, or cut short"):
            read_report(file)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "nowhere.json")


def test_a_report_is_named_by_its_folder_or_by_its_file(tmp_path: Path) -> None:
    report = a_report(a_check())
    assert write_report(tmp_path / "new" / "folder", report) == tmp_path / "new" / "folder" / "report.json"
    assert write_report(tmp_path / "base.json", report) == tmp_path / "base.json"
    assert read_report(tmp_path / "new" / "folder") == read_report(tmp_path / "base.json") == report


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_report_and_nothing_else(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = a_report(a_check())
    path = write_report(tmp_path, old)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    owner: object = {"fsync": os, "replace": Path}[failing]
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, a_report(a_check("logits")))
    monkeypatch.undo()
    assert read_report(path) == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_complete_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = Path.replace

    def watch(self: Path, target: Path) -> Path:
        seen.append((self.read_bytes(), target.exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    files.write_whole(tmp_path / "x.txt", "all of it")
    assert seen == [(b"all of it", False)]

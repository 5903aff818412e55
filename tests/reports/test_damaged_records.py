"""Records that were damaged by hand: `compare` tells each in one line with the file's name, and never in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.cli import app
from reports import records
from reports.compare import compare
from reports.records import NotMeasured, Report, write_report
from reports.render import write_all, write_comparison
from tests.reports.builders import a_bench, a_check, a_report

RECORD = a_report(
    a_check("weights"), a_check("logits", verdict="error", extra={"traceback": "…"}),
    a_bench(samples={"step_ms": [1.0, 2.0]}, metrics={"memory_gib": 1.0}),
    NotMeasured(workload="w1", engine="vllm", reason="missing"))
DELETED = object()


def every_place(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value of a record stands, but for free ones, which may be anything."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if key not in ("extra", "switches"):
            yield from every_place(inner, (*path, key))


def with_value(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``data`` that has another value there, or none."""
    data = json.loads(json.dumps(data))
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    if value is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


def encoded(report: Report, tmp_path: Path) -> Any:
    return json.loads(write_report(tmp_path / "encoded", report).read_text())


def told(*arguments: Path | str) -> tuple[int, str]:
    """Exit code, and what stands on standard error."""
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stderr


def assert_told_in_one_line(file: Path, folder: Path, *, codes: tuple[int, ...] = (3,)) -> None:
    for pair in ((file, folder / "good"), (folder / "good", file)):
        code, stderr = told(*pair, "--out", folder / "out")
        assert code in codes, stderr
        assert len(stderr.splitlines()) == 1, stderr
        assert str(file) in stderr
    assert not (folder / "out").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_report(tmp_path / "good", RECORD)
    return tmp_path


@pytest.mark.parametrize(("value", "least"), [
    (DELETED, 45), ({"a": 1}, 80), ([[]], 80), (True, 80), ("\ud800\n", 45), (-1, 70), (10**400, 70)],
    ids=["missing", "object", "list", "bool", "text", "negative", "huge"])
def test_a_value_that_does_not_fit_is_told_wherever_it_stands(value: Any, least: int, folder: Path) -> None:
    data = encoded(RECORD, folder)
    file = folder / "bad.json"
    told_at, read = [], []
    for path in every_place(data):
        file.write_text(json.dumps(with_value(data, path, value)))
        try:
            read.append(records.read_report(file))
        except records.RecordError:
            told_at.append(path)
    assert len(told_at) >= least, "what may be missing, or be any text, is less than half of a record"
    for path in told_at[:: max(1, len(told_at) // 3)]:
        file.write_text(json.dumps(with_value(data, path, value)))
        assert_told_in_one_line(file, folder)
    for record in read[::18]:  # what fits can be shown, however odd it is
        write_comparison(compare(record, RECORD, allow_unlike=True), folder / "shown")
        write_all(record, folder / "shown")


@pytest.mark.parametrize("content", [
    b"", b"\n", b"null", b"3", b"[]", b"{}", b"\xff\xfe\x00", b"\x00" * 100, b"<html>", b"{" * 5000, b"[" * 100_000,
    b'{"format": "shardproof-report"}', b'{"format": "shardproof-report", "format_version": 1}',
    b'{"format": "shardproof-report", "format_version": "1"}', b'{"format": "shardproof-report", "format_version": 1e999}',
    b'{"format": "shardproof-comparison", "format_version": 1}', b'{"format": "shardproof-report", "format": 1}',
    b'{"format": ' + b"9" * 5000 + b"}", b'{"format": NaN}', b'{"format": -Infinity}',
], ids=lambda content: repr(content[:40]))
def test_a_file_that_is_no_record_is_told(content: bytes, folder: Path) -> None:
    file = folder / "bad.json"
    file.write_bytes(content)
    assert_told_in_one_line(file, folder)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_file_that_is_cut_short_is_told(share: float, folder: Path) -> None:
    whole = (folder / "good" / "report.json").read_bytes()
    file = folder / "bad.json"
    file.write_bytes(whole[: int(share * len(whole))])
    assert_told_in_one_line(file, folder)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [300, 600, 900])
def test_values_too_deep_for_a_record_are_told(levels: int, folder: Path) -> None:
    data = encoded(RECORD, folder)
    data["checks"][0]["extra"] = {"a": deep(levels)}
    file = folder / "bad.json"
    file.write_text(json.dumps(data))
    code, stderr = told(file, folder / "good", "--out", folder / "out")
    assert code == 0 or (code == 3 and len(stderr.splitlines()) == 1 and str(file) in stderr)


def a_folder_without_records(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def a_folder_named_as_a_record(folder: Path) -> Path:
    (folder / "dir.json").mkdir()
    return folder / "dir.json"


def a_record_that_is_a_folder(folder: Path) -> Path:
    (folder / "odd" / "report.json").mkdir(parents=True)
    return folder / "odd"


def nothing_there(folder: Path) -> Path:
    return folder / "nowhere.json"


def below_a_file(folder: Path) -> Path:
    return folder / "good" / "report.json" / "report.json"


def a_loop(folder: Path) -> Path:
    (folder / "loop.json").symlink_to(folder / "loop.json")
    return folder / "loop.json"


def a_device_without_an_end(folder: Path) -> Path:
    return Path("/dev/zero")


def a_file_too_large(folder: Path) -> Path:
    with (folder / "large.json").open("wb") as file:
        file.truncate(3 * 2**30)
    return folder / "large.json"


@pytest.mark.parametrize("make", [
    a_folder_without_records, a_folder_named_as_a_record, a_record_that_is_a_folder, nothing_there, below_a_file, a_loop,
    a_device_without_an_end, a_file_too_large])
def test_a_path_that_is_no_record_is_told(make: Callable[[Path], Path], folder: Path) -> None:
    assert_told_in_one_line(make(folder), folder)


def test_a_record_that_compare_would_overwrite_is_left_alone(folder: Path) -> None:
    before = (folder / "good" / "report.json").read_bytes()
    write_report(folder / "new", RECORD)
    code, stderr = told(folder / "good", folder / "new", "--out", folder / "good")
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert (folder / "good" / "report.json").read_bytes() == before


@pytest.mark.parametrize("out", ["/dev/null", "/dev/null/below", "good/report.json", "good/report.json/below", "/proc/nothing"])
def test_a_comparison_that_can_not_be_written_is_refused(out: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["compare", str(folder / "good"), str(folder / "good"), "--out", out])
    assert (result.exit_code, len(result.stderr.splitlines()), result.stdout) == (2, 1, ""), result.exc_info
    assert out in result.stderr


def test_a_record_compared_with_itself_is_no_regression(folder: Path) -> None:
    write_report(folder / "fine", a_report(a_check(), a_check("a check of tomorrow", verdict="skipped"), a_bench()))
    assert told(folder / "fine", folder / "fine", "--out", folder / "out") == (0, "")


@pytest.mark.parametrize("rows", [(), (a_bench(),), (a_check("a check that nobody knows"),)], ids=["empty", "bench", "unknown"])
def test_records_with_nothing_in_common_end_with_3_and_say_so(rows: Any, folder: Path) -> None:
    write_report(folder / "one", a_report(a_check("weights"), command="verify"))
    write_report(folder / "other", a_report(*rows, command="bench"))
    result = CliRunner().invoke(app, ["compare", str(folder / "one"), str(folder / "other"), "--out", str(folder / "out")])
    assert result.exit_code == 3
    assert "Nothing was compared" in result.stdout

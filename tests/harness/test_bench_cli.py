"""``bench`` and ``compare`` as their users meet them: exit codes, what is written, what is left alone when something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.bench import cli
from harness.bench.bench import BenchResult
from harness.cli import app
from reports.records import Machine, NotMeasured, Report, read_report, write_report
from tests.reports.builders import CPU, GPU, a_bench, a_check, a_report, a_run

QUIET = [1.0, 1.004, 0.996, 1.002, 0.998, 1.006, 0.994, 1.001, 0.999, 1.003]


def timed(level: float, **run: Any) -> Report:
    return a_report(a_bench(samples={"step_ms": [level * value for value in QUIET]}), **run)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a baseline in ``old``, and something of yesterday's where results go."""
    write_report(tmp_path / "old", timed(100))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("yesterday's")
    return tmp_path


@pytest.mark.parametrize(("level", "gate", "code", "says"), [
    (100, "--gate", 0, "No regression"),
    (90, "--gate", 0, "1 faster"),
    (110, "--gate", 1, "1 regression"),
    (110, "--no-gate", 0, "1 row slower, not held against it"),
])
def test_a_comparison_ends_with_its_verdict(folder: Path, level: float, gate: str, code: int, says: str) -> None:
    write_report(folder / "new", timed(level))
    found, stdout, stderr = run("compare", folder / "old", folder / "new", gate, "--out", folder / "out")
    assert (found, stderr) == (code, "")
    assert says in stdout
    assert {path.name for path in (folder / "out").iterdir()} == {
        "report.json", "report.md", "report.html", "report.csv", "report.xml", "report.old.md"}
    assert (folder / "out" / "report.md").read_text().startswith("# shardproof compare")


def test_slower_rows_count_on_like_gpus_unless_told_otherwise(folder: Path) -> None:
    for name, level in (("old", 100), ("new", 110)):
        write_report(folder / name, timed(level, machine=a_run().machine.__class__(**GPU)))
    assert run("compare", folder / "old", folder / "new", "--out", folder / "out")[0] == 1


def test_a_check_that_broke_is_a_regression(folder: Path) -> None:
    write_report(folder / "old", a_report(a_check("logits")))
    write_report(folder / "new", a_report(a_check("logits", verdict="finding", error_over_budget=7.0)))
    code, stdout, _ = run("compare", folder / "old", folder / "new", "--out", folder / "out")
    assert code == 1
    assert "broken" in stdout


def test_reports_with_nothing_in_common_end_with_3(folder: Path) -> None:
    write_report(folder / "new", a_report(a_bench("another")))
    assert run("compare", folder / "old", folder / "new", "--out", folder / "out")[0] == 3


def test_unlike_machines_are_refused_unless_allowed(folder: Path) -> None:
    write_report(folder / "new", timed(110, machine=a_run().machine.__class__(**CPU | {"cores": 64})))
    code, stdout, stderr = run("compare", folder / "old", folder / "new", "--out", folder / "out")
    assert (code, stdout) == (3, "")
    assert "cores: 2 against 64" in stderr
    assert "--allow-unlike" in stderr
    assert (folder / "out" / "report.old.md").read_text() == "yesterday's"
    assert run("compare", folder / "old", folder / "new", "--allow-unlike", "--out", folder / "out")[0] == 0


def cut_short(text: str) -> str:
    return text[: len(text) // 2]


def of_somebody_else(text: str) -> str:
    return text.replace('"shardproof-report"', '"pytest-benchmark"')


def of_tomorrow(text: str) -> str:
    return text.replace('"format_version": 1', '"format_version": 2')


def without_samples(text: str) -> str:
    return text.replace(json.dumps([100 * value for value in QUIET]), "[]")


def with_nan(text: str) -> str:
    return text.replace('"step_ms": [100.0', '"step_ms": [NaN')


@pytest.mark.parametrize(("damage", "says"), [
    (cut_short, r"line \d+, column \d+: not JSON, or cut short"),
    (of_somebody_else, "no report of ours"),
    (of_tomorrow, "format_version: format_version=2: this code reads 1"),
    (without_samples, r"benches\[0\]\.samples\.step_ms: has zero samples"),
    (with_nan, r"benches\[0\]\.samples\.step_ms\[0\]: nan: a measurement is positive"),
], ids=lambda value: value.__name__ if callable(value) else "")
@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_a_bad_record_is_named_with_its_path_and_no_older_comparison_stays_in_place(
    folder: Path, damage: Callable[[str], str], says: str, side: str
) -> None:
    bad = write_report(folder / "bad", timed(100))
    whole = bad.read_text()
    bad.write_text(damage(whole))
    assert bad.read_text() != whole
    pair = (folder / "bad", folder / "old") if side == "baseline" else (folder / "old", folder / "bad")
    code, stdout, stderr = run("compare", *pair, "--out", folder / "out")
    assert (code, stdout) == (3, "")
    assert str(bad) in stderr.replace("\n", "")
    assert re.search(says, stderr)
    assert [path.name for path in (folder / "out").iterdir()] == ["report.old.md"]
    assert (folder / "out" / "report.old.md").read_text() == "yesterday's"


def test_a_folder_of_several_records_is_not_guessed_at(folder: Path) -> None:
    for name in ("a", "b"):
        write_report(folder / "many" / f"{name}.json", timed(100))
    code, _, stderr = run("compare", folder / "many", folder / "old", "--out", folder / "out")
    assert code == 3
    assert "give one of a.json, b.json" in stderr
    assert run("compare", folder / "nowhere", folder / "old", "--out", folder / "out")[0] == 3


def test_a_ci_gets_the_comparison_as_its_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = folder / "summary.md"
    summary.write_text("what other steps said\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    run("compare", folder / "old", folder / "old", "--out", folder / "out")
    assert summary.read_text().startswith("what other steps said\n# shardproof compare: No regression")


@pytest.mark.parametrize(("arguments", "says"), [
    (("--tp", "1,x"), "tp='1,x' must be numbers"),
    (("--workload", "w9"), "workloads=['w9'] are unknown"),
    (("--peer", "sglang"), "peers=['sglang'] are unknown"),
    (("--rounds", "0"), "rounds=0 must be at least 1"),
])
def test_wrong_usage_of_bench_ends_with_2_before_anything_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.setenv("SHARDPROOF_CACHE", str(folder / "cache"))
    code, stdout, stderr = run("bench", "qwen3-32b", "--device", "cpu", *arguments, "--out", folder / "out")
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert not (folder / "cache").exists()


@pytest.fixture
def bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """``bench`` with a result made up here, run in a folder of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "model_folder", lambda model, dtype: Path())

    def with_result(result: BenchResult, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "run_bench", lambda plan, watcher: result)
        return run("bench", "tiny", "--device", "cpu", "--save-baseline", *arguments)

    return with_result


@pytest.mark.parametrize(("machine", "name"), [
    (CPU | {"cpu": "AMD EPYC"}, "cpu-2core-amd-epyc"),
    (CPU | {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"}, "cpu-2core-intel-xeon-platinum-8481c"),
    (CPU | {"cpu": "AMD EPYC 7B13 64-Core Processor"}, "cpu-2core-amd-epyc-7b13"),
    (GPU, "nvidia-h200"),
])
def test_a_baseline_is_filed_by_gpus_or_cpu_and_by_model_and_workloads(
    folder: Path, bench: Callable[..., Any], machine: dict[str, Any], name: str
) -> None:
    report = timed(100, machine=Machine(**machine))
    code, stdout, _ = bench(BenchResult(reports={"candidate": report}, interrupted=False, failed=False), "--workload", "layers")
    assert code == 0
    saved = folder / "reports" / "baselines" / name / "tiny-llama-layers.json"
    assert list((folder / "reports" / "baselines").rglob("*.json")) == [saved]
    assert read_report(saved) == read_report(folder / "reports" / "out" / "bench") == report
    assert str(saved.relative_to(folder)) in stdout


@pytest.mark.parametrize(("interrupted", "failed"), [(True, False), (False, True)])
def test_what_was_measured_before_it_ended_early_is_written_and_no_baseline_is(
    folder: Path, bench: Callable[..., Any], interrupted: bool, failed: bool
) -> None:
    missing = NotMeasured(workload="load", engine="shardproof", reason="interrupted before it began")
    report = a_report(a_bench(), missing)
    code, stdout, stderr = bench(BenchResult(reports={"candidate": report}, interrupted=interrupted, failed=failed))
    assert code == 3
    assert read_report(folder / "reports" / "out" / "bench") == report
    assert "interrupted before it began" in stdout
    assert "no baseline was saved" in stderr
    assert not (folder / "reports" / "baselines").exists()


def test_a_slower_checkout_ends_bench_with_1_by_the_rounds_that_took_turns(folder: Path, bench: Callable[..., Any]) -> None:
    reports = {"candidate": timed(110), "baseline": timed(100)}
    code, stdout, _ = bench(BenchResult(reports=reports, interrupted=False, failed=False))
    assert code == 1
    assert "1 regression" in stdout
    out = folder / "reports" / "out" / "bench"
    assert json.loads((out / "compare" / "report.json").read_text())["in_turns"] is True
    assert read_report(out / "baseline") == reports["baseline"]


def test_a_model_that_is_not_there_ends_bench_with_3(tmp_path: Path) -> None:
    code, _, stderr = run("bench", tmp_path / "none", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 3
    assert "there is no such folder" in stderr
    assert not (tmp_path / "out").exists()

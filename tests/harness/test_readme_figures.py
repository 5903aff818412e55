"""Every figure in the pages' tables of benchmarks is the committed record's that stands beside it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from statistics import median

import pytest

from reports.records import Report, read_report
from reports.tables import bench_table
from reports.text_tables import format_number

ROOT = Path(__file__).parents[2]
PAGES = "".join((ROOT / page).read_text() for page in ("docs/benchmarks.md", "docs/performance.md", "README.md"))
SHOWN = {  # (workload, case): metrics
    ("decode", "batch 1, context 32"): ("itl_ms",),
    ("prefill", "1 × 128"): ("prompt_tokens_per_s",),
}


def tables_of(page: str) -> dict[str, tuple[str, list[str]]]:
    """Record -> (the command that makes it, its table's lines, without the heading)."""
    pattern = r"`(reports/baselines/[\w./-]+\.json)`, made by `([^`]+)`:\n\n\|[^\n]*\n\|[-:| ]*\n((?:\|[^\n]*\n)+)"
    return {record: (command, rows.splitlines()) for record, command, rows in re.findall(pattern, page)}


def lines_of_study(report: Report) -> list[str]:
    lines = []
    for row in report.checks:
        slowed = "more work" in row.check
        called = row.cases - row.extra["wrong"] if slowed else row.extra["wrong"]
        rule = f"at least {row.cases - row.extra['allowed']}" if slowed else f"at most {row.extra['allowed']}"
        lines.append(f"| {row.check} | {row.cases} | {called} | {rule} | {row.extra['median_seconds_a_run']} |")
    return lines


def lines_of_bench(report: Report) -> list[str]:
    table = bench_table(report.benches, peers=["transformers"])
    lines = []
    for _, row in table.iterrows():
        if row["metric"] not in SHOWN.get((row["workload"], row["case"]), ()):
            continue
        bound = "–" if row["percent_of_bound"] is None else f"{row['percent_of_bound']:.0f}"
        scaling = "–" if row["scaling_efficiency"] is None else f"{row['scaling_efficiency']:.2f}"
        lines.append(f"| {row['workload']}, {row['case']} | `{row['metric']}` | {row['engine']} | {row['tp_size']} | "
                     f"{format_number(row['median'])} | {format_number(row['iqr'])} | {bound} | {scaling} | "
                     f"{row['times_transformers']:.2f} |")
    return lines


def lines_of(report: Report) -> list[str]:
    return lines_of_study(report) if report.checks else lines_of_bench(report)


@pytest.mark.parametrize("record", [
    "reports/baselines/cpu-2core-amd-epyc/aa.json", "reports/baselines/cpu-2core-amd-epyc/smollm2-quick.json",
])
def test_a_table_holds_what_its_record_says(record: str) -> None:
    command, lines = tables_of(PAGES)[record]
    report = read_report(ROOT / record)
    assert lines == lines_of(report), "the page should have:\n" + "\n".join(lines_of(report))
    # The command beside it is the one in the record, but for options that change no figure.
    made_by = {word for word in report.run.argv if word not in ("--minutes", "--save-baseline")}
    assert set(shlex.split(command)) - {"python", "-m", "tox", "-e", "--", "--save-baseline", "harness.studies.aa"} <= made_by


BASELINES = ROOT / "reports/baselines"
SMALL = BASELINES / "nvidia-h200/qwen3-0.6b-w1-decode-prefill-layers-load.json"
SMALL_W1 = BASELINES / "nvidia-h200/qwen3-0.6b-w1.json"
SMALL_OVER_TWO = BASELINES / "nvidia-h200-x2/qwen3-0.6b-invariant-w1.json"
LARGE = BASELINES / "nvidia-h200/qwen3-8b-invariant-decode-prefill.json"
LARGE_W1 = BASELINES / "nvidia-h200/qwen3-8b-invariant-w1.json"
LARGE_OVER_TWO = BASELINES / "nvidia-h200-x2/qwen3-8b-invariant-w1.json"


@pytest.mark.parametrize(("line", "record", "workload", "case", "metric"), [
    ("W1 on Qwen3-0.6B, output", SMALL_W1, "w1", "256 requests of 100 to 1024 in, 100 to 1024 out", "output_tokens_per_s"),
    ("W1 on Qwen3-8B, output", LARGE_W1, "w1", "256 requests of 100 to 1024 in, 100 to 1024 out", "output_tokens_per_s"),
    ("batch 1 at context 1,024, Qwen3-0.6B", SMALL, "decode", "batch 1, context 1024", "ms_per_token"),
    ("the same, Qwen3-8B |", LARGE, "decode", "batch 1, context 1024", "ms_per_token"),
    ("batch 256 at context 1,024, Qwen3-0.6B", SMALL, "decode", "batch 256, context 1024", "ms_per_token"),
    ("prefill of 16 × 1,024 tokens, Qwen3-0.6B", SMALL, "prefill", "16 × 1024", "prompt_tokens_per_s"),
    ("the same prefill, Qwen3-8B", LARGE, "prefill", "16 × 1024", "prompt_tokens_per_s"),
    ("W1 on Qwen3-0.6B, two GPUs", SMALL_OVER_TWO, "w1", "256 requests of 100 to 1024 in, 100 to 1024 out",
     "output_tokens_per_s"),
    ("W1 on Qwen3-8B, two GPUs", LARGE_OVER_TWO, "w1", "256 requests of 100 to 1024 in, 100 to 1024 out", "output_tokens_per_s"),
])
def test_the_table_of_speed_holds_medians_of_the_records(line: str, record: Path, workload: str, case: str, metric: str) -> None:
    rows = read_report(record).benches
    shown = next(text for text in PAGES.splitlines() if text.startswith(f"| {line}"))
    tp_size = 2 if line.endswith("two GPUs") else 1
    for engine, cell in zip(("shardproof", "transformers"), shown.split("|")[2:4], strict=True):
        samples = [row.samples[metric] for row in rows
                   if (row.engine, row.workload, row.case, row.tp_size) == (engine, workload, case, tp_size)]
        if not samples:
            assert cell.strip() == "–"
            continue
        number = cell.strip().replace(",", "")
        digits = len(number.partition(".")[2])
        assert f"{median(samples[0]):.{digits}f}" == number


def test_the_share_of_the_budgets_that_gpus_took_is_the_records() -> None:
    records = sorted(BASELINES.glob("nvidia-*/verify-*.json"))
    assert [path.parent.name for path in records] == ["nvidia-h200"] * 2 + ["nvidia-h200-x2"] * 2
    checks = [[check for path in records if path.parent.name == machine for check in read_report(path).checks]
              for machine in ("nvidia-h200", "nvidia-h200-x2")]
    assert {check.verdict for each in checks for check in each} == {"pass", "skipped"}, "docs/tests.md says all green"
    worst = max(check.error_over_budget or 0 for check in checks[0] if check.check != "collectives")
    assert f"`verify` took {worst:.2f}\n  of them at most" in PAGES


def test_the_verdicts_on_real_servers_are_those_of_their_records() -> None:
    page = (ROOT / "docs/verdict.md").read_text()
    lines = re.findall(r"^\|.*\]\(\.\./(reports/baselines/\S+/verdict-\S+\.json)\) \|$", page, re.MULTILINE)
    assert sorted(lines) == sorted(str(path.relative_to(ROOT)) for path in BASELINES.glob("*/verdict-*.json"))
    for record in lines:
        row = read_report(ROOT / record).verdict
        assert row is not None
        size = next(test.statistic for test in row.tests if test.name == "size")
        shown = f"| {row.yardstick} | {row.compared:,} | {size:.3g} | **{row.answer}** | [json](../{record}) |"
        assert shown in page


def test_a_figure_that_is_not_the_records_would_be_noticed() -> None:
    record = "reports/baselines/cpu-2core-amd-epyc/aa.json"
    changed = PAGES.replace("| the same code | 100 |", "| the same code | 101 |")
    assert changed != PAGES
    assert tables_of(changed)[record][1] != lines_of(read_report(ROOT / record))


def test_the_study_met_its_goals() -> None:
    same, slower = read_report(ROOT / "reports/baselines/cpu-2core-amd-epyc/aa.json").checks
    assert same.cases == slower.cases == 100
    assert same.extra["wrong"] <= 2
    assert slower.extra["wrong"] <= 5
    assert max(same.extra["median_seconds_a_run"], slower.extra["median_seconds_a_run"]) <= 5

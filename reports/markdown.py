"""Reports and comparisons as GitHub Markdown: for a pull request or a CI's step summary."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

import pandas as pd

from reports.calibration import calibration_tables
from reports.compare import CheckChange, Comparison
from reports.records import CheckRow, Report, RunInfo
from reports.summary import (
    Headline,
    command_line,
    comparison_headline,
    models_of,
    report_headline,
    run_facts,
    without_constants,
)
from reports.tables import (
    BOUND_NOTE,
    bench_tables,
    check_changes_table,
    checks_pivot,
    checks_table,
    joined,
    not_measured_table,
    skipped_table,
    speed_changes_table,
    verdict_cell,
)
from reports.text_tables import escape_markdown, printable, to_markdown

_SIGNS = {"good": "✅", "bad": "❌", "warn": "⚠️", "quiet": "➖"}
_BENCH_CONSTANTS = ("workload", "case", "model", "engine", "dtype", "fabric", "tp_size", "metric", "rounds")


def report_markdown(report: Report, *, peers: Sequence[str] = ()) -> str:
    """A report, findings first. ``peers`` names the engines that the benchmark rows are held against."""
    parts = [_head(f"shardproof {report.run.command}", report_headline(report))]
    parts.append(_facts(run_facts(report.run, models_of(report))))
    for verdict, heading in (("finding", "Findings"), ("error", "Could not run")):
        if rows := [row for row in report.checks if row.verdict == verdict]:
            parts += [f"## {heading}\n", *map(_finding, rows)]
    if report.checks:
        parts += ["## Checks\n", f"Verdict, and the worst error as a fraction of its budget; {BOUND_NOTE}.\n"]
        parts.append(to_markdown(checks_pivot(report.checks)))
        every_row = checks_table(report.checks).drop(columns=["rank", "module", "message", "replay"])
        parts.append("<details><summary>Every row, with cases, values compared and seconds</summary>\n\n"
                     f"{_compact(every_row)}\n</details>\n")
    if len(skipped := skipped_table(report.checks)):
        parts += ["## Skipped\n", to_markdown(skipped)]
    for heading, (text, table) in calibration_tables(report).items():
        parts += [f"## {heading}\n", f"{escape_markdown(text)}\n", to_markdown(table)]
    if report.benches:
        parts.append("## Benchmarks\n")
        for name, table in bench_tables(report.benches, peers=peers).items():
            parts += [f"### {escape_markdown(name)}\n", _compact(table)]
    if report.not_measured:
        table = joined(not_measured_table(report.not_measured))
        parts += ["## Not measured\n", to_markdown(without_constants(table, ())[0])]
        parts += [_folded(f"Traceback: {row.reason}", row.traceback) for row in report.not_measured if row.traceback]
    parts.append(_how_it_ran(report.run))
    return "\n".join(parts)


def comparison_markdown(comparison: Comparison) -> str:
    """A comparison: what regressed first, then every row that changed or could not be told, then the rest."""
    parts = [_head("shardproof compare", comparison_headline(comparison))]
    old, new = comparison.baseline, comparison.candidate
    facts = {"baseline": _one_line(old), "candidate": _one_line(new)}
    for name, (before, after) in (comparison.differences | comparison.switches).items():
        facts[f"differs: {name}"] = f"{before} → {after}"
    parts.append(_facts(facts))
    if comparison.checks:
        parts += ["## Checks\n", _changes(check_changes_table(comparison.checks))]
    if comparison.speeds:
        parts += [
            "## Speed\n",
            speed_note(comparison) + "\n",
            _changes(speed_changes_table(comparison.speeds)),
        ]
    parts += [_change_details(change) for change in comparison.checks if change.verdict in ("broken", "new finding")]
    return "\n".join(parts)


def speed_note(comparison: Comparison) -> str:
    """How the speed verdicts came about, in a few words."""
    effect, sure = f"{100 * comparison.smallest_effect:g} %", f"{100 * comparison.confidence:g} %"
    fails_at = comparison.fails_at
    if fails_at is None:
        gate = "A slower row is reported and does not fail the comparison."
    elif fails_at == 1:
        gate = "A slower row fails the comparison."
    else:
        gate = (f"A row that is for sure {fails_at:.3g} times slower at least fails the comparison; others are reported: a CPU's "
                "speed changes from run to run.")
    if comparison.differences:
        gate += " The machines differ: their speeds say little about the code."
    what = "the median ratio of rounds that took turns" if comparison.in_turns else "the ratio of medians"
    return (
        f"Times better is {what}, above 1 is better; slower or faster needs a change of "
        f"{effect} and an interval ({sure} sure for all rows together) that excludes 1. {gate}"
    )


def fenced(text: str) -> str:
    """``text`` as a code block that nothing inside can close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{printable(text)}\n{fence}\n"


def _head(title: str, headline: Headline) -> str:
    detail = f"{_SIGNS[headline.tone]} {escape_markdown(headline.detail)}"
    return f"# {title}: {escape_markdown(headline.text)}\n\n{detail}\n"


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"- **{escape_markdown(name)}**: {escape_markdown(value)}\n" for name, value in facts.items())


def _finding(row: CheckRow) -> str:
    where = [f"tp_size {row.tp_size}", row.dtype, row.fabric]
    where += [f"rank {row.rank}"] if row.rank is not None else []
    where += [row.module] if row.module is not None else []
    text = f"### {escape_markdown(row.name)} · {escape_markdown(' · '.join(where))}\n\n"
    if row.error_over_budget is not None:
        text += f"Error over budget: {verdict_cell('', row.error_over_budget).strip()}\n\n"
    text += fenced(row.message)
    text += f"\nRun it again:\n\n{fenced(row.replay)}" if row.replay else ""
    return text + (f"\n{_folded('Traceback', row.traceback)}" if row.traceback else "")


def _folded(summary: str, text: str) -> str:
    # No Markdown is read inside a line of HTML.
    return f"<details><summary>{html.escape(printable(summary), quote=False)}</summary>\n\n{fenced(text)}\n</details>\n"


def _compact(table: pd.DataFrame) -> str:
    table, constants = without_constants(table, _BENCH_CONSTANTS)
    shared = ", ".join(f"{name} {value}" for name, value in constants.items())
    return (f"All rows: {escape_markdown(shared)}.\n\n" if shared else "") + to_markdown(table)


def _changes(table: pd.DataFrame) -> str:
    same = table["verdict"] == "same"
    text = _compact(table[~same]) if (~same).any() else "No row changed.\n"
    if same.any():
        text += f"\n<details><summary>{same.sum()} the same</summary>\n\n{_compact(table[same])}\n</details>\n"
    return text


def _change_details(change: CheckChange) -> str:
    head = f"### {escape_markdown(change.name)} · tp_size {change.tp_size} · {change.verdict}"
    text = f"{head}\n\n{fenced(change.message)}"
    text += f"\nRun it again:\n\n{fenced(change.replay)}" if change.replay else ""
    return text + (f"\n{_folded('Traceback', change.traceback)}" if change.traceback else "")


def _how_it_ran(run: RunInfo) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run.versions.items())
    switches = ", ".join(f"{name}={value}" for name, value in run.switches.items())
    facts = {name: value for name, value in (("versions", versions), ("switches", switches)) if value}
    text = f"{fenced(command_line(run))}\n{_facts(facts)}"
    return f"<details><summary>How it ran</summary>\n\n{text}\n</details>\n"


def _one_line(run: RunInfo) -> str:
    commit = (run.commit or "no commit")[:12] + (" + changes" if run.dirty else "")
    return f"{commit}, {run.started_at}, {run.machine.type}"

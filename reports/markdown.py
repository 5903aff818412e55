"""Reports and comparisons as GitHub Markdown: for a pull request or a CI's step summary."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence

import pandas as pd

from reports.calibration import calibration_tables
from reports.compare import AtlasChange, CheckChange, Comparison
from reports.records import AtlasRow, CheckRow, Report, RunInfo
from reports.summary import (
    Headline,
    comparison_headline,
    models_of,
    report_headline,
    run_facts,
    speed_note,
    without_constants,
)
from reports.tables import (
    BOUND_NOTE,
    atlas_alike,
    atlas_changes_table,
    atlas_counts,
    atlas_pivot,
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
from reports.verdict_tables import faults_table, scores_table, verdict_facts, verdict_tests_table

_SIGNS = {"good": "✅", "bad": "❌", "warn": "⚠️", "quiet": "➖"}


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
    if report.atlas:
        parts += ["## Atlas\n", to_markdown(atlas_counts(report.atlas))]
        wrong = atlas_alike([row for row in report.atlas if row.verdict == "wrong"])
        parts += [_told(first, f"tp_size {first.tp_size} · {first.dtype} · {first.subject}"
                        + (f" · and {len(others)} more in the same module" if others else "")) for first, *others in wrong]
        parts.append(f"<details><summary>Every row</summary>\n\n{_compact(atlas_pivot(report.atlas))}\n</details>\n")
    if report.verdict is not None:
        parts.append(_facts(verdict_facts(report.verdict)))
        if report.verdict.tests:
            parts.append(to_markdown(verdict_tests_table(report.verdict)))
        if report.verdict.rates:
            rates = "".join(f"- {escape_markdown(line)}\n" for line in report.verdict.rates)
            parts += ["## How often this answer is wrong\n", rates]
    if report.scores:
        parts += ["## Rules\n", to_markdown(scores_table(report.scores))]
        if len(faults := faults_table(report.scores)):
            parts += ["## Faults\n", to_markdown(faults)]
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
        parts += ["## Speed\n", f"{speed_note(comparison)}\n", _changes(speed_changes_table(comparison.speeds))]
    if comparison.atlas:
        parts += ["## Atlas\n", _changes(atlas_changes_table(comparison.atlas))]
    told: list[CheckChange | AtlasChange] = [*comparison.checks, *comparison.atlas]
    parts += [_told(change, f"tp_size {change.tp_size} · {change.verdict}")
              for change in told if change.verdict in ("broken", "new finding")]
    return "\n".join(parts)


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
    where = [f"tp_size {row.tp_size}", row.dtype, row.fabric, None if row.rank is None else f"rank {row.rank}", row.module]
    error = "" if row.error_over_budget is None else f"Error over budget: {verdict_cell('', row.error_over_budget).strip()}\n\n"
    return _told(row, escape_markdown(" · ".join(filter(None, where))), error)


def _told(item: CheckRow | CheckChange | AtlasRow | AtlasChange, where: str, error: str = "") -> str:
    text = f"### {escape_markdown(item.name)} · {where}\n\n{error}{fenced(item.message)}"
    text += f"\nRun it again:\n\n{fenced(item.replay)}" if item.replay else ""
    traceback = getattr(item, "traceback", "")
    return text + (f"\n{_folded('Traceback', traceback)}" if traceback else "")


def _folded(summary: str, text: str) -> str:
    # No Markdown is read inside a line of HTML.
    return f"<details><summary>{html.escape(printable(summary), quote=False)}</summary>\n\n{fenced(text)}\n</details>\n"


def _compact(table: pd.DataFrame) -> str:
    table, constants = without_constants(table)
    shared = ", ".join(f"{name} {value}" for name, value in constants.items())
    return (f"All rows: {escape_markdown(shared)}.\n\n" if shared else "") + to_markdown(table)


def _changes(table: pd.DataFrame) -> str:
    same = table["verdict"] == "same"
    text = _compact(table[~same]) if (~same).any() else "No row changed.\n"
    if same.any():
        text += f"\n<details><summary>{same.sum()} the same</summary>\n\n{_compact(table[same])}\n</details>\n"
    return text


def _how_it_ran(run: RunInfo) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run.versions.items())
    switches = ", ".join(f"{name}={value}" for name, value in run.switches.items())
    facts = {name: value for name, value in (("versions", versions), ("switches", switches)) if value}
    text = f"{fenced(shlex.join(run.argv))}\n{_facts(facts)}"
    return f"<details><summary>How it ran</summary>\n\n{text}\n</details>\n"


def _one_line(run: RunInfo) -> str:
    commit = (run.commit or "no commit")[:12] + (" + changes" if run.dirty else "")
    return f"{commit}, {run.started_at}, {run.machine.type}"

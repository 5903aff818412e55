"""Reports and comparisons as one HTML page each: self-contained, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jinja2
import pandas as pd

from reports import metrics
from reports.calibration import calibration_tables
from reports.calibration_plots import calibration_plots
from reports.compare import Comparison
from reports.plots import GLYPHS, NUM_COLOURS, bench_plots
from reports.records import AtlasRow, CheckRow, Report, RunInfo
from reports.summary import (
    TONES,
    comparison_headline,
    duration,
    models_of,
    report_headline,
    run_facts,
    speed_note,
    without_constants,
)
from reports.tables import (
    atlas_alike,
    atlas_architectures,
    atlas_changes_table,
    atlas_counts,
    atlas_pivot,
    atlas_reasons,
    atlas_table,
    bench_tables,
    bound_mark,
    check_changes_table,
    checks_pivot,
    checks_table,
    joined,
    not_measured_table,
    skipped_table,
    speed_changes_table,
)
from reports.text_tables import MISSING, format_cell, format_number, printable
from reports.verdict_plots import verdict_plots
from reports.verdict_tables import faults_table, scores_table, verdict_facts, verdict_tests_table

_HEADINGS = {
    "tp_size": "tp", "error_over_budget": "error / budget", "scaling_efficiency": "scaling",
    "percent_of_bound": "% of bound", "percent_sharded": "% sharded", "percent_of_flops_sharded": "% of FLOPs sharded",
    "times_better": "times better", "share_of_allowed": "share of what rounding may do",
    "seconds": "took", "memory_gib": "memory, GiB",
}  # fmt: skip
_FRACTION = re.compile(r"(\.\d+)?( s)?$")
_SENTENCES = ("reason", "message")
_LONGEST_LINE = 36  # characters; longer cells may wrap
_MANY = 300  # rows of an atlas that are shown one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell: a verdict, a text or number, an error over its budget to draw as a bar, a mark behind it.

    kind           its CSS class
    before, after  digits to stand unseen around a number, so that the decimal points of a column stand below each other
    """

    text: str = ""
    kind: str = "text"
    verdict: str = ""
    error: float | None = None
    mark: str = ""
    before: str = ""
    after: str = ""


class Table(NamedTuple):
    """Headings with the CSS class of their column, the cells row by row, and what is the same in all rows."""

    headings: list[tuple[str, str]]
    rows: list[tuple[Cell, ...]]
    shared: str


def report_html(report: Report, *, peers: Sequence[str] = ()) -> str:
    """A report as a page; ``peers`` names the engines that the benchmark rows are held against."""
    plots = calibration_plots(report.calibration) if report.calibration else {}
    return _render(
        "report.html.j2",
        title=f"shardproof {report.run.command}",
        headline=report_headline(report),
        facts=run_facts(report.run, models_of(report)),
        command_line=shlex.join(report.run.argv),
        run=report.run,
        issues={heading: [row for row in report.checks if row.verdict == verdict]
                for heading, verdict in (("Findings", "finding"), ("Could not run", "error"))},
        pivot=checks_pivot(report.checks, cell=lambda row: row),
        checks=checks_table(report.checks).drop(columns=["rank", "module", "message", "replay"]),
        skipped=skipped_table(report.checks),
        calibration=calibration_tables(report),
        # Addresses that hold the whole image: ids inside it stay apart from the page's.
        calibration_plots={name: f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
                           for name, svg in plots.items()},
        benches=bench_tables(report.benches, peers=peers),
        not_measured=joined(not_measured_table(report.not_measured)),
        broken=[row for row in report.not_measured if row.traceback],
        plots=bench_plots(report.benches),
        atlas=_atlas(report.atlas),
        verdict={"row": report.verdict, "facts": verdict_facts(report.verdict) if report.verdict else {},
                 "tests": verdict_tests_table(report.verdict), "plots": verdict_plots(report.verdict)},
        scores={"rules": scores_table(report.scores), "faults": faults_table(report.scores)},
        glyphs=GLYPHS,
        num_colours=NUM_COLOURS,
    )


def comparison_html(comparison: Comparison) -> str:
    """A comparison as a page with both sides."""
    speeds = speed_changes_table(comparison.speeds)
    low, high = speeds.pop("low"), speeds.pop("high")
    speeds.insert(7, "interval", [None if a is None else f"{a:.3f} – {b:.3f}" for a, b in zip(low, high, strict=True)])
    return _render(
        "comparison.html.j2",
        title="shardproof compare",
        headline=comparison_headline(comparison),
        facts=_both_sides(comparison.baseline, comparison.candidate),
        differences={name: f"{old} → {new}" for name, (old, new) in (comparison.differences | comparison.switches).items()},
        issues=[change for change in comparison.checks if change.verdict in ("broken", "new finding")],
        broken_places=[change for change in comparison.atlas if change.verdict == "broken"],
        speeds=speeds,
        speed_note=speed_note(comparison),
        checks=check_changes_table(comparison.checks),
        atlas=atlas_changes_table(comparison.atlas),
    )


def _atlas(rows: Sequence[AtlasRow]) -> dict[str, object]:
    """What is wrong, by architecture and module; every verdict, by architecture where rows are many; why others are not right."""
    by_verdict = {verdict: [row for row in rows if row.verdict == verdict]
                  for verdict in ("wrong", "crashed", "refused unclearly", "refused clearly", "not compared")}
    wrong = by_verdict.pop("wrong")
    is_long = len(rows) > _MANY
    return {
        "counts": atlas_counts(rows), "num_wrong": len(wrong),
        "wrong": [(first, atlas_table(others)[["layout", "subject", "dtype", "tp_size", "error_over_budget", "rank"]])
                  for first, *others in atlas_alike(wrong)],
        "architectures": atlas_architectures(rows) if is_long else None,
        "pivot": atlas_pivot(rows, cell=lambda row: row),
        "others": {verdict: (len(own), atlas_reasons(own)) for verdict, own in by_verdict.items() if own},
        "rows": None if is_long else atlas_table(rows).drop(columns=["message", "changes", "said", "replay"])}


def bar_percent(error: float) -> float:
    """How much of its track the bar of an error over its budget fills: the budget ends at three quarters."""
    return round(min(75 * error, 100.0), 1) if math.isfinite(error) else 100.0


def _render(template: str, **values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"view": _view, "percent": bar_percent, "of_budget": _of_budget}
    environment.globals["tones"] = TONES
    return environment.get_template(template).render(values)


def _view(table: pd.DataFrame) -> Table:
    table, constants = without_constants(table)
    columns = [_aligned([_cell(str(name), value) for value in table[name]]) for name in table.columns]
    kinds = ["number" if any(cell.kind == "number" for cell in column) else "text" for column in columns]
    # A dash stands where the column's numbers stand.
    columns = [[replace(cell, kind=f"{kind} none") if cell.kind == "none" else cell for cell in column]
               for column, kind in zip(columns, kinds, strict=True)]
    return Table(headings=[(_heading(str(name)), kind) for name, kind in zip(table.columns, kinds, strict=True)],
                 rows=list(zip(*columns, strict=True)),
                 shared=", ".join(f"{_HEADINGS.get(name, name)} {value}" for name, value in constants.items()))


def _aligned(column: Sequence[Cell]) -> list[Cell]:
    """The cells of a column, each number with what it lacks of the longest whole part and the longest fraction."""
    numbers = [cell.text if cell.kind == "number" or cell.error is not None else "" for cell in column]
    wholes = [_FRACTION.sub("", number) for number in numbers]
    fractions = [number.removeprefix(whole).removesuffix(" s") for number, whole in zip(numbers, wholes, strict=True)]
    longest, tail = max(wholes, key=len, default=""), max(fractions, key=len, default="")
    return [replace(cell, before=longest[:len(longest) - len(whole)], after=tail[len(fraction):]) if whole else cell
            for cell, whole, fraction in zip(column, wholes, fractions, strict=True)]


def _heading(name: str) -> str:
    if name.startswith("times_") and name not in _HEADINGS:
        return "× " + name.removeprefix("times_")
    return _HEADINGS.get(name, name.replace("_", " "))


def _cell(name: str, value: object) -> Cell:
    if isinstance(value, CheckRow | AtlasRow):
        error = value.error_over_budget
        return Cell(verdict=value.verdict, error=error, text="" if error is None else _of_budget(error),
                    mark=bound_mark(value) if isinstance(value, CheckRow) else "")
    text = format_cell(value)
    if text == MISSING:
        return Cell(text=text, kind="none")
    if name == "verdict":
        return Cell(verdict=text)
    if name == "metric":
        return Cell(text=metrics.label(text))
    if name == "interval":
        return Cell(text=text, kind="number")
    if isinstance(value, (int, float)):
        return Cell(text=_number(name, value), kind="number", error=value if name == "error_over_budget" else None)
    is_long = name in _SENTENCES or len(text) > _LONGEST_LINE or "\n" in text
    return Cell(text=text, kind="text long" if is_long else "text")


def _number(name: str, value: float) -> str:
    if name == "error_over_budget":
        return _of_budget(value)
    if name == "seconds":
        return duration(value)
    if name.startswith("times_") or name == "scaling_efficiency":
        return f"{value:.3f}"
    return f"{value:.1f}" if name.startswith("percent_") else format_number(value)


def _of_budget(error: float) -> str:
    return format_number(float(f"{error:.3g}"))


def _both_sides(old: RunInfo, new: RunInfo) -> dict[str, str]:
    before, after = run_facts(old, []), run_facts(new, [])
    facts: dict[str, str] = {}
    for name in ("commit", "started", "machine", "GPUs"):
        if before.get(name) == after.get(name):
            facts |= {name: before[name]} if name in before else {}
        else:
            facts[f"baseline {name}"] = before.get(name, MISSING)
            facts[f"candidate {name}"] = after.get(name, MISSING)
    return facts

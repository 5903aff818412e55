"""Reports and comparisons as one HTML page each: self-contained, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jinja2
import pandas as pd

from reports import metrics
from reports.calibration import calibration_tables
from reports.calibration_plots import calibration_plots
from reports.compare import CheckChange, Comparison
from reports.markdown import speed_note
from reports.plots import GLYPHS, NUM_COLOURS, bench_plots
from reports.records import CheckRow, Report, RunInfo
from reports.summary import (
    TONES,
    Headline,
    command_line,
    comparison_headline,
    duration,
    models_of,
    report_headline,
    run_facts,
    without_constants,
)
from reports.tables import (
    bench_tables,
    bound_mark,
    check_changes_table,
    checks_pivot,
    checks_table,
    joined,
    not_measured_table,
    skipped_table,
    speed_changes_table,
    telling_columns,
)
from reports.text_tables import MISSING, format_cell, format_number, printable

_LAYOUT = ("workload", "case", "model", "engine", "dtype", "fabric", "tp_size", "metric", "rounds")
_HEADINGS = {
    "tp_size": "tp", "error_over_budget": "error / budget", "scaling_efficiency": "scaling",
    "percent_of_bound": "% of bound", "times_better": "times better", "seconds": "took", "memory_gib": "memory, GiB",
}  # fmt: skip
_FRACTION = re.compile(r"(\.\d+)?( s)?$")
_SENTENCES = ("reason", "message")
_LONGEST_LINE = 36  # characters; longer cells may wrap


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorView:
    """An error over its budget as a bar: the budget ends at three quarters of the track."""

    text: str
    percent: float
    over: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CellView:
    """One cell: its text, its CSS class ``kind``, the tone of a verdict, an error to draw.

    ``fraction``: the end of its number, from the decimal point on. In a column all of them begin at one place: ``places`` is how
    many characters the longest has, ``width`` how many the longest number would then have.
    """

    text: str
    kind: str = "text"
    tone: str = ""
    error: ErrorView | None = None
    fraction: str = ""
    places: int = 0
    width: int = 0

    @property
    def number(self) -> str:
        """What is to be aligned, if anything is."""
        return self.error.text if self.error else self.text if self.kind.startswith("number") else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnView:
    """One column's heading and CSS class."""

    label: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TableView:
    """A table, and ``shared``: what is the same in all its rows."""

    columns: list[ColumnView]
    rows: list[list[CellView]]
    shared: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IssueView:
    """A finding, an error or a broken check, told in full."""

    check: str
    verdict: str
    tone: str
    layout: str
    message: str
    replay: str | None
    traceback: str
    rank: int | None
    module: str | None
    error: ErrorView | None


def report_html(report: Report, *, peers: Sequence[str] = ()) -> str:
    """A report as a page; ``peers`` names the engines that the benchmark rows are held against."""
    rows = checks_table(report.checks).drop(columns=["rank", "module", "message", "replay"])
    skipped = skipped_table(report.checks)
    groups = [("Findings", "finding"), ("Could not run", "error")]
    issues = [(name, [_row_issue(r) for r in report.checks if r.verdict == verdict]) for name, verdict in groups]
    return _render(
        "report.html.j2",
        title=f"shardproof {report.run.command}",
        headline=report_headline(report),
        facts=run_facts(report.run, models_of(report)),
        command_line=command_line(report.run),
        versions=report.run.versions,
        switches=report.run.switches,
        issue_groups=[(name, items) for name, items in issues if items],
        pivot=_pivot(report.checks) if report.checks else None,
        checks=_table(rows) if report.checks else None,
        skipped=_table(skipped) if len(skipped) else None,
        calibration=[(name, text, _table(table)) for name, (text, table) in calibration_tables(report).items()],
        calibration_plots=_as_images(calibration_plots(report.calibration)) if report.calibration else {},
        benches=[(name, _table(table)) for name, table in bench_tables(report.benches, peers=peers).items()],
        not_measured=_table(joined(not_measured_table(report.not_measured))) if report.not_measured else None,
        broken=[row for row in report.not_measured if row.traceback],
        plots=bench_plots(report.benches),
        glyphs=GLYPHS,
        num_colours=NUM_COLOURS,
    )


def comparison_html(comparison: Comparison) -> str:
    """A comparison as a page with both sides."""
    broken = [change for change in comparison.checks if change.verdict in ("broken", "new finding")]
    differences = comparison.differences | comparison.switches
    return _render(
        "comparison.html.j2",
        title="shardproof compare",
        headline=comparison_headline(comparison),
        facts=_both_sides(comparison.baseline, comparison.candidate),
        differences={name: f"{old} → {new}" for name, (old, new) in differences.items()},
        issues=[_change_issue(change) for change in broken],
        speeds=_changed_and_same(_with_interval(speed_changes_table(comparison.speeds))),
        speed_note=speed_note(comparison),
        checks=_changed_and_same(check_changes_table(comparison.checks)),
    )


def _as_images(plots: Mapping[str, str]) -> dict[str, str]:
    """As addresses that hold the whole image: ids inside it stay apart from the page's."""
    return {name: f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" for name, svg in plots.items()}


def _with_interval(speeds: pd.DataFrame) -> pd.DataFrame:
    intervals = [
        f"{low:.3f} – {high:.3f}" if low is not None else None for low, high in zip(speeds["low"], speeds["high"], strict=True)
    ]
    speeds.insert(list(speeds.columns).index("low"), "interval", intervals)
    return speeds.drop(columns=["low", "high"])


def _changed_and_same(changes: pd.DataFrame) -> dict[str, TableView | None]:
    same = changes["verdict"] == "same"
    parts = {"changed": changes[~same], "same": changes[same]}
    return {name: _table(part) if len(part) else None for name, part in parts.items()}


def _render(template: str, *, title: str, headline: Headline, facts: Mapping[str, str], **rest: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(title=title, headline=headline, facts=facts, **rest)


def _table(table: pd.DataFrame) -> TableView:
    table, constants = without_constants(table, _LAYOUT)
    columns = [(str(name), table[name].tolist()) for name in table.columns]
    cells = [[_cell(name, value) for value in values] for name, values in columns]
    kinds = ["number" if any(cell.kind == "number" for cell in column) else "text" for column in cells]
    # A dash stands where the column's numbers stand.
    cells = [
        [replace(cell, kind=f"{kind} none") if cell.kind == "none" else cell for cell in column]
        for column, kind in zip(cells, kinds, strict=True)
    ]
    return TableView(
        columns=[ColumnView(label=_heading(name), kind=kind) for (name, _), kind in zip(columns, kinds, strict=True)],
        rows=_rows(cells),
        shared=", ".join(f"{_HEADINGS.get(name, name)} {value}" for name, value in constants.items()),
    )


def _rows(columns: Sequence[Sequence[CellView]]) -> list[list[CellView]]:
    """The cells of columns row by row, the decimal points of each column below each other."""
    aligned = []
    for cells in columns:
        fractions = [found[0] if (found := _FRACTION.search(cell.number)) else "" for cell in cells]
        pairs = list(zip(cells, fractions, strict=True))
        places = max(map(len, fractions), default=0)
        width = places + max((len(cell.number) - len(fraction) for cell, fraction in pairs), default=0)
        aligned.append([replace(cell, fraction=fraction, places=places, width=width) if cell.number else cell
                        for cell, fraction in pairs])
    return [list(row) for row in zip(*aligned, strict=True)]


def _heading(name: str) -> str:
    if name.startswith("times_") and name not in _HEADINGS:
        return "× " + name.removeprefix("times_")
    return _HEADINGS.get(name, name.replace("_", " "))


def _cell(name: str, value: object) -> CellView:
    text = format_cell(value)
    if text == MISSING:
        return CellView(text=text, kind="none")
    if name == "verdict":
        return CellView(text=text, tone=TONES[text])
    if name in ("error_over_budget",) and isinstance(value, float):
        return CellView(text=text, kind="number", error=error_view(value))
    if name == "metric":
        return CellView(text=metrics.label(text))
    if name == "seconds" and isinstance(value, float):
        return CellView(text=duration(value), kind="number")
    if (isinstance(value, float) and name in ("times_better", "scaling_efficiency")) or name.startswith("times_"):
        return CellView(text=f"{value:.3f}", kind="number")
    if isinstance(value, float) and name == "percent_of_bound":
        return CellView(text=f"{value:.1f}", kind="number")
    if isinstance(value, (int, float)):
        return CellView(text=text, kind="number")
    if name == "interval":
        return CellView(text=text, kind="number")
    is_long = name in _SENTENCES or len(text) > _LONGEST_LINE or "\n" in text
    return CellView(text=text, kind="text long" if is_long else "text")


def _pivot(rows: Sequence[CheckRow]) -> TableView:
    """The pivot of `checks_pivot`, its cells as badges with bars."""
    table = checks_pivot(rows)
    sizes = [str(name) for name in table.columns if str(name).startswith("tp ")]
    view = _table(table)
    varying = telling_columns(rows)
    found = {(row.name, *(getattr(row, name) for name in varying), f"tp {row.tp_size}"): row for row in rows}
    keys = [tuple(line[name] for name in ("check", *varying)) for line in table.to_dict("records")]
    cells = [[CellView(text=format_cell(name)) for name in names] for names in zip(*keys, strict=True)]
    cells += [[_verdict_cell(found.get((*key, size))) for key in keys] for size in sizes]
    columns = [ColumnView(label=_heading(name), kind="text") for name in ("check", *varying, *sizes)]
    return TableView(columns=columns, rows=_rows(cells), shared=view.shared)


def _verdict_cell(row: CheckRow | None) -> CellView:
    if row is None:
        return CellView(text=MISSING, kind="none")
    error = error_view(row.error_over_budget) if row.error_over_budget is not None else None
    if error is not None:
        error = replace(error, text=error.text + bound_mark(row))
    return CellView(text=row.verdict, tone=TONES[row.verdict], error=error)


def error_view(error: float) -> ErrorView:
    """A bar for an error over its budget: full from four thirds of the budget on."""
    percent = round(min(75 * error, 100), 1) if math.isfinite(error) else 100.0
    return ErrorView(text=format_number(float(f"{error:.3g}")), percent=percent, over=not error <= 1)


def _row_issue(row: CheckRow) -> IssueView:
    return IssueView(
        check=row.name,
        verdict=row.verdict,
        tone=TONES[row.verdict],
        layout=f"tp_size {row.tp_size} · {row.dtype} · {row.fabric} · {row.model}",
        message=row.message,
        replay=row.replay,
        traceback=row.traceback,
        rank=row.rank,
        module=row.module,
        error=error_view(row.error_over_budget) if row.error_over_budget is not None else None,
    )


def _change_issue(change: CheckChange) -> IssueView:
    error = change.candidate_error
    return IssueView(
        check=change.name,
        verdict=change.verdict,
        tone=TONES[change.verdict],
        layout=f"tp_size {change.tp_size} · {change.dtype} · {change.fabric} · {change.model}",
        message=change.message,
        replay=change.replay,
        traceback=change.traceback,
        rank=None,
        module=None,
        error=error_view(error) if error is not None else None,
    )


def _both_sides(old: RunInfo, new: RunInfo) -> dict[str, str]:
    before, after = run_facts(old, []), run_facts(new, [])
    names = ("commit", "started", "machine", "GPUs")
    facts: dict[str, str] = {}
    for name in names:
        if before.get(name) == after.get(name):
            facts |= {name: before[name]} if name in before else {}
        else:
            facts[f"baseline {name}"] = before.get(name, MISSING)
            facts[f"candidate {name}"] = after.get(name, MISSING)
    return facts

"""Reports for people, computed from records alone: Markdown, one self-contained HTML page, CSV."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from reports.records import Report, write_report, write_whole
from reports.tables import bench_table, checks_pivot, checks_table, rows_table, to_csv, to_markdown
from reports.text_tables import format_cell


def write_all(report: Report, out_dir: str | os.PathLike[str], *, peer: str | None = None) -> dict[str, Path]:
    """Write ``report.json``, ``.md``, ``.html`` and ``.csv`` into ``out_dir``; return their paths by suffix.

    ``peer`` names the engine that the benchmark rows are held against.
    """
    folder = Path(out_dir)
    paths = {"json": write_report(folder, report)}
    texts = {
        "md": report_markdown(report, peer=peer),
        "html": report_html(report, peer=peer),
        "csv": to_csv(rows_table(report)),
    }
    for suffix, text in texts.items():
        paths[suffix] = folder / f"report.{suffix}"
        write_whole(paths[suffix], text)
    return paths


def report_markdown(report: Report, *, peer: str | None = None) -> str:
    """A report as GitHub Markdown."""
    parts = [f"# shardproof {report.run.command}\n"]
    if report.checks:
        parts += [to_markdown(checks_pivot(report.checks)), to_markdown(checks_table(report.checks))]
    if report.benches:
        parts.append(to_markdown(bench_table(report.benches, peer=peer)))
    return "\n".join(parts)


def report_html(report: Report, *, peer: str | None = None) -> str:
    """A report as one page that needs no network."""
    tables = [("Checks", checks_table(report.checks)), ("Benchmarks", bench_table(report.benches, peer=peer))]
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            title=f"shardproof {report.run.command}",
            tables=[(name, _cells(table)) for name, table in tables if len(table)],
        )
    )


def _cells(table: pd.DataFrame) -> dict[str, Any]:
    return {
        "columns": list(table.columns),
        "rows": [[format_cell(v) for v in row] for row in table.to_numpy()],
    }


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )

"""Reports and comparisons written to a folder, in every form, computed from records alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from reports.compare import Comparison
from reports.comparison_data import comparison_json, comparison_junit
from reports.files import write_whole
from reports.markdown import comparison_markdown, report_markdown
from reports.pages import comparison_html, report_html
from reports.records import Report, write_report
from reports.tables import changes_table, rows_table, to_csv


def write_all(report: Report, out_dir: str | os.PathLike[str], *, peers: Sequence[str] = ()) -> dict[str, Path]:
    """Write ``report.json``, ``.md``, ``.html`` and ``.csv`` into ``out_dir``; return their paths by suffix.

    ``peers`` names the engines that the benchmark rows are held against; ValueError if no row has one of them.
    """
    texts = {
        "md": report_markdown(report, peers=peers),
        "html": report_html(report, peers=peers),
        "csv": to_csv(rows_table(report, peers=peers)),
    }
    # The records first: whatever the disk does to the pages, they can be made again from these.
    return {"json": write_report(Path(out_dir), report)} | _write(texts, Path(out_dir))


def write_comparison(comparison: Comparison, out_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``report.json``, ``.md``, ``.html``, ``.csv``, ``.xml`` (JUnit); return their paths by suffix."""
    texts = {
        "json": comparison_json(comparison),
        "md": comparison_markdown(comparison),
        "html": comparison_html(comparison),
        "csv": to_csv(changes_table(comparison)),
        "xml": comparison_junit(comparison),
    }
    return _write(texts, Path(out_dir))


def _write(texts: dict[str, str], folder: Path) -> dict[str, Path]:
    paths = {suffix: folder / f"report.{suffix}" for suffix in texts}
    for suffix, text in texts.items():
        write_whole(paths[suffix], text)
    return paths

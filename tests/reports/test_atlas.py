"""Atlases as records, tables and pages, and two of them held together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reports.compare import compare
from reports.comparison_data import comparison_junit
from reports.markdown import comparison_markdown, report_markdown
from reports.pages import comparison_html, report_html
from reports.records import AtlasRow, RecordError, Report, read_report, write_report
from reports.render import write_all
from reports.summary import report_headline
from reports.tables import atlas_counts, atlas_pivot
from tests.reports.builders import a_run


def row(architecture: str, verdict: str = "right", **values: Any) -> AtlasRow:
    """At tp_size 2; with an error where the verdict is about one."""
    errors = {"right": 0.4, "wrong": 31.0}
    known = {"layout": "base", "subject": "transformers", "tp_size": 2, "dtype": "float32", "seconds": 3.0,
             "error_over_budget": errors.get(verdict), "message": "" if verdict == "right" else f"{architecture} is {verdict}",
             "replay": f"shardproof atlas --arch {architecture}"}
    return AtlasRow(architecture=architecture, verdict=verdict, **known | values)  # type: ignore[arg-type]


ROWS = [row("llama", sharded=0.97, sharded_flops=1.0), row("llama", tp_size=3, sharded=0.97),
        row("phi", "wrong", rank=1, module="m.q"), row("gpt2", "refused clearly"),
        row("bloom", "refused unclearly"), row("mamba", "crashed"), row("rwkv", "not compared")]
ATLAS = Report(run=a_run(command="atlas"), atlas=ROWS)


def test_rows_come_back_from_a_file_and_a_report_without_any_is_as_before(tmp_path: Path) -> None:
    write_report(tmp_path, ATLAS)
    assert read_report(tmp_path) == ATLAS
    write_report(tmp_path, Report(run=a_run()))
    assert "atlas" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(("rows", "exit_code"), [(ROWS, 1), (ROWS[:2] + ROWS[3:], 0), (ROWS[3:], 3)])
def test_wrong_is_a_finding_and_nothing_right_is_nothing_compared(rows: list[AtlasRow], exit_code: int) -> None:
    assert Report(run=a_run(), atlas=rows).exit_code == exit_code


@pytest.mark.parametrize(("values", "problem"), [
    ({"verdict": "right", "error_over_budget": 1.1}, "what is right is within budget"),
    ({"verdict": "right", "error_over_budget": None}, "what is right is within budget"),
    ({"verdict": "crashed", "message": " "}, "needs a reason"),
    ({"verdict": "fine"}, "verdict"),
    ({"sharded": 1.5}, "a share is between 0 and 1"),
])
def test_a_row_that_makes_no_sense_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        row("llama", **{"verdict": "right"} | values)


def test_tables_count_and_show_every_row() -> None:
    counts = atlas_counts(ROWS)
    assert counts[counts.tp_size == 2].iloc[0][["right", "wrong", "crashed", "not compared"]].tolist() == [1, 1, 1, 1]
    pivot = atlas_pivot(ROWS)
    assert pivot[pivot.architecture == "llama"].iloc[0].tolist() == ["llama", "base", 97.0, "right 0.4", "right 0.4"]


def test_pages_say_what_is_wrong_and_why_the_rest_is_not_right(tmp_path: Path) -> None:
    page, text = report_html(ATLAS), report_markdown(ATLAS)
    assert report_headline(ATLAS).text == "1 row wrong"
    assert report_headline(ATLAS).detail.endswith("2 right")
    mostly_whole = Report(run=a_run(), atlas=[row("lfm2", sharded=0.06)])
    assert report_headline(mostly_whole).detail.endswith("of those right, 1 shard less than half of their parameters")
    for shown in (page, text):
        assert "phi is wrong" in shown
        assert "shardproof atlas --arch phi" in shown
    for verdict in ("Crashed", "Refused unclearly", "Refused clearly", "Not compared"):
        assert f"<h2>{verdict} " in page
    assert "97.0" in page
    csv = write_all(ATLAS, tmp_path)["csv"].read_text()
    assert csv.splitlines()[0].startswith("kind,architecture,layout")
    assert csv.count("\natlas,") == len(ROWS)


def test_a_page_of_many_rows_counts_by_architecture_and_tells_a_cause_once() -> None:
    many = [row("llama", layout=f"size={size}", tp_size=tp_size, sharded=0.97) for size in range(100) for tp_size in (2, 3, 4)]
    wrong = [row("phi", "wrong", module="m.q", layout=layout) for layout in ("base", "bias=True", "tied=True")]
    refused = [row("bloom", "refused unclearly", layout=f"size={number}") for number in range(9)]
    page = report_html(Report(run=a_run(command="atlas"), atlas=[*many, *wrong, *refused]))
    assert page.count("phi is wrong") == 1
    assert "2 more of this architecture, first in the same module" in page
    assert "<summary>By architecture, with what was said</summary>" in page
    assert page.count("bloom is refused unclearly") == 1
    assert page.index("<td class=\"number\">300</td>") < page.index("<summary>Every layout</summary>") < page.index("size=99")
    assert "report.csv" in page
    assert "report.csv" not in report_html(ATLAS)
    counts = atlas_counts(many)[["layout", "tp_size", "right"]]
    assert counts.values.tolist() == [["options and sizes", tp_size, 100] for tp_size in (2, 3, 4)]


def test_two_atlases_show_what_broke_and_what_was_mended() -> None:
    now = [row("llama", "wrong"), row("phi"), row("gpt2", "refused unclearly"), row("bloom", "refused unclearly"), row("new")]
    comparison = compare(ATLAS, Report(run=a_run(), atlas=now))
    assert {change.name: change.verdict for change in comparison.atlas if change.tp_size == 2} == {
        "llama": "broken", "phi": "mended", "gpt2": "other verdict", "bloom": "same", "mamba": "only in baseline",
        "rwkv": "only in baseline", "new": "only in candidate"}
    assert comparison.exit_code == 1
    assert [change.name for change in comparison.regressions] == ["llama"]
    for shown in (comparison_html(comparison), comparison_markdown(comparison), comparison_junit(comparison)):
        assert "llama is wrong" in shown
    assert compare(ATLAS, ATLAS).exit_code == 0

"""A verdict's record, and its page and Markdown, in which nothing that a server says can break out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reports.markdown import report_markdown
from reports.pages import report_html
from reports.records import RecordError, Report, ScoreRow, VerdictPlaces, VerdictRow, VerdictTest, read_report, write_report
from reports.verdict_rows import at_most
from reports.verdict_tables import verdict_facts
from tests.reports.builders import a_run
from tests.reports.test_pages import Page

EVIL = "<script>alert(1)</script>|`x`"


def a_verdict(**changes: Any) -> VerdictRow:
    values: dict[str, Any] = {
        "a": "http://one/v1, m", "b": "http://other/v1, m", "noise": None, "answer": "bug", "yardstick": "dtype",
        "dtype": "bfloat16", "comparison": "prefill against prefill", "compared": 3, "sequences": 1, "why": "too large",
        "tests": [VerdictTest(name="size", value=2.5, statistic=65.0, says="differences are 65 units of rounding")],
        "places": VerdictPlaces(position=[1, 2, 3], difference=[0.1, -0.2, 3.0], ratio=[1.0, -2.0, 300.0],
                                logprob=[-1.0, -2.0, -0.1]),
        "quantiles": [[-1.0, -2.0], [0.0, 1.0], [1.0, 300.0]], "rates": ["false alarms: 0 of 10"],
        "flips_near_ties": 1, "flips": 2,
    }
    return VerdictRow(**(values | changes))


@pytest.mark.parametrize(("answer", "code", "value"), [("rounding", 0, 0.5), ("bug", 1, 2.0), ("can't tell", 3, 0.5)])
def test_the_answer_is_the_exit_code_and_comes_back_from_the_file(tmp_path: Path, answer: str, code: int, value: float) -> None:
    row = a_verdict(answer=answer, tests=[VerdictTest(name="size", value=value, statistic=1.0, says="so")])
    report = Report(run=a_run(command="verdict"), verdict=row)
    assert report.exit_code == code
    assert read_report(write_report(tmp_path, report)) == report
    page = report_html(report)
    assert {"rounding": "Rounding", "bug": "A bug", "can't tell": "Can&#39;t tell"}[answer] in page


@pytest.mark.parametrize("changes", [
    {"answer": "rounding"}, {"answer": "maybe"}, {"compared": -1}, {"why": " "}, {"tests": []},
    {"places": {"position": [1], "difference": [], "ratio": [], "logprob": []}},
], ids=str)
def test_a_verdict_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        a_verdict(**changes)


def test_nothing_that_a_stream_says_breaks_out_of_the_page() -> None:
    row = a_verdict(a=EVIL, b=EVIL, why=EVIL, first=EVIL, left_out=[EVIL], rates=[EVIL], looks_like=EVIL,
                    tests=[VerdictTest(name="size", value=2.0, statistic=1.0, says=EVIL, group=EVIL)])
    report = Report(run=a_run(command="verdict"), verdict=row)
    source = report_html(report)
    Page(source)
    assert "<script>alert" not in source
    assert "<script>" not in report_markdown(report)
    assert source.count("<svg") == 3


def test_an_answer_without_tests_and_scores_without_faults_have_a_page() -> None:
    report = Report(run=a_run(command="verdict"), verdict=a_verdict(
        answer="can't tell", tests=[], rates=[], places=VerdictPlaces(), quantiles=[], flips=None, flips_near_ties=None,
        would_tell=["more tokens"]))
    assert "more tokens" in report_html(report)
    assert "more tokens" in report_markdown(report)
    scores = Report(run=a_run(), scores=[ScoreRow(rule="r", planted="", dtype="bfloat16", tokens=[1, 2], runs=10, bug=1)])
    assert scores.exit_code == 0
    assert "Faults" not in report_markdown(scores)
    assert "1 rule scored" in report_html(scores)


def test_what_was_compared_is_told() -> None:
    facts = verdict_facts(a_verdict())
    assert facts["compared"] == "3 tokens of 1 sequences, prefill against prefill"
    assert facts["other most probable token"] == "3 tokens: 1 near-ties, 2 not"
    assert "noise" not in facts


@pytest.mark.parametrize(("seen", "runs", "most"), [
    (0, 3000, 0.000998), (0, 300, 0.009936), (0, 1, 0.95), (1, 10, 0.394163), (1, 100, 0.046558), (4, 4, 1.0), (10, 10, 1.0)])
def test_the_bound_of_a_rate_is_the_exact_one(seen: int, runs: int, most: float) -> None:
    assert at_most(seen, runs) == pytest.approx(most, rel=1e-3)

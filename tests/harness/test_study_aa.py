"""The A/A study counts what compare says, goes on from earlier pieces, and finds it when compare is wrong too often."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from harness.bench.bench import BenchResult
from harness.bench.plan import BenchPlan
from harness.studies import aa
from harness.studies.aa import Question, go_on_from, study
from reports.records import RunInfo, read_report, write_report
from tests.reports.builders import a_bench, a_report

PLAN = BenchPlan(model="tiny", folder=Path(), workloads=("layers-subset",), device="cpu")
CASES = ("down_proj, batch 1", "o_proj, batch 1")


class Bench:
    """Stands where ``run_bench`` stands: timings with little noise, of a candidate that is as slow as it is told to be."""

    def __init__(self, alarms: dict[str, float] | None = None, *, deaf: bool = False) -> None:
        self.draw = random.Random(0)
        self.alarms = alarms or {}
        self.deaf = deaf
        self.asked: list[str] = []

    def __call__(self, plan: BenchPlan, **options: object) -> BenchResult:
        self.asked.append("slower" if plan.slower else "same")
        reports = {}
        for side in ("candidate", "baseline"):
            rows = []
            for case in CASES:
                share = (0.0 if self.deaf else plan.slower.get(case.split(",")[0], 0.0)) + self.alarms.get(case, 0.0)
                scale = 1 + (share if side == "candidate" else 0)
                times = [scale * self.draw.gauss(100, 1) for _ in range(30)]
                rows.append(a_bench(case, workload="layers", samples={"call_us": times}))
            reports[side] = a_report(*rows)
        return BenchResult(reports=reports, interrupted=False, failed=False)


def ask_both(monkeypatch: pytest.MonkeyPatch, bench: Bench, comparisons: int = 12) -> list[Question]:
    monkeypatch.setattr(aa, "run_bench", bench)
    questions = [Question(slower={}), Question(slower={"down_proj": 0.1})]
    assert study(PLAN, questions, comparisons)
    return questions


def test_a_comparison_that_is_right_passes_both_questions_which_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    rows = [question.row("tiny", "bfloat16") for question in ask_both(monkeypatch, bench)]
    assert [row.check for row in rows] == ["the same code", "10 % more work in down_proj"]
    assert [(row.verdict, row.cases, row.compared, row.extra["wrong"]) for row in rows] == [("pass", 12, 24, 0)] * 2
    assert bench.asked == ["same"] * 10 + ["slower"] * 10 + ["same"] * 2 + ["slower"] * 2
    assert rows[1].extra["called_slower"] == {"down_proj, batch 1": 12}
    assert rows[1].extra["median_time_ratio"]["down_proj, batch 1"] == pytest.approx(1.1, rel=0.01)
    assert rows[0].extra["median_time_ratio"]["down_proj, batch 1"] == pytest.approx(1.0, rel=0.01)


def test_alarms_where_nothing_changed_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    same, _ = ask_both(monkeypatch, Bench({"o_proj, batch 1": 0.2}))
    row = same.row("tiny", "bfloat16")
    assert (row.verdict, row.message) == ("finding", "12 of 12 comparisons had a slower row")


def test_a_slow_down_that_is_missed_or_seen_in_another_layer_only_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    for bench in (Bench(deaf=True), Bench({"o_proj, batch 1": 0.2}, deaf=True)):
        _, slower = ask_both(monkeypatch, bench)
        row = slower.row("tiny", "bfloat16")
        assert (row.verdict, row.message) == ("finding", "12 of 12 comparisons were not called slower")


def test_a_study_goes_on_from_its_earlier_piece(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench()
    monkeypatch.setattr(aa, "run_bench", bench)
    first = [Question(slower={}), Question(slower={"down_proj": 0.1})]
    assert not study(PLAN, first, 12, is_over=lambda: len(bench.asked) >= 13)
    assert [len(question.judged) for question in first] == [10, 3]
    written = a_report(*(question.row("tiny", "bfloat16") for question in first))
    path = write_report(tmp_path, written)
    second = [Question(slower={}), Question(slower={"down_proj": 0.1})]
    go_on_from(path, second, written.run)
    assert second == first
    assert study(PLAN, second, 12)
    assert [len(question.judged) for question in second] == [12, 12]
    assert len(bench.asked) == 24


def test_other_code_machines_and_questions_are_not_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    questions = ask_both(monkeypatch, Bench(), comparisons=1)
    path = write_report(tmp_path, a_report(*(question.row("tiny", "bfloat16") for question in questions)))
    run: RunInfo = read_report(path).run
    with pytest.raises(ValueError, match=r"cannot be gone on from \(commit: .* then, abc now\)"):
        go_on_from(path, [Question(slower={}), Question(slower={"down_proj": 0.1})], replace(run, commit="abc"))
    with pytest.raises(ValueError, match=r"machine type: .* then, toaster now"):
        go_on_from(path, [Question(slower={}), Question(slower={"down_proj": 0.1})],
                   replace(run, machine=replace(run.machine, type="toaster")))
    with pytest.raises(ValueError, match=r"answers \['10 % more work in down_proj'\]"):
        go_on_from(path, [Question(slower={}), Question(slower={"o_proj": 0.1})], run)

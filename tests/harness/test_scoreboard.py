"""The scoreboard: pairs whose answer is known, what every rule says of them, and the rates that come of it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

import harness.verdict.rates
from harness.faults import FAULTS
from harness.faults.models import FaultModels
from harness.studies import scoreboard
from harness.studies.score.counts import SAME_ALARMS, line_of, scores
from harness.studies.score.pairs import TP_SIZES, Pair, Subjects, clean_pairs, faulty_pair
from harness.studies.score.rules import PEOPLES, VALUES, VERDICTS, splits
from harness.studies.scoreboard import main
from harness.verdict.rates import ON_FITTED, rates
from harness.verdict.tokens import align
from reports.records import Report, ScoreRow, read_report, write_report
from reports.verdict_rows import ALL_FAULTS
from reports.verdict_tables import faults_table, scores_table
from tests.reports.builders import a_run


@pytest.fixture(scope="module")
def clean() -> Iterator[list[Pair]]:
    with Subjects() as subjects:
        yield list(clean_pairs(subjects, 0, 20))  # two layers, few tokens, with a reference


def test_clean_pairs_are_called_rounding_whole_and_in_parts(clean: list[Pair]) -> None:
    assert [pair.tp_size for pair in clean] == list(TP_SIZES)
    for pair in clean:
        line = line_of(pair, 20)
        assert {answer for rule in VERDICTS for _, answer in line["said"][rule]} == {"rounding"}
        assert set(line["values"]) == set(VALUES)
        assert pair.b is not None
        parts = splits(align(pair.a, pair.b))
        assert sum(map(len, parts)) == pair.a.num_tokens


def test_a_single_pair_shares_its_model_with_no_other_verdict() -> None:
    with Subjects() as subjects:
        pairs = list(clean_pairs(subjects, 1, 7, single=True))
    assert len(pairs) == 1
    assert pairs[0].reference is not None
    assert pairs[0].tp_size != pairs[0].noise.info.tp_size
    said = line_of(pairs[0], 7, whole=True)["said"]
    assert all([tokens for tokens, _ in said[rule]] == [pairs[0].a.num_tokens] for rule in VERDICTS)


@pytest.mark.slow
@pytest.mark.multirank
def test_a_fault_is_called_a_bug_and_one_that_changes_no_bit_is_left_out() -> None:
    with FaultModels(seed=0) as models:
        seen = faulty_pair(models, FAULTS["row-bias-on-every-rank"], "float32", 0, num_tokens=150)
        assert seen is not None
        said = line_of(seen)["said"]
        assert all(answer == "bug" for rule in VERDICTS for _, answer in said[rule])
        wide = faulty_pair(models, FAULTS["padding-not-cut"], "float32", 0, num_tokens=100, with_reference=False)
        assert wide is not None
        assert wide.b is not None
        assert wide.whole is None  # one column more than one rank has
        assert line_of(wide)["values"]["KL divergence"] == math.inf
        narrow = faulty_pair(models, FAULTS["last-tokens-on-no-rank"], "float32", 0, num_tokens=100, with_reference=False)
        assert narrow is not None
        assert narrow.b is None  # no log-probability of the tokens that are gone
        unseen = FAULTS["seed-of-each-rank"]
        assert faulty_pair(models, unseen, "float32", 0, num_tokens=100, with_reference=False) is None


def a_line(pair: str, planted: str, value: float, answer: str, model: int | None = None) -> dict[str, Any]:
    return {"pair": pair, "planted": planted, "dtype": "bfloat16", "model": model, "tokens": 200,
            "said": {rule: [[200, answer]] for rule in VERDICTS}, "values": dict.fromkeys(VALUES, value)}


def test_rules_are_counted_and_those_of_people_with_the_best_bound_beside_them() -> None:
    lines = [a_line("c", "", 0.2, "rounding", model=500), a_line("d", "", 0.4, "can't tell", model=501),
             a_line("f", "lost", 0.3, "bug"), a_line("g", "lost", 0.6, "bug")]
    rows = scores([*lines, a_line("clean-0-5-2", "", 0.1, "bug", model=5)])
    found = {(row.rule, row.planted): row for row in rows}
    assert found[f"verdict by noise {ON_FITTED}", ""].bug == 1  # counted apart
    clean = found["verdict by noise", ""]
    assert (clean.runs, clean.bug, clean.cant_tell, clean.models) == (2, 0, 1, 2)
    assert found["verdict by noise", "lost"].bug == 2
    rule = "largest difference at most 0.05"
    assert (found[rule, ""].bug, found[rule, ALL_FAULTS].bug) == (3, 2)
    best = f"largest difference {SAME_ALARMS}"
    assert (found[best, ""].bug, found[best, ALL_FAULTS].bug) == (0, 1)
    table = scores_table(rows).set_index("rule")
    assert table.loc[best, "percent of faults seen, all"] == 50
    assert table.loc["verdict by noise", "percent at most"] == pytest.approx(77.6, rel=0.01)
    assert faults_table(rows)["verdict by noise"].tolist() == ["2/2"]
    rules = {row.rule for row in rows if ON_FITTED not in row.rule}
    assert rules == {*VERDICTS, *PEOPLES, *(f"{name} {SAME_ALARMS}" for name in VALUES)}


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[set[str]] = []

    def draw(options: argparse.Namespace, done: set[str]) -> Generator[dict[str, Any], None, None]:
        drawn.append(set(done))
        yield a_line(f"pair {len(done)}", "", 0.1, "rounding", model=500)

    monkeypatch.setattr(scoreboard, "_drawn", draw)
    for _ in range(2):
        assert main(["--out", str(tmp_path), "--minutes", "1"]) == 0
    assert drawn == [set(), {"pair 0"}]
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 2
    assert read_report(tmp_path).scores[0].runs == 2
    (tmp_path / "said.jsonl").write_text(json.dumps(a_line("x", "", 1.0, "bug", model=500)) + "\n")
    assert main(["--out", str(tmp_path), "--minutes", "0"]) == 1
    assert len(drawn) == 2


def test_rates_come_from_the_record_of_as_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ScoreRow(rule=f"verdict by noise{suffix}", planted=planted, dtype="bfloat16", tokens=[64, 64], runs=100, bug=bug)
            for suffix in ("", ", 64 tokens") for planted, bug in (("", 0), ("lost", 90 if suffix else 99))]
    record = write_report(tmp_path / "report.json", Report(run=a_run(), scores=rows))
    monkeypatch.setattr(harness.verdict.rates, "_scores", lambda: tuple(read_report(record).scores))
    assert rates("noise", "bfloat16", 1000) == [
        "false alarms: 0 of 100 clean pairs in bfloat16 were called a bug, at most 3 % (95 % sure), 64 to 64 tokens each",
        "power: 99 of 100 planted faults that reach the logits in bfloat16 were called a bug, 0 can't tell, 64 to 64 tokens each"]
    assert rates("noise", "bfloat16", 70)[1].startswith("power: 90 of 100")
    assert "nobody has measured" in rates("dtype", "float64", 1000)[0]

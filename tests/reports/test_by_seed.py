"""The table of faults by seed, from a few reports."""

from __future__ import annotations

from reports.by_seed import CONTROL, faults_by_seed
from reports.records import Report, Verdict
from tests.reports.builders import a_check, a_run


def report_of(seed: int, **verdicts: Verdict) -> Report:
    expected = {"control": []}
    rows = [a_check("faults", fault=name, tp_size=2, verdict=verdict,
                    extra={"patched": "layers", "expected": expected.get(name, ["layers", "logits"])})
            for name, verdict in verdicts.items()]
    summary = a_check("faults", fault="localisation", tp_size=2, verdict="finding")
    return Report(run=a_run(command="faults", seed=seed), checks=[*rows, summary])


def test_a_row_a_fault_says_at_which_seeds_it_was_seen_and_at_which_not() -> None:
    table = faults_by_seed([report_of(0, a="pass", control="pass"), report_of(1, a="finding", control="pass"),
                            report_of(2, a="pass", control="error"), report_of(3, a="pass")])
    assert table.to_numpy().tolist() == [
        ["layers", "a", 2, "layers, logits", "0, 2–3", "1"], ["layers", "control", 2, CONTROL, "0–1", "2"]]


def test_the_later_of_two_reports_of_one_seed_counts() -> None:
    table = faults_by_seed([report_of(0, a="finding"), report_of(0, a="pass")])
    assert table[["fault", "at seeds", "not at seeds"]].to_numpy().tolist() == [["a", "0", ""]]

"""A verdict, and the scoreboard of rules, as tables, from their records alone."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from reports.text_tables import format_number
from reports.verdict_rows import ALL_FAULTS, ScoreRow, VerdictRow, at_most

YARDSTICKS = {"reference": "a float64 reference with simulated rounding, token by token", "noise": "another run that is right",
              "dtype": "the dtype alone"}


def verdict_tests_table(row: VerdictRow | None) -> pd.DataFrame:
    """One row a test."""
    columns = ["test", "share_of_allowed", "what it says", "parts tried"]
    tests = [] if row is None else row.tests
    return pd.DataFrame([(test.name, test.value, test.says, test.tried) for test in tests], columns=columns,
                        dtype=object)


def verdict_facts(row: VerdictRow) -> dict[str, str]:
    """What was compared: name -> value."""
    facts = {
        "A": row.a, "B": row.b, "noise": row.noise or "", "compared": f"{format_number(row.compared)} tokens of "
        f"{format_number(row.sequences)} sequences, {row.comparison}",
        "rounding measured by": f"{YARDSTICKS.get(row.yardstick, row.yardstick)}{f' ({row.dtype})' if row.dtype else ''}",
        "looks like": row.looks_like, "first token beyond rounding": row.first,
        "would tell": "; ".join(row.would_tell), "left out": "; ".join(row.left_out),
    }
    if row.flips is not None and row.flips_near_ties is not None:
        facts["other most probable token"] = (f"{format_number(row.flips_near_ties + row.flips)} tokens: "
                                              f"{format_number(row.flips_near_ties)} near-ties, {format_number(row.flips)} not")
    return {name: value for name, value in facts.items() if value}


def scores_table(rows: Sequence[ScoreRow]) -> pd.DataFrame:
    """One row a rule: share of clean pairs called bugs, and of faults seen, by dtype and all together."""
    lines = []
    for rule in dict.fromkeys(row.rule for row in rows):
        own = [row for row in rows if row.rule == rule]
        clean, faulty = [row for row in own if not row.planted], [row for row in own if row.planted]
        line: dict[str, object] = {"rule": rule}
        if clean:
            runs, bugs = sum(row.runs for row in clean), sum(row.bug for row in clean)
            line |= {"clean pairs": runs, "called a bug": bugs, "percent": 100 * bugs / runs,
                     "percent at most": 100 * at_most(bugs, runs), "clean: can't tell": sum(row.cant_tell for row in clean)}
        for dtype in (*dict.fromkeys(row.dtype for row in faulty), "all"):
            of_dtype = [row for row in faulty if dtype in ("all", row.dtype)]
            if runs := sum(row.runs for row in of_dtype):
                line[f"percent of faults seen, {dtype}"] = 100 * sum(row.bug for row in of_dtype) / runs
        if runs := sum(row.runs for row in faulty):
            line |= {"faulty pairs": runs, "faulty: can't tell": sum(row.cant_tell for row in faulty)}
        lines.append(line)
    return pd.DataFrame(lines)


def faults_table(rows: Sequence[ScoreRow]) -> pd.DataFrame:
    """One row a fault: the share of pairs in which each rule saw it, over all dtypes."""
    faulty = [row for row in rows if row.planted not in ("", ALL_FAULTS)]
    rules = list(dict.fromkeys(row.rule for row in faulty))
    lines = []
    for planted in dict.fromkeys(row.planted for row in faulty):
        line: dict[str, object] = {"fault": planted}
        for rule in rules:
            own = [row for row in faulty if (row.planted, row.rule) == (planted, rule)]
            if runs := sum(row.runs for row in own):
                line[rule] = f"{sum(row.bug for row in own)}/{runs}"
        lines.append(line)
    return pd.DataFrame(lines)

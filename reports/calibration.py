"""A calibration as tables, from its records alone: tolerances, false alarms, errors of correct code, power."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from reports.records import Calibration, CheckRow, Report
from reports.verdict_rows import SURE, at_most


def calibration_tables(report: Report) -> dict[str, tuple[str, pd.DataFrame]]:
    """Heading -> (a sentence or two, table), in the order in which to read them; nothing for other reports."""
    calibration = report.calibration
    if calibration is None:
        return {}
    tables = {
        "Tolerances": (
            "An error of a model's logits is within its budget up to max(k × the reference error, c); errors are in roundoffs of "
            "their scale. Fitted: what the samples of correct code ask for, with the margin to spare. Worst: of all samples, as "
            "a fraction of its budget.", tolerances_table(calibration)),
        "False alarms": (
            "Whole runs of each check on clean code, as verify runs it, under every setting. Rate at most: red runs, with "
            f"{100 * SURE:g} % confidence (one-sided, Clopper and Pearson).", alarms_table(report.checks)),
        "False alarms by setting": (
            "The same runs, by the instruction sets that torch, oneDNN and MKL were held to, and in drawn orders of summation: "
            "red runs / runs, and the worst error over budget.", settings_table(report.checks)),
        "Power": (
            "The smallest relative error in one rank's part of a sum that is seen in half of the cases, in 99 % of them, and in "
            "99 % of the runs of the check, which draw several such cases.", power_table(calibration)),
        "Errors of correct code": (
            "Quantiles over the samples. Needs k, needs c: what these samples ask of one constant, with the margin, the other "
            "one being as it is.", errors_table(calibration)),
    }
    return {heading: (text, table) for heading, (text, table) in tables.items() if len(table)}


def tolerances_table(calibration: Calibration) -> pd.DataFrame:
    """One row a statistic."""
    return _frame([{
        "dtypes": row.precision, "statistic": row.statistic, "k": row.k, "c": row.c, "fitted k": row.fitted_k,
        "fitted c": row.fitted_c, "margin": row.margin, "samples": row.samples, "worst": row.worst}
        for row in calibration.tolerances])


def alarms_table(rows: Sequence[CheckRow]) -> pd.DataFrame:
    """One row a check and dtype: all settings and tp_sizes together."""
    lines = []
    for (check, dtype), own in _grouped(rows, lambda row: (row.check, row.dtype)).items():
        runs, cases, red = _runs(own), sum(row.cases for row in own), _red_runs(own)
        lines.append({"check": check, "dtype": dtype, "runs": runs, "red runs": red, "rate at most": at_most(red, runs),
                      "cases": cases, "rate a case at most": at_most(red, cases), "worst error / budget": _worst(own)})
    return _frame(lines)


def settings_table(rows: Sequence[CheckRow]) -> pd.DataFrame:
    """One row a check and dtype, one column a setting."""
    settings = dict.fromkeys(row.model for row in rows if "runs" in row.extra)
    lines = []
    for (check, dtype), own in _grouped(rows, lambda row: (row.check, row.dtype)).items():
        line: dict[str, object] = {"check": check, "dtype": dtype}
        for setting in settings:
            under = [row for row in own if row.model == setting]
            worst = _worst(under)
            line[setting] = f"{_red_runs(under)}/{_runs(under)}" + ("" if worst is None else f" {worst:.2f}")
        lines.append(line)
    return _frame(lines)


def _grouped(rows: Sequence[CheckRow], key: Callable[[CheckRow], tuple[str, str]]) -> dict[tuple[str, str], list[CheckRow]]:
    groups: dict[tuple[str, str], list[CheckRow]] = {}
    for row in rows:
        if "runs" in row.extra:
            groups.setdefault(key(row), []).append(row)
    return groups


def _runs(rows: Sequence[CheckRow]) -> int:
    return sum(row.extra["runs"] for row in rows)


def _red_runs(rows: Sequence[CheckRow]) -> int:
    return sum(row.extra["false_alarms"] for row in rows)


def _worst(rows: Sequence[CheckRow]) -> float | None:
    return max((row.error_over_budget for row in rows if row.error_over_budget is not None), default=None)


def power_table(calibration: Calibration) -> pd.DataFrame:
    """One row a check, kind of values, dtype and tp_size."""
    return _frame([{
        "check": row.check, "values": row.values, "dtype": row.dtype, "tp": row.tp_size, "cases": row.cases,
        "in half": row.half, "in 99 %": row.most, "cases a run": row.per_run, "in 99 % of runs": row.run}
        for row in calibration.powers])


def errors_table(calibration: Calibration) -> pd.DataFrame:
    """One row a kind, statistic, dtype and tp_size."""
    return _frame([{
        "kind": row.kind, "statistic": row.statistic, "dtype": row.dtype, "tp": row.tp_size, "samples": row.samples,
        **_quantiles("error", row.candidate), **_quantiles("ratio", row.ratio), "lucky": row.lucky,
        "needs k": row.needs_k, "needs c": row.needs_c} for row in calibration.errors])


def _quantiles(name: str, values: Mapping[str, float]) -> dict[str, object]:
    shown = {"0.5": "median", "0.99": "99 %", "1": "worst"}
    return {f"{name} {label}": values.get(share) for share, label in shown.items()}


def _frame(lines: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(list(lines), dtype=object)

"""Records as pandas tables: one row a check (or kind of its cases) and layout, one row a benchmark case and metric."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import numpy as np
import pandas as pd

from reports import metrics
from reports.compare import AtlasChange, AtlasChangeVerdict, CheckChange, CheckVerdict, Comparison, SpeedChange, SpeedVerdict
from reports.records import AtlasRow, AtlasVerdict, BenchRow, CheckRow, NotMeasured, Report, RunInfo
from reports.text_tables import format_number

CHECK_COLUMNS = (
    "check", "model", "dtype", "fabric", "tp_size", "verdict", "error_over_budget", "cases", "compared",
    "excused", "seconds", "rank", "module", "message", "replay",
)  # fmt: skip
BOUND_NOTE = "(≤1): a bound that right sums reach, so that 1 is no near miss"
_Change = TypeVar("_Change", CheckChange, AtlasChange, SpeedChange)
# (key of a row, metric) -> median over its rounds
_Medians = dict[tuple[tuple[Any, ...], str], float]


def checks_table(rows: Sequence[CheckRow]) -> pd.DataFrame:
    """One row a `CheckRow`: checks and their kinds in the order of their first row, then model, dtype, fabric, tp_size."""
    lines = [{name: getattr(row, name) for name in CHECK_COLUMNS} | {"check": row.name} for row in _in_order(rows)]
    for line in lines:
        line["message"] = line["message"] or None  # an empty message is none, as in every other column
        if (error := line["error_over_budget"]) is not None and math.isnan(error):
            line["error_over_budget"] = "NaN"  # a NaN is an empty cell to pandas
    return _frame(lines, CHECK_COLUMNS)


def checks_pivot(rows: Sequence[CheckRow], cell: Callable[[CheckRow], object] | None = None) -> pd.DataFrame:
    """Checks down, each with a row a kind, tp_size across; a cell is `row_cell` of its row, or what ``cell`` makes of it.

    Model and dtype are columns where they differ; fabric where two of them ran one check and tp_size: one rank alone is always
    ``solo``, so that a fabric that goes with tp_size tells nothing new.
    """
    varying = [name for name in ("model", "dtype") if len({getattr(row, name) for row in rows}) > 1]
    if len({(row.name, row.model, row.dtype, row.tp_size) for row in rows}) < len(rows):
        varying.append("fabric")
    lines: dict[tuple[str, ...], dict[str, object]] = {}
    for row in _in_order(rows):
        keys = {"check": row.name} | {name: getattr(row, name) for name in varying}
        lines.setdefault(tuple(keys.values()), keys)[f"tp {row.tp_size}"] = (cell or row_cell)(row)
    return _frame(list(lines.values()), ["check", *varying, *(f"tp {size}" for size in sorted({row.tp_size for row in rows}))])


def _in_order(rows: Sequence[CheckRow]) -> list[CheckRow]:
    checks = list(dict.fromkeys(row.check for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    return sorted(rows, key=lambda row: (checks.index(row.check), names.index(row.name), *row.key))


def bound_mark(row: CheckRow) -> str:
    """Beside the error of a row whose budget is a bound that right sums reach."""
    return " (≤1)" if row.verdict == "pass" and row.extra.get("bound") == "rounding" else ""


def row_cell(row: CheckRow) -> str:
    """``pass 0.43``; a bound of rounding, which right sums reach, is marked: ``pass 0.996 (≤1)``."""
    return verdict_cell(row.verdict, row.error_over_budget) + bound_mark(row)


def verdict_cell(verdict: str, error_over_budget: float | None) -> str:
    """``pass 0.43``: a verdict and, if it is about size, the error as a fraction of its budget."""
    if error_over_budget is None:
        return verdict
    return f"{verdict} {format_number(float(f'{error_over_budget:.3g}'))}"


def bench_tables(rows: Sequence[BenchRow], *, peers: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """`bench_table` of each workload on its own."""
    table = bench_table(rows, peers=peers)
    return {name: table[table["workload"] == name] for name in dict.fromkeys(row.workload for row in rows)}


def bench_table(rows: Sequence[BenchRow], *, peers: Sequence[str] = ()) -> pd.DataFrame:
    """One row a `BenchRow` and metric, in the records' order.

    median, iqr         over the rounds, in the metric's unit
    p99                 of durations only: the tail is what a user waits for
    first               the first run, apart from the rounds
    times_<peer>        how many times better than that engine on the same case; above 1 is better. At the same
                        tp_size, or with one rank if the peer ran on no other number
    scaling_efficiency  speed-up over tp_size 1 divided by tp_size; 1 is perfect; not for sizes of memory
    percent_of_bound    of the hardware bound, where the record names one
    memory_gib          peak memory of all of the engine's ranks together, where it was measured

    Raises ValueError if no row has one of the engines ``peers``.
    """
    engines = sorted({row.engine for row in rows})
    for peer in peers:
        if rows and peer not in engines:
            raise ValueError(f"peer={peer!r} is not among the engines of this report: {', '.join(engines)}")
    medians = {(row.key, m): float(np.median(v)) for row in rows for m, v in row.samples.items()}
    columns = [*BenchRow.KEY, "metric", "rounds", "median", "iqr", "p99", "first"]
    columns += [f"times_{peer}" for peer in peers]
    columns += ["scaling_efficiency", "percent_of_bound", "memory_gib"]
    lines: list[dict[str, object]] = []
    for row in rows:
        for metric, values in row.samples.items():
            median = medians[row.key, metric]
            low, high = np.percentile(values, [25, 75])
            line: dict[str, object] = {name: getattr(row, name) for name in BenchRow.KEY}
            line |= {"metric": metric, "rounds": len(values), "median": median, "iqr": float(high - low)}
            has_tail = metrics.is_time(metric) and not metrics.is_percentile(metric)
            line["p99"] = float(np.percentile(values, 99)) if has_tail else None
            line["first"] = row.first.get(metric)
            line["scaling_efficiency"] = _scaling_efficiency(row, metric, medians)
            line["percent_of_bound"] = _percent_of_bound(row, metric, median)
            line["memory_gib"] = row.metrics.get("memory_gib")
            for peer in peers:
                other = _peer_median(row, metric, peer, medians)
                line[f"times_{peer}"] = metrics.gain(metric, median, other) if other is not None else None
            lines.append(line)
    return _frame(lines, columns)


def check_changes_table(changes: Sequence[CheckChange]) -> pd.DataFrame:
    """One row a `CheckChange`, what needs attention first."""
    columns = ("verdict", "check", "tp_size", "baseline", "candidate", "model", "dtype", "fabric")
    return _frame([_change_line(change, columns) | {"check": change.name}
                   for change in _worst_first(changes, CheckVerdict)], columns)


def _change_line(change: CheckChange | AtlasChange, columns: Sequence[str]) -> dict[str, object]:
    return {name: getattr(change, name) for name in columns} | {
        "baseline": verdict_cell(change.baseline, change.baseline_error) or None,
        "candidate": verdict_cell(change.candidate, change.candidate_error) or None}


def _worst_first(changes: Sequence[_Change], verdicts: Any) -> list[_Change]:
    """In the order in which the type of their verdicts lists these."""
    return sorted(changes, key=lambda change: get_args(verdicts).index(change.verdict))


def atlas_table(rows: Sequence[AtlasRow]) -> pd.DataFrame:
    """One row an `AtlasRow`; shares in percent."""
    columns = ("architecture", "layout", "subject", "dtype", "tp_size", "verdict", "error_over_budget", "percent_sharded",
               "percent_of_flops_sharded", "rank", "module", "message", "changes", "said", "seconds", "replay")
    return _frame([
        {name: getattr(row, name, None) for name in columns} | {
            "percent_sharded": _percent(row.sharded), "percent_of_flops_sharded": _percent(row.sharded_flops),
            "message": row.message or None, "said": "; ".join(row.said) or None,
            "changes": ", ".join(f"{name}={value!r}" for name, value in row.changes.items()) or None}
        for row in rows], columns)


def atlas_pivot(rows: Sequence[AtlasRow], cell: Callable[[AtlasRow], object] | None = None) -> pd.DataFrame:
    """Architectures and layouts down, tp_size across; dtype is a column where it differs, subject where rows need it."""
    varying = ["dtype"] if len({row.dtype for row in rows}) > 1 else []
    if len({(row.architecture, row.layout, row.dtype, row.tp_size) for row in rows}) < len(rows):
        varying.insert(0, "subject")
    lines: dict[tuple[str, ...], dict[str, object]] = {}
    for row in rows:
        keys = {"architecture": row.architecture, "layout": row.layout} | {name: getattr(row, name) for name in varying}
        line = lines.setdefault(tuple(keys.values()), keys)
        line[f"tp {row.tp_size}"] = cell(row) if cell else verdict_cell(row.verdict, row.error_over_budget)
        if row.sharded is not None:
            line["percent_sharded"] = _percent(row.sharded)
    sizes = [f"tp {size}" for size in sorted({row.tp_size for row in rows})]
    return _frame(list(lines.values()), ["architecture", "layout", *varying, "percent_sharded", *sizes])


def atlas_counts(rows: Sequence[AtlasRow]) -> pd.DataFrame:
    """How many rows of each verdict, by subject, dtype and tp_size; base rows apart from those of options and sizes."""
    names, verdicts = ("subject", "layout", "dtype", "tp_size"), get_args(AtlasVerdict)[::-1]
    counts = Counter((row.subject, "base" if row.layout == "base" else "options and sizes", row.dtype, row.tp_size, row.verdict)
                     for row in rows)
    groups = sorted({key[:-1] for key in counts}, key=lambda key: (*key[:2], key[2] != "float32", *key[2:]))
    return _frame([dict(zip(names, group, strict=True)) | {verdict: counts[*group, verdict] for verdict in verdicts}
                   for group in groups], (*names, *verdicts))


def atlas_architectures(rows: Sequence[AtlasRow]) -> pd.DataFrame:
    """One row an architecture: how many of each verdict; of the right ones the first one's share, and the largest error."""
    verdicts = get_args(AtlasVerdict)[::-1]
    lines = []
    for architecture, own in _grouped(rows, lambda row: row.architecture).items():
        counts = Counter(row.verdict for row in own)
        lines.append({
            "architecture": architecture, "rows": len(own), **{verdict: counts[verdict] or None for verdict in verdicts},
            "percent_sharded": next((_percent(row.sharded) for row in own if row.verdict == "right"), None),
            "error_over_budget": max((row.error_over_budget or 0.0 for row in own if row.verdict == "right"), default=None)})
    return _frame(lines, ("architecture", "rows", *verdicts, "percent_sharded", "error_over_budget"))


def atlas_reasons(rows: Sequence[AtlasRow]) -> pd.DataFrame:
    """One row an architecture and what was said of it, with all layouts of which it was said."""
    return _frame([
        {"architecture": architecture, "rows": len(own), "message": message} | {
            name: ", ".join(dict.fromkeys(str(getattr(row, name)) for row in own)) for name in ("layout", "dtype", "tp_size")}
        for (architecture, message), own in _grouped(rows, lambda row: (row.architecture, row.message)).items()],
        ("architecture", "layout", "dtype", "tp_size", "rows", "message"))


def _grouped(rows: Sequence[AtlasRow], key: Callable[[AtlasRow], Any]) -> dict[Any, list[AtlasRow]]:
    groups: dict[Any, list[AtlasRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def atlas_alike(rows: Sequence[AtlasRow]) -> list[list[AtlasRow]]:
    """Those of one architecture in which the same module is told, together: they have one cause, as a rule."""
    return list(_grouped(rows, lambda row: (row.architecture, row.module)).values())


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def atlas_changes_table(changes: Sequence[AtlasChange]) -> pd.DataFrame:
    """One row an `AtlasChange`, what needs attention first."""
    columns = ("verdict", "architecture", "layout", "tp_size", "baseline", "candidate", "subject", "dtype", "message")
    return _frame([_change_line(change, columns) | {"message": change.message or None}
                   for change in _worst_first(changes, AtlasChangeVerdict)], columns)


def speed_changes_table(changes: Sequence[SpeedChange]) -> pd.DataFrame:
    """One row a `SpeedChange`, what needs attention first; ``times_better`` is candidate over baseline."""
    columns = (
        "verdict", "workload", "case", "engine", "tp_size", "metric", "times_better", "low", "high",
        "baseline", "candidate", "rounds", "model", "dtype", "fabric",
    )  # fmt: skip
    return _frame([
        {name: getattr(change, name) for name in (*BenchRow.KEY, "metric", "verdict", "low", "high")} | {
            "times_better": change.gain, "baseline": change.baseline_median, "candidate": change.candidate_median,
            "rounds": f"{change.baseline_rounds} / {change.candidate_rounds}"}
        for change in _worst_first(changes, SpeedVerdict)], columns)


def not_measured_table(rows: Sequence[NotMeasured]) -> pd.DataFrame:
    """One row a `NotMeasured`."""
    columns = ("verdict", "workload", "case", "engine", "tp_size", "reason")
    return _frame([{name: getattr(row, name) for name in columns} for row in rows], columns)


def skipped_table(rows: Sequence[CheckRow]) -> pd.DataFrame:
    """The skipped ones of ``rows`` and why: one line for those of a check with one reason."""
    lines = [{"check": row.name, "model": row.model, "tp_size": row.tp_size, "reason": row.message}
             for row in rows if row.verdict == "skipped"]
    table = joined(_frame(lines, ("check", "model", "tp_size", "reason")))
    return table if table["model"].nunique() > 1 else table.drop(columns="model")


def joined(table: pd.DataFrame) -> pd.DataFrame:
    """One line for lines that differ in ``tp_size`` alone, with all of their sizes."""
    others = [name for name in table.columns if name != "tp_size"]
    lines = table.groupby(others, sort=False, dropna=False)["tp_size"].agg(list).reset_index()
    lines["tp_size"] = [own[0] if len(own) == 1 else ", ".join(map(str, own)) for own in lines["tp_size"]]
    return lines[list(table.columns)]


def rows_table(report: Report, *, peers: Sequence[str] = ()) -> pd.DataFrame:
    """All rows of a report in one table, for CSV, whatever they are of; each with its run."""
    run = report.run
    table = stacked(
        check=checks_table(report.checks),
        bench=bench_table(report.benches, peers=peers),
        not_measured=not_measured_table(report.not_measured),
        atlas=atlas_table(report.atlas),
    )
    return _beside(table, commit=run.code, started_at=run.started_at, version=run.version)


def changes_table(comparison: Comparison) -> pd.DataFrame:
    """All rows of a comparison in one table, for CSV; each with both runs."""
    table = stacked(check=check_changes_table(comparison.checks), speed=speed_changes_table(comparison.speeds),
                    atlas=atlas_changes_table(comparison.atlas))
    for side in ("baseline", "candidate"):
        run: RunInfo = getattr(comparison, side)
        table = _beside(table, **{f"{side}_{name}": text for name, text in
                                  (("commit", run.code), ("started_at", run.started_at), ("version", run.version))})
    return table


def _beside(table: pd.DataFrame, **texts: str | None) -> pd.DataFrame:
    # Objects here too: where pyarrow is installed pandas keeps strings in it, and a lone surrogate does not fit.
    return table.assign(**{name: pd.Series(text, index=table.index, dtype=object) for name, text in texts.items()})


def stacked(**parts: pd.DataFrame) -> pd.DataFrame:
    """Tables below each other, the name of each in the column ``kind``; columns that one lacks are empty."""
    filled = {kind: part for kind, part in parts.items() if len(part)}
    return pd.concat(filled, names=["kind"]).reset_index("kind") if filled else _frame([], ["kind"])


def to_csv(table: pd.DataFrame) -> str:
    """Comma-separated, with a header, full precision and empty cells for nothing."""
    return str(table.to_csv(index=False, lineterminator="\n"))


def _peer_median(row: BenchRow, metric: str, peer: str, medians: _Medians) -> float | None:
    """The peer's median on the same case; on the same fabric if there is one, for engines name theirs.

    A peer that ran with one rank only stands for itself at every tp_size: a single-device reference does.
    """
    workload, case, model, _, dtype, fabric, tp_size = row.key
    same_case = {
        (key[6], key[5]): median
        for (key, name), median in medians.items()
        if name == metric and key[:5] == (workload, case, model, peer, dtype)
    }
    if {size for size, _ in same_case} == {1}:
        tp_size = 1
    same_size = {name: median for (size, name), median in same_case.items() if size == tp_size}
    return same_size.get(fabric, next(iter(same_size.values()), None))


def _scaling_efficiency(row: BenchRow, metric: str, medians: _Medians) -> float | None:
    if row.tp_size == 1 or not (metrics.is_time(metric) or metrics.direction(metric) == "higher"):
        return None
    # One rank alone has no fabric to speak of: tp_size 1 stands for all of them.
    single = next((v for (k, m), v in medians.items() if k[:5] == row.key[:5] and k[6] == 1 and m == metric), None)
    return None if single is None else metrics.gain(metric, medians[row.key, metric], single) / row.tp_size


def _percent_of_bound(row: BenchRow, metric: str, median: float) -> float | None:
    if bound := row.metrics.get(f"bound_{metric}"):
        return 100 * metrics.gain(metric, median, bound)
    return row.metrics.get("percent_of_bound") if metric == next(iter(row.samples)) else None


def _frame(lines: Sequence[dict[str, object]], columns: Sequence[str]) -> pd.DataFrame:
    # Objects, not inferred types: a rank of None must not turn rank 1 into 1.0.
    return pd.DataFrame(list(lines), columns=list(columns), dtype=object)

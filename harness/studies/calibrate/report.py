"""What was found as records: distributions, constants, false alarms, power."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import numpy as np

from harness.studies.calibrate.fit import MARGIN, Point, Sample, fit, needs, points_of, worst
from harness.studies.calibrate.judge import Verdict
from harness.studies.calibrate.power import Threshold, power_rows
from harness.verification.budgets import CONSTANTS, Statistic, constants, precision
from reports.records import Calibration, CheckRow, ErrorRow, NotMeasured, Report, RunInfo, Tolerance

STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)
BINS_PER_DOUBLING = 4
SMALLEST = 2.0**-8
"""Errors below that go to the lowest bin of a cloud: no budget is anywhere near."""
FIT = "fit"
SIGNIFICANT = 4


def make_report(samples: Sequence[Sample], verdicts: Sequence[Verdict], thresholds: Sequence[Threshold], *,
                missing: Sequence[NotMeasured], run: Callable[[], RunInfo]) -> Report:
    """The report on as much as there is; ``missing`` says what is not. ``run`` makes its head, now that all is done."""
    by_precision = {name: [sample for sample in samples if precision(sample.dtype) == name] for name in CONSTANTS}
    tolerances = [tolerance(group, statistic) for group in by_precision.values() for statistic in STATISTICS
                  if points_of(group, statistic)]
    checks = [_fit_row(row) for row in tolerances] + judged_rows(verdicts)
    calibration = Calibration(tolerances=tolerances, errors=error_rows(samples), powers=power_rows(thresholds))
    return Report(run=run(), checks=checks, not_measured=list(missing), calibration=calibration)


def tolerance(samples: Sequence[Sample], statistic: Statistic) -> Tolerance:
    """A statistic's constants, and those that its samples, all of one precision, ask for."""
    fitted, used = fit(samples, statistic), constants(statistic, samples[0].dtype)
    return Tolerance(
        statistic=statistic, precision=precision(samples[0].dtype), k=used.k, c=used.c, fitted_k=fitted.k, fitted_c=fitted.c,
        margin=MARGIN, samples=sum(statistic in sample.points for sample in samples),
        worst=_short(worst(points_of(samples, statistic), used)))


def _fit_row(row: Tolerance) -> CheckRow:
    """A finding if not even the samples that are to be fitted are within budget."""
    ok = row.worst <= 1
    message = "" if ok else (f"a sample of correct code is at {row.worst:g} of its {row.statistic} budget: k={row.k:g} and "
                             f"c={row.c:g} are too small, or the code is not correct")
    return CheckRow(check=FIT, model=row.statistic, tp_size=1, fabric="threads", dtype=row.precision, cases=row.samples,
                    compared=row.samples, verdict="pass" if ok else "finding", seconds=0.0, error_over_budget=row.worst,
                    message=message)


def error_rows(samples: Iterable[Sample]) -> list[ErrorRow]:
    """One row a kind of orders, statistic, dtype and tp_size."""
    groups: dict[tuple[str, Statistic, str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        for statistic in sample.points:
            groups[f"logits, {sample.orders} orders", statistic, sample.dtype, sample.tp_size].append(sample)
    return [_error_row(*key, group) for key, group in sorted(groups.items())]


def _error_row(kind: str, statistic: Statistic, dtype: str, tp_size: int, samples: Sequence[Sample]) -> ErrorRow:
    first = [sample.points[statistic][0] for sample in samples]
    points = points_of(samples, statistic)
    k, c = needs(points, constants(statistic, dtype))
    return ErrorRow(
        kind=kind, statistic=statistic, dtype=dtype, tp_size=tp_size, samples=len(samples),
        lucky=sum(math.isinf(point.ratio) for point in first),
        candidate=quantiles([max(point.candidate for point in sample.points[statistic]) for sample in samples]),
        baseline=quantiles([max(point.baseline for point in sample.points[statistic]) for sample in samples]),
        ratio=quantiles([point.ratio for point in first if math.isfinite(point.ratio)]),
        needs_k=_short(k), needs_c=_short(c), cloud=cloud(points),
    )


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """``{"0.5": the median, …, "1": the largest}``; nothing of no values."""
    if not values:
        return {}
    return {f"{share:g}": _short(float(np.quantile(values, share))) for share in QUANTILES}


def cloud(points: Iterable[Point]) -> list[list[int]]:
    """How many points there are around each pair of errors."""
    counts = Counter((_bin(point.baseline), _bin(point.candidate)) for point in points)
    return [[*place, count] for place, count in sorted(counts.items())]


def _bin(error: float) -> int:
    return round(BINS_PER_DOUBLING * math.log2(max(error, SMALLEST)))


def judged_rows(verdicts: Sequence[Verdict]) -> list[CheckRow]:
    """One row a check, setting, dtype and tp_size; a finding if there is one false alarm."""
    groups: dict[tuple[str, str, str, int], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.check, verdict.setting, verdict.dtype, verdict.tp_size].append(verdict)
    return [_judged_row(group) for _, group in sorted(groups.items())]


def _judged_row(group: Sequence[Verdict]) -> CheckRow:
    first = group[0]
    alarms = [verdict for verdict in group if verdict.alarm is not None]
    errors = [verdict.error_over_budget for verdict in group if verdict.error_over_budget is not None]
    largest = max(errors, default=None)
    message = "" if not alarms else f"{len(alarms)} false alarms in {len(group)} runs on clean code, the first: {alarms[0].alarm}"
    return CheckRow(
        check=first.check, model=first.setting, tp_size=first.tp_size, fabric=first.fabric, dtype=first.dtype,
        cases=sum(verdict.cases for verdict in group), compared=sum(verdict.compared for verdict in group),
        verdict="finding" if alarms else "pass", seconds=round(sum(verdict.seconds for verdict in group), 3),
        error_over_budget=None if largest is None else _short(largest), message=message,
        extra={"runs": len(group), "false_alarms": len(alarms)},
    )


def _short(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")

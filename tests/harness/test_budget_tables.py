"""Every figure in docs/budgets.md and docs/verify.md's short table is the committed record's."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.calibration import alarms_table, power_table, settings_table
from reports.records import Report, read_report

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "reports/baselines/cpu-32core-intel-xeon-avx512/calibrate.json"
ON_AMD = ROOT / "reports/baselines/cpu-2core-amd-epyc-avx2/calibrate.json"
ON_GPUS, OVER_NCCL = (ROOT / f"reports/baselines/nvidia-h200-x2/calibrate-{ranks}.json" for ranks in ("threads", "nccl"))
PAGE, SHORT = (ROOT / "docs/budgets.md").read_text(), (ROOT / "docs/verify.md").read_text()
PLANTED = {("collectives", "reals", "in 99 %"): "one all-reduce of reals", ("layers", "reals", "in 99 %"): "one layer of reals",
           ("layers", "reals", "in 99 % of runs"): "all eight such layers of a run",
           ("layers", "integers", "in 99 % of runs"): "the eight of integers of a run",
           ("logits", "reals", "in 99 %"): "one module of a tiny model, in its `logits`"}
DTYPES, TP_SIZES = ("bfloat16", "float16", "float32"), (2, 4, 8)
BEFORE = {  # by the constants that were fitted to one CPU's order of summation; now no entry may be more than twice that
    "one all-reduce of reals": ((0.0078125, 0.03125, 0.5), (9.765625e-4, 0.0078125, 0.015625), (5.96e-8, 4.77e-7, 3.81e-6)),
    "one layer of reals": ((0.125, 0.5, 0.5), (0.03125, 0.03125, 0.0625), (7.63e-6, 7.63e-6, 7.63e-6)),
    "all eight such layers of a run": ((0.03125, 0.0625, 0.125), (0.00390625, 0.0078125, 0.015625), (4.77e-7, 9.54e-7, 1.91e-6)),
    "the eight of integers of a run": ((0.00390625,) * 3, (4.8828e-4,) * 3, (5.96e-8,) * 3),
    "one module of a tiny model, in its `logits`": ((0.5, 1.0, 4.0), (0.03125, 0.0625, 0.125), (1.526e-5, 3.052e-5, 6.104e-5)),
}


def power(report: Report, dtypes: tuple[str, ...] = DTYPES,
          tp_sizes: tuple[int, ...] = TP_SIZES) -> dict[str, tuple[tuple[float, ...], ...]]:
    """What was planted -> for each dtype the smallest share seen at each tp_size."""
    assert report.calibration is not None
    table = power_table(report.calibration).set_index(["check", "values", "dtype", "tp"])
    return {label: tuple(tuple(float(table.loc[(check, values, dtype, tp), column]) for tp in tp_sizes) for dtype in dtypes)
            for (check, values, column), label in PLANTED.items()}


def share(value: float) -> str:
    return f"{100 * value:.3g} %" if value >= 1e-4 else f"{value:.1e}"


def lines_of(report: Report) -> dict[str, list[str]]:
    alarms = [f"| `{row['check']}` | {row['dtype']} | {row['runs']:,} | {row['red runs']} | {100 * row['rate at most']:.2f} % | "
              f"{row['cases']:,} | {100 * row['rate a case at most']:.3f} % | "
              + ("exact |" if row["worst error / budget"] is None else f"{row['worst error / budget']:.2f} |")
              for row in alarms_table(report.checks).to_dict("records")]
    settings = settings_table(report.checks)
    names = [name for name in settings.columns if name not in ("check", "dtype")]
    by_setting = [f"| `{row['check']}` | {row['dtype']} | " + " | ".join(row[name] for name in names) + " |"
                  for row in settings.to_dict("records")]
    powers = [f"| {label} | " + " | ".join(" / ".join(map(share, now[column])) + f" ({' / '.join(map(share, before[column]))})"
                                           for column in range(3)) + " |"
              for (label, now), before in zip(power(report).items(), BEFORE.values(), strict=True)]
    constants = [f"| {row.precision} | {row.statistic} | {row.k:g} | {row.c:g} | {row.worst:.2f} |"
                 for row in (report.calibration.tolerances if report.calibration else [])]
    heading = "| check | dtype | " + " | ".join(names) + " |"
    return {"alarms": alarms, "settings": [heading, *by_setting], "powers": powers, "constants": constants}


@pytest.mark.parametrize("table", ["alarms", "settings", "powers", "constants"])
def test_a_table_of_the_page_holds_what_the_record_says(table: str) -> None:
    lines = lines_of(read_report(RECORD))[table]
    missing = [line for line in lines if line not in PAGE.splitlines()]
    assert not missing, "docs/budgets.md should have:\n" + "\n".join(lines)
    assert lines[0] in PAGE


def test_a_figure_that_is_not_the_records_would_be_noticed() -> None:
    line = lines_of(read_report(RECORD))["alarms"][0]
    assert line.replace("| 0 |", "| 1 |") not in PAGE.splitlines()


def test_the_figures_of_gpus_are_those_of_their_record() -> None:
    report, dtypes, page = read_report(ON_GPUS), ("bfloat16", "float16"), " ".join(PAGE.split())
    for label, now in power(report, dtypes).items():
        assert "| ".join([f"| {label} ", *(" / ".join(map(share, each)) + " " for each in now)]) + "|" in PAGE.splitlines()
    rows = alarms_table(report.checks).to_dict("records")
    assert {(row["runs"], row["red runs"]) for row in rows} == {(18, 0)}
    rate = f"a rate of at most {100 * rows[0]['rate at most']:.0f} % each"
    assert f"in {rows[0]['runs']} runs of each of five checks in each dtype ({rate})" in page
    over_nccl = read_report(OVER_NCCL)
    # The page says so of each entry.
    assert power(over_nccl, dtypes, (2,)) == power(report, dtypes, (2,))
    assert {(row["runs"], row["red runs"]) for row in alarms_table(over_nccl.checks).to_dict("records")} == {(3, 0)}
    assert not report.not_measured
    assert not over_nccl.not_measured
    worst = {(row["check"], row["dtype"]): row["worst error / budget"] for row in rows}
    for check in ("attention", "layers", "logits"):
        assert f"`{check}` " + " and ".join(f"{worst[check, dtype]:.2f}" for dtype in dtypes) + " (" in page
    largest = max(worst[check, dtype] for check in ("attention", "layers", "logits") for dtype in dtypes)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"(none of {sum(row['runs'] for row in rows)} runs red, at most {largest:.2f} of a budget)" in readme


def test_the_small_study_on_an_amd_cpu_is_as_the_page_says() -> None:
    rows = alarms_table(read_report(ON_AMD).checks).to_dict("records")
    assert sum(row["red runs"] for row in rows) == 0
    worst = max(row["worst error / budget"] or 0 for row in rows if row["check"] != "collectives")
    shown = f"none of its {sum(row['runs'] for row in rows)} runs is red, at most {worst:.2f} of a budget"
    assert shown in " ".join(PAGE.split())


def test_the_page_on_verdicts_has_the_runs_of_float32() -> None:
    rows = [row for row in alarms_table(read_report(RECORD).checks).to_dict("records") if row["dtype"] == "float32"]
    for row in rows:
        worst = "exact" if row["worst error / budget"] is None else f"{row['worst error / budget']:.2f}"
        line = f"| `{row['check']}` | {row['runs']:,} | {row['red runs']} | {100 * row['rate at most']:.2f} % | {worst} |"
        assert line in SHORT, line
    runs = sum(row["runs"] for row in rows)
    assert sum(row["red runs"] for row in rows) == 0
    assert f"no false alarm in {runs:,} runs" in (ROOT / "README.md").read_text()


def test_no_entry_of_the_table_of_power_is_more_than_twice_what_it_was_before() -> None:
    for label, now in power(read_report(RECORD)).items():
        for dtype, new, old in zip(DTYPES, now, BEFORE[label], strict=True):
            for tp_size, after, before in zip(TP_SIZES, new, old, strict=True):
                assert after <= 2.01 * before, f"{label}, {dtype}, tp {tp_size}: {after} for {before}"

"""What ``shardproof bench`` and ``shardproof compare`` do once they have their options (``harness.commands.bench``)."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from harness.bench.bench import BASELINE, CANDIDATE, BenchResult, Watcher, run_bench
from harness.bench.engines import OWN
from harness.bench.plan import BenchPlan
from harness.bench.shapes import model_folder
from harness.commands.options import check_device, numbers, prepare_out
from harness.commands.progress import errors
from harness.errors import COULD_NOT_RUN, CouldNotRunError, UsageError, usage
from harness.names import BASELINES
from reports.compare import HARDWARE, Comparison, UnlikeMachinesError, compare
from reports.markdown import comparison_markdown
from reports.metrics import label
from reports.records import FILE_NAME, BenchRow, NotMeasured, Report, read_report, write_report
from reports.render import write_all, write_comparison
from reports.summary import comparison_headline, without_constants
from reports.tables import bench_tables, check_changes_table, joined, not_measured_table, speed_changes_table
from reports.text_tables import format_number, printable, to_text
from reports.typed_json import RecordError

_CONSTANTS = ("workload", "case", "model", "engine", "dtype", "fabric", "tp_size", "metric", "rounds")


def bench(*, model: str, names: tuple[str, ...], cases: tuple[str, ...], tp: str, peers: tuple[str, ...] | None, fabric: str,
          dtype: str, device: str, rounds: int | None, against: Path | None, save_baseline: bool, out: Path) -> int:
    """Run it, show how it goes and what came of it. Returns the exit code."""
    if tp == "auto":
        tp = "1" if device != "cpu" and torch.cuda.device_count() == 1 else "1,2"
    check_device(device)
    with usage():  # all that can be wrong about the plan is found before a checkpoint is written
        plan = BenchPlan(model=model, folder=Path(), workloads=names, cases=cases, tp_sizes=numbers("tp", tp), fabric=fabric,
                         device=device, dtype=dtype, peers=peers, rounds=rounds, against=against)
    prepare_out(out)
    if against is not None:
        prepare_out(out / BASELINE)
        prepare_out(out / "compare")
    if save_baseline:
        prepare_out(BASELINES, set_aside=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(f"preparing {model}", total=None)
        watcher = Watcher(
            on_status=lambda text: bar.update(task, description=escape(text)),
            on_row=lambda side, row: bar.console.print(escape(_row_line(side, row)), highlight=False, soft_wrap=True),
            on_missing=lambda item: bar.console.print(f"[yellow]{escape(_missing_line(item))}[/yellow]", highlight=False,
                                                      soft_wrap=True),
        )
        result = run_bench(replace(plan, folder=model_folder(model, dtype=dtype)), watcher)
    return _finish(result, (*names, *cases), out, save_baseline=save_baseline)


def _finish(result: BenchResult, measured: tuple[str, ...], out: Path, *, save_baseline: bool) -> int:
    report = result.reports[CANDIDATE]
    sys.stdout.write(_report_text(report))
    for name, side in result.reports.items():
        paths = write_all(side, out if name == CANDIDATE else out / name, peers=_peers_in(side))
        if name == CANDIDATE:
            sys.stdout.write(f"\nreport: {paths['html']}\n")
    if result.interrupted or result.failed or all(row.workload == HARDWARE for row in report.benches):
        what = "interrupted" if result.interrupted else "not all of it ran"
        errors.print(f"[red]{what}[/red]: the report holds what was measured, and names what was not", highlight=False)
        if save_baseline:
            errors.print("no baseline was saved", highlight=False)
        return COULD_NOT_RUN
    if save_baseline:
        sys.stdout.write(f"baseline: {write_report(_baseline_path(report, measured), report)}\n")
    compared = 0
    if BASELINE in result.reports:
        # Both sides took turns on one machine, so a slower row is no accident of the day.
        compared = _write_comparison(compare(result.reports[BASELINE], report, gate=True, in_turns=True), out / "compare")
    if report.exit_code:
        errors.print("[red]not all of it ran[/red]: the report names what broke", highlight=False)
    return compared or report.exit_code


def compare_reports(baseline: Path, candidate: Path, *, gate: bool | None, allow_unlike: bool, out: Path) -> int:
    """Compare two records and show what came of it. Returns the exit code."""
    paths = [_report_path(path) for path in (baseline, candidate)]
    if any(path.absolute() == (out / FILE_NAME).absolute() for path in paths):
        raise UsageError(f"out={out} is where one of the records lies, which would be overwritten: name another folder")
    prepare_out(out)
    try:
        reports = [read_report(path) for path in paths]
        comparison = compare(*reports, gate=gate, allow_unlike=allow_unlike)
    except RecordError as error:
        raise CouldNotRunError(str(error)) from error
    except UnlikeMachinesError as error:
        raise CouldNotRunError(f"{error} (--allow-unlike)") from error
    return _write_comparison(comparison, out)


def _write_comparison(comparison: Comparison, out: Path) -> int:
    headline = comparison_headline(comparison)
    for table in (check_changes_table(comparison.checks), speed_changes_table(comparison.speeds)):
        changed = table[table["verdict"] != "same"]
        if len(changed):
            sys.stdout.write(to_text(without_constants(changed, _CONSTANTS)[0]) + "\n")
    sys.stdout.write(printable(f"{headline.text} ({headline.detail})"))
    paths = write_comparison(comparison, out)
    sys.stdout.write(f"; report: {paths['html']}\n")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(comparison_markdown(comparison) + "\n")
    return comparison.exit_code


def _report_path(path: Path) -> Path:
    """A report's file. A folder of several baselines is not guessed at."""
    if not path.is_dir():
        return path
    there = sorted(file.name for file in path.glob("*.json"))
    if FILE_NAME in there:
        return path / FILE_NAME
    if not there:
        raise CouldNotRunError(f"{path} holds no {FILE_NAME}; give a report's file or folder")
    if len(there) > 1:
        raise CouldNotRunError(f"{path} holds several records: give one of {', '.join(there)}")
    return path / there[0]


def _baseline_path(report: Report, measured: tuple[str, ...]) -> Path:
    models = dict.fromkeys(row.model for row in report.benches if row.model)
    words = (re.sub(r"\W+", "-", text).strip("-") for text in measured)
    name = "-".join((*(Path(model).name for model in models), *words))
    return BASELINES / report.run.machine.folder / f"{name}.json"


def _peers_in(report: Report) -> list[str]:
    return list(dict.fromkeys(row.engine for row in report.benches if row.engine != OWN and row.workload != HARDWARE))


def _report_text(report: Report) -> str:
    parts = []
    for name, table in bench_tables(report.benches, peers=_peers_in(report)).items():
        short, constants = without_constants(table, _CONSTANTS)
        shared = ", ".join(f"{key} {value}" for key, value in constants.items() if key != "workload")
        parts.append(f"\n{name}{f' ({shared})' if shared else ''}\n{to_text(short)}")
    if report.not_measured:
        table = joined(not_measured_table(report.not_measured))
        parts.append(f"\nnot measured\n{to_text(without_constants(table, ())[0])}")
    return "".join(parts)


def _row_line(side: str, row: BenchRow) -> str:
    metric, values = next(iter(row.samples.items()))
    median = sorted(values)[len(values) // 2]
    who = f"{row.engine} tp {row.tp_size}" + ("" if side == CANDIDATE else f" ({side})")
    return f"{row.workload}: {row.case}: {who}: {format_number(median)} {label(metric)}"


def _missing_line(item: NotMeasured) -> str:
    size = "" if item.tp_size is None else f" tp {item.tp_size}"
    what = "error" if item.verdict == "error" else "not measured"
    return f"{what}: {item.workload}{f': {item.case}' if item.case else ''}: {item.engine}{size}: {item.reason}"

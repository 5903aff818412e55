"""``shardproof calibrate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from harness.commands.options import Seed, check_device, prepare_out, write_report
from harness.commands.progress import errors
from harness.errors import COULD_NOT_RUN, usage
from harness.studies.calibrate import DEFAULT_MODELS

if TYPE_CHECKING:
    from reports.records import Report

SHOWN = ("Tolerances", "False alarms", "Power")
"""Tables for the terminal; the rest stands in the report."""


def calibrate_command(
    models: Annotated[int, typer.Option(help="Float32 models to judge under each setting; all else is drawn in proportion.")
                      ] = DEFAULT_MODELS,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda: bfloat16 and float16 on GPUs.")] = "cpu",
    fabric: Annotated[str, typer.Option(help="threads: any number of ranks on one device; nccl: a GPU each.")] = "threads",
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html, .csv and the plots.")] = Path(
        "reports/out/calibrate"),
) -> None:
    """Measure what correct code gets wrong, and hold the tolerances against it: false alarms, and what errors they see.

    Fits k and c on clean random models, half of them with sums in drawn orders; runs the checks on others, under several
    instruction sets and in drawn orders; and plants errors in one rank's part of a sum. Exits 0 without a false alarm, 1 with
    one, 2 on wrong usage, 3 if it could not run or was interrupted: then the report holds what was finished.
    """
    from harness.studies.calibrate.run import CalibratePlan, calibrate

    with usage():
        plan = CalibratePlan(models=models, seed=seed, device=device, fabric=fabric)
    prepare_out(out)
    check_device(device)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        tasks = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        report, is_interrupted = calibrate(plan, on_progress)
    raise typer.Exit(_finish(report, out, is_interrupted=is_interrupted))


def _finish(report: Report, out: Path, *, is_interrupted: bool) -> int:
    from harness.interrupted import NOTICE
    from reports.calibration import calibration_tables
    from reports.calibration_plots import write_calibration_plots
    from reports.text_tables import to_text

    assert report.calibration is not None, "a report of calibrate has a calibration"
    tables = calibration_tables(report)
    for heading in (heading for heading in SHOWN if heading in tables):
        sys.stdout.write(f"{heading}\n{to_text(tables[heading][1])}\n")
    for row in report.checks:
        if row.verdict == "finding":
            sys.stdout.write(f"FINDING in {row.check} at tp_size={row.tp_size}, {row.dtype}, {row.model}: {row.message}\n")
    for item in report.not_measured:
        sys.stdout.write(f"not measured: {item.case}: {item.reason}\n")
    page = write_report(report, out)
    write_calibration_plots(report.calibration, out)
    sys.stdout.write(f"{report.run.seconds:.0f} s; report: {page}\n")
    if is_interrupted:
        errors.print(NOTICE, highlight=False)
        return COULD_NOT_RUN
    return report.exit_code

"""``shardproof faults``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from harness.commands.options import AsJson, Quiet, Seed, check_device, end_of_run, numbers, prepare_out
from harness.commands.progress import RowsShown, spinner
from harness.errors import UsageError

if TYPE_CHECKING:
    from reports.records import Report


def faults_command(
    only: Annotated[list[str] | None, typer.Option(help="Only this fault (again for more).")] = None,
    tp: Annotated[str | None, typer.Option(help="Numbers of ranks, as 2,4; by default the fewest that show each fault.")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu; or cuda for the faults that only a captured graph can have.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and .csv.")] = Path("reports/out/faults"),
    score: Annotated[Path | None, typer.Option(metavar="TOOL.py", help=(
        "Ask this tool instead of the checks: it gets pairs of streams of log-probabilities, with a fault and without, and says "
        "bug, rounding or can't tell (docs/scoreboard.md)."))] = None,
    names: Annotated[bool, typer.Option("--list", help="Print each fault's name and what it is, and run nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Plant real tensor-parallel bugs in the engine, one at a time, and see whether the checks notice.

    Exits 0 if every fault is seen and every control left alone, 1 on a finding, 2 on wrong usage, 3 if something could not run,
    raised or was interrupted: then the report holds what was finished. With --score 0, whatever the tool says.
    """
    if score is not None:
        if tp is not None or device != "cpu" or names:
            raise UsageError("--score plants each fault on the fewest CPU ranks that show it: leave out --tp, --device, --list")
        _score(score, tuple(only or ()), seed, out, as_json=as_json, quiet=quiet)
    from harness.faults.run import FaultPlan, run_faults
    from harness.faults.table import faults_summary
    from harness.interrupted import Interrupted

    plan = FaultPlan(only=tuple(only or ()), tp_sizes=() if tp is None else numbers("tp", tp), seed=seed, device=device)
    if names:
        sys.stdout.writelines(f"{fault.name}\n    {fault.what}\n" for fault in plan.faults)
        return
    prepare_out(out)
    check_device(device)
    interrupted = False
    with RowsShown([fault.name for fault, _ in plan.cases()[0]], quiet=quiet) as shown:
        try:
            report = run_faults(plan, on_row=lambda row: shown.on_row(row, row.fault), on_start=shown.on_start)
        except Interrupted as stop:
            report, interrupted = stop.report, True
    end_of_run(report, out, show=lambda: _print(report, quiet=quiet), interrupted=interrupted, as_json=as_json, quiet=quiet,
               summary=faults_summary(report.checks))


def _score(tool: Path, only: tuple[str, ...], seed: int, out: Path, *, as_json: bool, quiet: bool) -> NoReturn:
    """Another tool in place of the checks."""
    from harness.studies.score.tool import ScorePlan, score_tool

    plan = ScorePlan(tool=tool, only=only, seed=seed)
    prepare_out(out)
    with spinner(quiet=quiet) as on_done:
        report = score_tool(plan, on_done)
    end_of_run(report, out, show=lambda: _print_scores(report, quiet=quiet), interrupted=False, as_json=as_json,
               quiet=quiet, summary=f"{tool.name} on {sum(row.runs for row in report.scores if row.rule == tool.name)} pairs")


def _print_scores(report: Report, *, quiet: bool) -> None:
    from reports.text_tables import to_text
    from reports.verdict_tables import faults_table, scores_table

    sys.stdout.write(to_text(scores_table(report.scores).set_index("rule").T.reset_index(names="")))
    if not quiet:
        sys.stdout.write(f"\n{to_text(faults_table(report.scores))}")


def _print(report: Report, *, quiet: bool) -> None:
    from harness.faults.run import LOCALISATION
    from harness.faults.table import faults_table
    from reports.text_tables import to_text

    if not quiet:
        sys.stdout.write(to_text(faults_table(report.checks)) + "\n")
    for row in report.checks:
        if row.verdict in ("finding", "error") or (not quiet and (row.verdict != "pass" or row.fault == LOCALISATION)):
            what = "" if row.verdict in ("skipped", "error") else f" {row.fault}:"  # a reason names what was not run
            sys.stdout.write(f"{row.verdict.upper()}{what} {row.message}\n")
            if row.verdict == "finding" and row.replay:
                sys.stdout.write(f"  run it again: {row.replay}\n")

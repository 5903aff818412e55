"""``shardproof atlas``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.commands.options import AsJson, Python, Quiet, Seed, end_of_run, numbers, prepare_out
from harness.commands.progress import RowsShown
from harness.errors import UsageError
from harness.names import DTYPES

if TYPE_CHECKING:
    from reports.records import Report


def atlas_command(
    subject: Annotated[str, typer.Option(help="Whose tensor parallelism: transformers or vllm.")] = "transformers",
    python: Python = None,
    arch: Annotated[list[str] | None, typer.Option(help="Only this model_type (again for more); by default every causal language "
                                                        "model that the installed transformers knows.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Only this layout (again for more), as base; by default all.")] = None,
    tp: Annotated[str, typer.Option(help="Numbers of ranks, as 2,4.")] = "2,3,4",
    dtype: Annotated[str, typer.Option(help=f"One or several of {', '.join(DTYPES)}, with commas between them.")] = "float32",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the report in --out: compute the rows that it "
                                                          "lacks.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and .csv.")] = Path("reports/out/atlas"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Map what a library's tensor parallelism does right: tiny random models of every architecture, in many layouts.

    Each row is a model on live ranks, its logits held against the float64 reference. Needs the extra shardproof[transformers].

    Exits 0 if nothing is wrong, 1 if something is, 2 on wrong usage, 3 if nothing could be compared or on Ctrl-C: then the
    report holds what was finished, and --resume goes on.
    """
    from harness.atlas.run import AtlasPlan, run_atlas
    from harness.interrupted import Interrupted
    from reports.records import FILE_NAME, read_report
    from reports.records import write_report as write_record

    plan = AtlasPlan(subject=subject, architectures=tuple(arch or ()), layouts=tuple(layout or ()), tp_sizes=numbers("tp", tp),
                     dtypes=tuple(dtype.split(",")), seed=seed, python=python)
    if resume and not (out / FILE_NAME).is_file():
        raise UsageError(f"out={str(out)!r} holds no {FILE_NAME} to go on from: leave --resume out")
    prepare_out(out, set_aside=not resume)
    done = read_report(out) if resume else None
    left = plan.left(done.atlas if done else ())
    out.mkdir(parents=True, exist_ok=True)

    def save(report: Report) -> None:
        write_record(out, report)

    interrupted = False
    with RowsShown([entry.name for entry in left], quiet=quiet) as shown:
        try:
            report = run_atlas(plan, done=done, on_row=lambda row: shown.on_row(row, row.name), on_start=shown.on_start,
                               save=save)
        except Interrupted as stop:
            report, interrupted = stop.report, True
    end_of_run(report, out, show=lambda: _print(report, quiet=quiet), interrupted=interrupted, as_json=as_json, quiet=quiet,
               summary="nothing wrong" if report.exit_code == 0 else "NOT all right")


def _print(report: Report, *, quiet: bool) -> None:
    from reports.tables import atlas_counts
    from reports.text_tables import to_text

    if not quiet:
        sys.stdout.write(f"{to_text(atlas_counts(report.atlas))}\n{report.run.seconds:.0f} s\n")
    for row in report.atlas:
        if row.verdict == "wrong":
            sys.stdout.write(f"\nWRONG {row.name} at tp_size={row.tp_size}, {row.dtype}: {row.message}\n")
            sys.stdout.write(f"  run it again: {row.replay}\n")

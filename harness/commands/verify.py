"""``shardproof verify``."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from harness.bench.shapes import model_folder
from harness.checks import CHECK_NAMES, ON_REQUEST, PRELOAD
from harness.commands.options import (
    DEFAULT_MODEL,
    AsJson,
    Fabric,
    Model,
    Python,
    Quiet,
    Seed,
    begin_ranks,
    check_device,
    end_of_run,
    numbers,
    prepare_out,
    write_report,
)
from harness.commands.progress import RowsShown
from harness.errors import UNEXPECTED, CouldNotRunError, UsageError, told, usage
from harness.names import DTYPES
from harness.subjects import SUBJECTS

if TYPE_CHECKING:
    from engine.ranks.ranks import Ranks
    from harness.verification.verify import VerifyPlan
    from reports.records import CheckRow, Report

DEFAULT_TP_SIZES = (1, 2, 3, 4)


def verify_command(
    model: Model = DEFAULT_MODEL,
    tp: Annotated[str | None, typer.Option(help="Numbers of ranks, as 1,2,4; by default 1,2,3,4, and under torchrun as many "
                                                "as it started.")] = None,
    fabric: Fabric = "auto",
    dtype: Annotated[str, typer.Option(autocompletion=lambda: ["auto", *DTYPES], help=(
        f"{', '.join(DTYPES)}; auto is the checkpoint's, on every device."))] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    check: Annotated[list[str] | None, typer.Option(autocompletion=lambda: [*CHECK_NAMES, *ON_REQUEST], help=(
        f"Only this check (again for more): {', '.join(CHECK_NAMES)}; and, only if named, {', '.join(ON_REQUEST)}."))] = None,
    subject: Annotated[str, typer.Option(autocompletion=lambda: list(SUBJECTS), help=(
        f"What to verify: {', '.join(SUBJECTS)}, or your own as package.module:Class, which is run."))] = "engine",
    python: Python = None,
    shrink: Annotated[bool, typer.Option("--shrink", help="Verify a tiny random model of MODEL's architecture; MODEL is a "
                                                         "model_type, a folder with config.json, or a hub id.")] = False,
    seed: Seed = 0,
    case: Annotated[Path | None, typer.Option(help="Run one saved finding again; all else comes from the file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and .csv; findings are saved in its "
                                           "folder cases.")] = Path("reports/out/verify"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Hold a model on several ranks against its single-device reference.

    Under torchrun, on one host or several, the ranks are torchrun's, and the model must be at the same path on every host.

    Exits 0 if all is well, 1 on a finding, 2 on wrong usage, 3 if something could not run, raised or was interrupted: then the
    report holds what was finished.
    """
    asked = DEFAULT_TP_SIZES if tp is None else numbers("tp", tp)
    if subject == "engine" and case is None:
        begin_ranks(asked, fabric, preload=PRELOAD)
    from engine.ranks.torchrun import launched
    from harness.verification.verify import VerifyPlan

    if case is not None:
        if launched() is not None:
            raise UsageError("a saved finding runs again on ranks of its own: start --case without torchrun")
        _replay(case, out, subject, python, as_json=as_json)
    plan = VerifyPlan(model=model, folder=Path(), tp_sizes=asked, fabric=fabric,
                      device=device, dtype=dtype, checks=tuple(check or CHECK_NAMES), subject=subject, python=python, seed=seed,
                      cases_folder=out / "cases")
    with _torchrun_ranks(fabric, device) as ranks:
        tp_sizes = _tp_sizes(tp, ranks)
        prepare_out(out)
        check_device(device)
        if shrink:
            plan = replace(plan, model=(folder := _shrunk(model, seed, dtype, subject)), folder=Path(folder), tp_sizes=tp_sizes)
        else:
            plan = replace(plan, folder=model_folder(model, dtype=dtype), tp_sizes=tp_sizes)
        _verify(plan, out, ranks, as_json=as_json, quiet=quiet)


def _shrunk(model: str, seed: int, dtype: str, subject: str) -> str:
    """The folder of ``model`` made tiny, in the cache: a finding's command has to find it again."""
    from engine.checkpoint.hub import cache_folder
    from harness.subjects import subject_class
    from reference.shrink import shrink, tiny_config

    dtype = "float32" if dtype == "auto" else dtype
    sizes = subject_class(subject).tiny_sizes(tiny_config(model))
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.")
    folder = (cache_folder() / "tiny" / "-".join((name, dtype, str(seed), *map(str, sizes.values())))).absolute()
    shutil.rmtree(folder, ignore_errors=True)  # what MODEL is may have changed
    return str(shrink(model, folder, seed=seed, dtype=dtype, **sizes))


def _tp_sizes(tp: str | None, ranks: Ranks | None) -> tuple[int, ...]:
    """What was asked for; by default torchrun's ranks, or else what tells most."""
    if ranks is None:
        return DEFAULT_TP_SIZES if tp is None else numbers("tp", tp)
    if tp is not None and numbers("tp", tp) != (ranks.tp_size,):
        raise UsageError(f"tp={tp!r}, but torchrun started {ranks.tp_size} ranks: leave --tp out")
    return (ranks.tp_size,)


@contextmanager
def _torchrun_ranks(fabric: str, device: str) -> Iterator[Ranks | None]:
    """The ranks that torchrun started, or None if it did not start this process. On ranks other than 0 all ends here."""
    from engine.ranks.ranks import Ranks
    from engine.ranks.torchrun import launched, serve
    from harness.verification.verify import JOB_TIMEOUT_S

    launch = launched()
    if launch is None:
        yield None
        return
    try:
        if launch.rank > 0:
            served = serve(launch)
        else:
            with usage():
                ranks = Ranks(launch.tp_size, fabric=fabric, device=device, job_timeout_s=JOB_TIMEOUT_S, launch=launch)
    except RuntimeError as error:  # torch's of a store that nobody answers at, or a rank's
        raise CouldNotRunError(f"could not run: {error}") from error
    if launch.rank > 0:
        raise typer.Exit(served)
    exit_code = UNEXPECTED
    try:
        yield ranks
    except typer.Exit as leave:
        exit_code = leave.exit_code
        raise
    except BaseException as error:
        exit_code = (told(error) or ("", UNEXPECTED))[1]
        raise
    finally:
        ranks.close(exit_code=exit_code)


def _verify(plan: VerifyPlan, out: Path, ranks: Ranks | None, *, as_json: bool, quiet: bool) -> NoReturn:
    """Run the plan and show how it goes and what came of it."""
    from harness.interrupted import Interrupted
    from harness.verification.verify import verify

    interrupted = False
    with RowsShown(plan.checks * len(plan.tp_sizes), quiet=quiet) as shown:
        try:
            report = verify(plan, ranks=ranks, on_row=lambda row: shown.on_row(row, row.check), on_start=shown.on_start)
        except Interrupted as stop:
            report, interrupted = stop.report, True
    end_of_run(report, out, show=lambda: _print(plan, report, quiet=quiet), interrupted=interrupted, as_json=as_json, quiet=quiet,
               summary="all green" if report.exit_code == 0 else "NOT green")


def _print(plan: VerifyPlan, report: Report, *, quiet: bool) -> None:
    from reports.records import whole_checks
    from reports.tables import BOUND_NOTE, bound_mark, checks_pivot
    from reports.text_tables import to_text

    if not quiet:
        checks = whole_checks(report.checks)
        layouts = ", ".join(f"tp {row.tp_size} {row.fabric}" for row in checks if row.check == plan.checks[0])
        sys.stdout.write(f"{to_text(checks_pivot(checks))}\n{plan.model}, {report.checks[0].dtype}; {layouts}; numbers "
                         f"are the worst error as a fraction of its budget; {report.run.seconds:.0f} s\n")
        if shares := {row.tp_size: row.extra["sharded_parameters"] for row in report.checks if row.tp_size > 1 and (
                row.kind == "model" and "sharded_parameters" in row.extra)}:
            sys.stdout.write("sharded: " + ", ".join(f"{share:.1%} of the parameters at tp {tp}" for tp, share in shares.items())
                             + "\n")
        if any(map(bound_mark, checks)):
            sys.stdout.write(f"{BOUND_NOTE}\n")
    _print_rows([row for row in report.checks if row.verdict != "pass" and not (quiet and row.verdict == "skipped")])


def _print_rows(rows: Sequence[CheckRow]) -> None:
    """Each finding, and each other reason once for all the rows that have it."""
    groups: dict[object, list[CheckRow]] = {}
    for row in rows:
        groups.setdefault((row.verdict, row.message, row.replay), []).append(row)
    for group in groups.values():
        first = group[0]
        checks = ", ".join(dict.fromkeys(row.name for row in group))
        tp_sizes = ", ".join(map(str, dict.fromkeys(row.tp_size for row in group)))
        sys.stdout.write(f"\n{first.verdict.upper()} in {checks} at tp_size={tp_sizes}: {first.message}\n")
        if first.replay:
            sys.stdout.write(f"  run it again: {first.replay}\n")


def _replay(case: Path, out: Path, subject: str, python: Path | None, *, as_json: bool) -> NoReturn:
    """Run a saved finding again, and say how it compares."""
    from harness.verification.cases import load_case
    from harness.verification.verify import replay

    try:
        saved = load_case(case)
    except ValueError as error:
        raise CouldNotRunError(str(error)) from error
    if saved.subject not in (*SUBJECTS, subject):  # it names code, and a file must not have any run
        raise UsageError(f"case={case} is of subject={saved.subject!r}: give --subject {saved.subject} to have its code run")
    prepare_out(out)
    check_device(saved.device)
    folder = model_folder(saved.model, dtype=saved.dtype)
    try:
        report, comparison = replay(saved, folder, python)
    except UsageError as error:  # what can't be in a file of ours
        raise CouldNotRunError(f"case={case}: {error}") from error
    if not as_json:
        sys.stdout.write(f"{saved.check} at tp_size={saved.tp_size}, found then: {saved.finding}\n")
        _print_rows([row for row in report.checks if row.verdict != "pass"])
    page = write_report(report, out, as_json=as_json)
    if not as_json:
        sys.stdout.write(f"\n{comparison}; report: {page}\n")
    raise typer.Exit(report.exit_code)

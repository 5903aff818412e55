"""``shardproof bench`` and ``shardproof compare``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from harness.bench.bench import BenchResult, run_bench
from harness.bench.engines import OWN, PEERS
from harness.bench.lineup import BASELINE, CANDIDATE
from harness.bench.plan import BenchPlan
from harness.bench.shapes import SHAPES, model_folder
from harness.bench.step import Watcher
from harness.bench.worker import WorkerError
from harness.bench.workloads import WORKLOADS
from reference.checkpoints import CheckpointError
from reports.compare import CLEARLY_SLOWER, HARDWARE, Comparison, UnlikeMachinesError, compare
from reports.files import refuse_unwritable
from reports.markdown import comparison_markdown
from reports.metrics import label
from reports.records import FILE_NAME, BenchRow, NotMeasured, Report, read_report, write_report
from reports.render import write_all, write_comparison
from reports.summary import comparison_headline, without_constants
from reports.tables import bench_tables, check_changes_table, joined, not_measured_table, speed_changes_table
from reports.text_tables import format_number, printable, to_text
from reports.typed_json import RecordError

USAGE, COULD_NOT_RUN = 2, 3
BASELINES = Path("reports/baselines")
COMPARE_OUT = Path("reports/out/compare")
_CONSTANTS = ("workload", "case", "model", "engine", "dtype", "fabric", "tp_size", "metric", "rounds")

errors = Console(stderr=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("bench")(bench_command)
    app.command("compare")(compare_command)


def bench_command(
    model: Annotated[str, typer.Argument(help=f"A shape with random weights: {', '.join(SHAPES)}; or smollm2, a Hugging Face "
                                              "folder, or a hub id.")] = "smollm2",
    workload: Annotated[list[str] | None, typer.Option(help=f"Again for more: {', '.join(WORKLOADS)}. Default: quick.")] = None,
    tp: Annotated[str, typer.Option(help="Numbers of ranks, as 1,2. auto: 1,2, or 1 where there is one GPU.")] = "auto",
    peer: Annotated[list[str] | None, typer.Option(
        help=f"Another engine to hold it against, again for more: {', '.join(PEERS)}; or none. Default: the Hugging Face "
             "reference where it takes reasonable time.")] = None,
    fabric: Annotated[str, typer.Option(help="auto, gloo, threads or nccl.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    rounds: Annotated[int | None, typer.Option(help="Instead of each workload's own number.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another checkout of this project: takes turns with this one, round by "
                                                      "round, and is compared with it.")] = None,
    save_baseline: Annotated[bool, typer.Option(help=f"Also write {BASELINES}/<machine>/<model>-<workloads>.json.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and .csv.")] = Path("reports/out/bench"),
) -> None:
    """Measure throughput, latency, layers, collectives and loading, against peers and the hardware's bounds.

    Exits 0 when all was measured (missing peers are named, and no failure), 1 if --against finds it slower, 2 on wrong usage,
    3 if it could not run, was interrupted, or has an error in it, such as a peer that returned fewer tokens than asked for.
    """
    names = tuple(dict.fromkeys(workload or ["quick"]))
    peers = None if peer is None else tuple(name for name in dict.fromkeys(peer) if name != "none")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a CI that gives up is answered as Ctrl-C is
    if tp == "auto":
        tp = "1" if device != "cpu" and torch.cuda.device_count() == 1 else "1,2"
    try:
        tp_sizes = tuple(int(number) for number in tp.split(","))
    except ValueError:
        _fail(f"tp={tp!r} must be numbers with commas between them, as 1,2", USAGE)
    with _files_told():
        for folder in (out, *([BASELINES] if save_baseline else ())):
            refuse_unwritable(folder)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors, transient=True) as bar:
        task = bar.add_task(f"preparing {model}", total=None)
        watcher = Watcher(
            on_status=lambda text: bar.update(task, description=escape(text)),
            on_row=lambda side, row: bar.console.print(escape(_row_line(side, row)), highlight=False, soft_wrap=True),
            on_missing=lambda item: bar.console.print(f"[yellow]{escape(_missing_line(item))}[/yellow]", highlight=False,
                                                      soft_wrap=True),
        )
        try:
            # All that can be wrong about the plan is found before a checkpoint is written.
            plan = BenchPlan(model=model, folder=Path(), workloads=names, tp_sizes=tp_sizes, fabric=fabric, device=device,
                             dtype=dtype, peers=peers, rounds=rounds, against=against)
            result = run_bench(plan.with_folder(model_folder(model, dtype=dtype)), watcher)
        except CheckpointError as error:
            _fail(str(error), COULD_NOT_RUN)
        except ValueError as error:
            _fail(str(error), USAGE)
        except (WorkerError, OSError) as error:
            _fail(f"could not run: {error}", COULD_NOT_RUN)
        except KeyboardInterrupt:
            _fail("interrupted before anything was measured", COULD_NOT_RUN)
    with _files_told():
        raise typer.Exit(_finish(result, names, out, save_baseline=save_baseline))


def _finish(result: BenchResult, workloads: tuple[str, ...], out: Path, *, save_baseline: bool) -> int:
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
        sys.stdout.write(f"baseline: {write_report(_baseline_path(report, workloads), report)}\n")
    compared = 0
    if BASELINE in result.reports:
        # Both sides took turns on one machine, so a slower row is no accident of the day.
        compared = _write_comparison(compare(result.reports[BASELINE], report, gate=True, in_turns=True), out / "compare")
    if report.exit_code:
        errors.print("[red]not all of it ran[/red]: the report names what broke", highlight=False)
    return compared or report.exit_code


def compare_command(
    baseline: Annotated[Path, typer.Argument(help="A report.json, or the folder that holds one.")],
    candidate: Annotated[Path, typer.Argument(help="The same, of the run to judge.")],
    gate: Annotated[bool | None, typer.Option("--gate/--no-gate", help="Whether a slower row fails. Default: on like "
                                              "machines, with a GPU every one, without one those that are clearly slower, by "
                                              f"{CLEARLY_SLOWER:g} times.")] = None,
    allow_unlike: Annotated[bool, typer.Option("--allow-unlike", help="Compare speeds of unlike machines.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html, .csv and .xml (JUnit).")] = COMPARE_OUT,
) -> None:
    """Judge a run by a baseline, row by row: faster, slower, the same, or too noisy to tell; checks too.

    Writes Markdown to $GITHUB_STEP_SUMMARY as well, where that is set. Exits 0 if nothing got worse, 1 on a regression, 2 on
    wrong usage, 3 if it could not compare (a damaged file, unlike machines, no row in both).
    """
    paths = [_report_path(path) for path in (baseline, candidate)]
    if any(path.absolute() == (out / FILE_NAME).absolute() for path in paths):
        _fail(f"out={out} is where one of the records lies, which would be overwritten: name another folder", USAGE)
    with _files_told():
        reports = [read_report(path) for path in paths]
        try:
            comparison = compare(*reports, gate=gate, allow_unlike=allow_unlike)
        except UnlikeMachinesError as error:
            _fail(f"{error} (--allow-unlike)", COULD_NOT_RUN)
        raise typer.Exit(_write_comparison(comparison, out))


@contextmanager
def _files_told() -> Iterator[None]:
    """What is wrong with a file or folder in one line that names it."""
    try:
        yield
    except RecordError as error:
        _fail(str(error), COULD_NOT_RUN)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), COULD_NOT_RUN)


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
        _fail(f"{path} holds no {FILE_NAME}; give a report's file or folder", COULD_NOT_RUN)
    if len(there) > 1:
        _fail(f"{path} holds several records: give one of {', '.join(there)}", USAGE)
    return path / there[0]


def _baseline_path(report: Report, workloads: tuple[str, ...]) -> Path:
    models = dict.fromkeys(row.model for row in report.benches if row.model)
    name = "-".join((*(Path(model).name for model in models), *workloads))
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


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"[red]error:[/red] {escape(printable(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)

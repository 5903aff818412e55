"""The command line: ``shardproof verify | faults | calibrate | bench | …``, the same as ``python -m harness``."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from engine import LLM, SamplingParams
from engine.config import DTYPES, ModelConfig
from engine.parallel.ranks import RankFailure, Ranks
from engine.parallel.torchrun import launched, serve
from harness.bench.cli import register as register_bench
from harness.bench.shapes import SHAPES, model_folder
from harness.calibrate.cli import register as register_calibrate
from harness.cases import load_case
from harness.checks import CHECKS
from harness.faults.gate import LOCALISATION, FaultPlan, run_gate
from harness.faults.table import faults_table, gate_summary
from harness.interrupted import NOTICE, Interrupted
from harness.preflight import check_checkpoint
from harness.verify import JOB_TIMEOUT_S, VerifyPlan, replay, verify
from reference.checkpoints import CheckpointError
from reports.records import CheckRow, Report
from reports.render import write_all
from reports.tables import checks_pivot
from reports.text_tables import to_text

USAGE = 2
COULD_NOT_RUN = 3
DEFAULT_MODEL = "smollm2"
DEFAULT_TP_SIZES = (1, 2, 3, 4)
REFUSALS = ("CheckpointError: ", "ValueError: ", "UnsupportedModelError: ")
"""How the report of a rank begins that was asked for what can't be, and said so."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Proves tensor-parallel LLM inference correct: is it a bug, or is it rounding?")
register_bench(app)
register_calibrate(app)
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="smollm2, a Hugging Face folder, or a hub id; or a shape with random weights: "
                                           f"{', '.join(SHAPES)}.")]


@app.command("verify")
def verify_command(
    model: Model = DEFAULT_MODEL,
    tp: Annotated[str | None, typer.Option(help="Numbers of ranks, as 1,2,4; by default 1,2,3,4, and under torchrun as many "
                                                "as it started.")] = None,
    fabric: Annotated[str, typer.Option(help="auto, gloo, threads or nccl.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    check: Annotated[list[str] | None, typer.Option(help=f"Only this check (again for more): {', '.join(CHECKS)}.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    case: Annotated[Path | None, typer.Option(help="Run one saved finding again; all else comes from the file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and .csv; findings are saved in its "
                                           "folder cases.")] = Path("reports/out/verify"),
) -> None:
    """Hold a model on several ranks against its single-device reference.

    Under torchrun, on one host or several, the ranks are torchrun's, and the model must be at the same path on every host.

    Exits 0 if all is well, 1 on a finding, 2 on wrong usage, 3 if it could not run or was interrupted: then the report holds
    what was finished.
    """
    if case is not None:
        if launched() is not None:
            _fail("a saved finding runs again on ranks of its own: start --case without torchrun", USAGE)
        _replay(case, out)
    if dtype != "auto" and dtype not in DTYPES:
        _fail(f"dtype={dtype!r} is unknown; supported: auto, {', '.join(DTYPES)}", USAGE)
    if fabric not in ("auto", "gloo", "threads", "nccl"):
        _fail(f"fabric={fabric!r} is unknown; supported: auto, gloo, threads, nccl", USAGE)
    with _torchrun_ranks(fabric, device) as ranks:
        try:
            tp_sizes = _tp_sizes(tp, ranks)
            plan = VerifyPlan(model=model, folder=_folder(model, dtype), tp_sizes=tp_sizes, fabric=fabric, device=device,
                              dtype=dtype, checks=tuple(check or CHECKS), seed=seed, cases_folder=out / "cases")
        except ValueError as error:
            _fail(str(error), USAGE)
        _verify(plan, out, ranks)


def _tp_sizes(tp: str | None, ranks: Ranks | None) -> tuple[int, ...]:
    """What was asked for; by default torchrun's ranks, or else what tells most."""
    if ranks is None:
        return DEFAULT_TP_SIZES if tp is None else _numbers(tp)
    if tp is not None and _numbers(tp) != (ranks.tp_size,):
        raise ValueError(f"tp={tp!r}, but torchrun started {ranks.tp_size} ranks: leave --tp out")
    return (ranks.tp_size,)


@contextmanager
def _torchrun_ranks(fabric: str, device: str) -> Iterator[Ranks | None]:
    """torchrun's ranks, or None if it did not start this process. In its processes of other ranks than 0 all ends here."""
    launch = launched()
    if launch is None:
        yield None
        return
    try:
        served = serve(launch) if launch.rank > 0 else None
        ranks = Ranks(launch.tp_size, fabric=fabric, device=device, job_timeout_s=JOB_TIMEOUT_S,
                      launch=launch) if served is None else None
    except ValueError as error:
        _fail(str(error), USAGE)
    except (RankFailure, OSError, RuntimeError) as error:
        _fail(_why_not(error), COULD_NOT_RUN)
    if ranks is None:
        raise typer.Exit(served or 0)
    exit_code = 1
    try:
        yield ranks
    except typer.Exit as leave:
        exit_code = leave.exit_code
        raise
    finally:
        ranks.close(exit_code=exit_code)


@contextmanager
def _failures_told() -> Iterator[None]:
    """What went wrong on standard error, and the exit code that goes with it."""
    try:
        yield
    except CheckpointError as error:
        _fail(str(error), COULD_NOT_RUN)
    except ValueError as error:
        _fail(str(error), USAGE)
    except (RankFailure, OSError, RuntimeError) as error:
        _fail(_why_not(error), COULD_NOT_RUN)


def _verify(plan: VerifyPlan, out: Path, ranks: Ranks | None) -> NoReturn:
    """Run the plan and show how it goes and what came of it."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def on_start(name: str, tp_size: int) -> None:
            bar.update(task, description=f"tp {tp_size}: {name}")

        interrupted = False
        with _failures_told():
            try:
                report = verify(plan, ranks=ranks, on_row=lambda row: _show_row(bar, row, f"{row.check:<12}"), on_start=on_start)
            except Interrupted as stop:
                report, interrupted = stop.report, True
    paths = write_all(report, out)
    layouts = ", ".join(f"tp {row.tp_size} {row.fabric}" for row in report.checks if row.check == plan.checks[0])
    sys.stdout.write(f"{to_text(checks_pivot(report.checks))}\n{plan.model}, {report.checks[0].dtype}; {layouts}; numbers are "
                     f"the worst error as a fraction of its budget; {report.run.seconds:.0f} s\n")
    _show_findings(report)
    sys.stdout.write(f"\n{'all green' if report.exit_code == 0 else 'NOT green'}; report: {paths['html']}\n")
    _leave_with(report, interrupted=interrupted)


def _show_row(bar: Progress, row: CheckRow, what: str) -> None:
    style = {"pass": "green", "skipped": "yellow"}.get(row.verdict, "red")
    bar.console.print(f"tp {row.tp_size}  {what} [{style}]{row.verdict}[/{style}]  {row.seconds:.1f} s", highlight=False)


def _leave_with(report: Report, *, interrupted: bool) -> NoReturn:
    if interrupted:
        errors.print(NOTICE, highlight=False)
    raise typer.Exit(COULD_NOT_RUN if interrupted else report.exit_code)


def _show_findings(report: Report) -> None:
    for row in report.checks:
        if row.verdict != "pass":
            sys.stdout.write(f"\n{row.verdict.upper()} in {row.check} at tp_size={row.tp_size}: {row.message}\n")
            if row.replay:
                sys.stdout.write(f"  run it again: {row.replay}\n")


def _replay(case: Path, out: Path) -> NoReturn:
    """Run a saved finding again, and say how it compares."""
    with _failures_told():
        saved = load_case(case)
        report, comparison = replay(saved, _folder(saved.model, saved.dtype))
    sys.stdout.write(f"{saved.check} at tp_size={saved.tp_size}, found then: {saved.finding}\n")
    _show_findings(report)
    sys.stdout.write(f"\n{comparison}; report: {write_all(report, out)['html']}\n")
    raise typer.Exit(report.exit_code)


@app.command("faults")
def faults_command(
    only: Annotated[list[str] | None, typer.Option(help="Only this fault (again for more).")] = None,
    tp: Annotated[str | None, typer.Option(help="Numbers of ranks, as 2,4; by default the fewest that show each fault.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu; or cuda for the faults that only a captured graph can have.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and .csv.")] = Path("reports/out/faults"),
) -> None:
    """Plant real tensor-parallel bugs in the engine, one at a time, and see whether the checks notice.

    Exits 0 if every fault is seen and every control left alone, 1 on a finding, 2 on wrong usage, 3 if it could not run or was
    interrupted: then the report holds what was finished.
    """
    try:
        plan = FaultPlan(only=tuple(only or ()), tp_sizes=() if tp is None else _numbers(tp), seed=seed, device=device)
    except ValueError as error:
        _fail(str(error), USAGE)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def on_start(name: str, tp_size: int) -> None:
            bar.update(task, description=f"tp {tp_size}: {name}")

        interrupted = False
        try:
            report = run_gate(plan, on_row=lambda row: _show_row(bar, row, row.model), on_start=on_start)
        except Interrupted as stop:
            report, interrupted = stop.report, True
        except (RankFailure, OSError, RuntimeError) as error:
            _fail(_why_not(error), COULD_NOT_RUN)
    paths = write_all(report, out)
    sys.stdout.write(to_text(faults_table(report.checks)) + "\n")
    for row in report.checks:
        if row.verdict != "pass" or row.model == LOCALISATION:
            what = "" if row.verdict in ("skipped", "error") else f" {row.model}:"  # a reason names what was not run
            sys.stdout.write(f"{row.verdict.upper()}{what} {row.message}\n")
            if row.verdict == "finding" and row.replay:
                sys.stdout.write(f"  run it again: {row.replay}\n")
    sys.stdout.write(f"\n{gate_summary(report.checks)}; report: {paths['html']}\n")
    _leave_with(report, interrupted=interrupted)


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text; the model's chat template is applied if it has one.")],
    tp: Annotated[int, typer.Option(help="Number of ranks.")] = 1,
    fabric: Annotated[str, typer.Option(help="auto, gloo, threads or nccl.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's on a GPU, float32 on a CPU), bfloat16, float16 or "
                                           "float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
) -> None:
    """Generate text. Standard output holds the text alone, as it comes."""
    with _failures_told():
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
        folder = _folder(model, dtype)
        ModelConfig.from_folder(folder)  # what can't run at all is refused before the checkpoint is looked at
        check_checkpoint(folder)
        with LLM(folder, tensor_parallel_size=tp, fabric=fabric, dtype=dtype, device=device) as llm:
            for item in llm.stream(_as_chat(llm, prompt), params):
                for completion in item.outputs:
                    sys.stdout.write(completion.text)
                sys.stdout.flush()
    sys.stdout.write("\n")


@app.command("fetch")
def fetch_command(model: Model = DEFAULT_MODEL) -> None:
    """Get a model and print where it is."""
    sys.stdout.write(f"{_folder(model)}\n")


def _as_chat(llm: LLM, prompt: str) -> Any:
    """The prompt as a user's message, or plain where the model has no chat template."""
    if llm.tokenizer is None or not llm.tokenizer.chat_template:
        return prompt
    return llm.preprocess_chat([{"role": "user", "content": prompt}])


def _folder(model: str, dtype: str = "auto") -> Path:
    try:
        return model_folder(model, dtype=dtype)
    except (ValueError, OSError) as error:
        _fail(str(error), COULD_NOT_RUN)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"tp={text!r} must be numbers with commas between them, as 1,2,4") from None


def _why_not(error: Exception) -> str:
    """Why it could not run; without tracebacks where ranks refused something rather than broke."""
    if isinstance(error, RankFailure):
        refusals = {cause.summary.partition(": ")[2] for cause in error.failures.values()
                    if cause.summary.startswith(REFUSALS) and not cause.consequence}
        if len(refusals) == 1:
            return f"could not run: {refusals.pop()} (ranks {', '.join(map(str, error.failures))})"
    return f"could not run: {error}"


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, markup=True, soft_wrap=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of ``shardproof`` and ``python -m harness``."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _leave)
    app()


def _leave(number: int, frame: object) -> NoReturn:
    """End as after an exception, so that ranks, ports and temporary folders go with the command."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

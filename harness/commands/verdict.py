"""``shardproof verdict``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.commands.options import AsJson, Fabric, Quiet, Seed, check_device, end_of_run, numbers, prepare_out
from harness.commands.progress import spinner
from harness.errors import UsageError
from harness.names import DTYPES

if TYPE_CHECKING:
    from reports.records import Report

SIDE = ("an OpenAI-compatible server (http://host:port), a stream (.jsonl, .parquet), a model folder or name (our engine, --tp), "
        "or reference:FOLDER (transformers in float64 on one device)")


def verdict_command(
    a: Annotated[str, typer.Argument(metavar="A", help=f"One side: {SIDE}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other side, likewise.")],
    noise: Annotated[str | None, typer.Option(help="A third run that is known to be right, such as A again in another order: it "
                                                   "shows what rounding does here.")] = None,
    tp: Annotated[str, typer.Option(help="Ranks of each model folder among A, B and the noise run, in this order: 1,4.")] = "1",
    dtype: Annotated[str, typer.Option(autocompletion=lambda: ["auto", *DTYPES], help=(
        f"In which both sides compute: {', '.join(DTYPES)}; auto is what they say."))] = "auto",
    prompts: Annotated[Path | None, typer.Option(help="Sequences to score, a JSON list of token ids a line; by default those of "
                                                      "a stream among the sides, or drawn ones.")] = None,
    generate: Annotated[int, typer.Option(help="Tokens that a server generates after some prompts, for the other side to score; "
                                               "0: prompts alone.")] = 16,
    model: Annotated[str, typer.Option(help="Of a server; by default the only one that it serves.")] = "",
    key_env: Annotated[str, typer.Option(help="Environment variable with a server's key, which goes to that origin alone.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds for one answer of a server.")] = 120.0,
    device: Annotated[str, typer.Option(help="Of model folders and references: cpu or cuda.")] = "cpu",
    fabric: Fabric = "auto",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html and .csv, and for what live sides answer, A.jsonl "
                                                 "and the like.")] = Path("reports/out/verdict"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Two streams of log-probabilities of the same tokens: is their difference rounding, or a bug?

    Exits 0 for rounding, 1 for a bug, 2 on wrong usage, 3 if nobody can tell or it could not run.
    """
    tp_sizes = numbers("tp", tp)
    if min(tp_sizes) < 1:
        raise UsageError(f"tp={tp!r}: a number of ranks is 1 or more")
    prepare_out(out)
    check_device(device)
    from harness.verdict.sides import SideOptions, is_engine
    from harness.verdict.verdict import VerdictPlan, run_verdict

    written = {"A": a, "B": b} | ({"noise": noise} if noise else {})
    engines = [name for name, text in written.items() if is_engine(text)]
    if len(tp_sizes) not in (1, len(engines)):
        raise UsageError(f"tp={tp!r} has {len(tp_sizes)} numbers for {len(engines)} model folders: give one, or one for each")
    sizes = dict(zip(engines, tp_sizes * (1 if len(tp_sizes) > 1 else len(engines)), strict=True))
    common = SideOptions(dtype=dtype, device=device, fabric=fabric, model=model, key_env=key_env, timeout_s=timeout)
    options = {name: replace(common, tp_size=sizes.get(name, 1)) for name in written}
    plan = VerdictPlan(a=a, b=b, noise=noise, options=options, dtype=dtype, prompts=prompts, generate=generate, seed=seed,
                       keep=out)
    with spinner(quiet=quiet) as on_done:
        report = run_verdict(plan, on_done=lambda side, done, total: on_done(f"sequences of {side}", done, total))
    end_of_run(report, out, show=lambda: _print(report, quiet=quiet), interrupted=False, as_json=as_json, quiet=quiet,
               summary=report.verdict.answer if report.verdict else "")


def _print(report: Report, *, quiet: bool) -> None:
    from reports.text_tables import to_text
    from reports.verdict_tables import verdict_facts, verdict_tests_table

    row = report.verdict
    assert row is not None, "a verdict has one"
    sys.stdout.write(f"{row.answer.upper()}: {row.why}\n")
    if quiet:
        return
    for name, value in verdict_facts(row).items():
        sys.stdout.write(f"  {name}: {value}\n")
    sys.stdout.write(f"\n{to_text(verdict_tests_table(row))}")
    for line in row.rates:
        sys.stdout.write(f"{line}\n")

"""``shardproof bench`` and ``shardproof compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.bench.engines import PEERS
from harness.bench.shapes import SHAPES
from harness.bench.workloads import WORKLOADS
from harness.commands.options import Fabric
from harness.errors import UsageError
from harness.names import BASELINES, DTYPES


def bench_command(
    model: Annotated[str, typer.Argument(autocompletion=lambda: ["smollm2", *SHAPES], help=(
        f"A shape with random weights: {', '.join(SHAPES)}; or smollm2, a Hugging Face folder, or a hub id."))] = "smollm2",
    workload: Annotated[list[str] | None, typer.Option(autocompletion=lambda: list(WORKLOADS), help=(
        f"Again for more: {', '.join(WORKLOADS)}. Default: quick."))] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only cases with this in their name; again for more.")] = None,
    tp: Annotated[str, typer.Option(help="Numbers of ranks, as 1,2. auto: 1,2, or 1 where there is one GPU.")] = "auto",
    peer: Annotated[list[str] | None, typer.Option(autocompletion=lambda: [*PEERS, "none"], help=(
        f"Another engine to hold it against, again for more: {', '.join(PEERS)}; or none. Default: the Hugging Face reference "
        "where it takes reasonable time."))] = None,
    fabric: Fabric = "auto",
    dtype: Annotated[str, typer.Option(autocompletion=lambda: ["auto", *DTYPES], help=(
        f"{', '.join(DTYPES)}; auto is the checkpoint's on a GPU and at least float32 on a CPU."))] = "auto",
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
    from harness.bench.cli import bench

    for name, values in (("workload", workload or []), ("case", case or []), ("peer", peer or [])):
        if len(set(values)) < len(values):
            raise UsageError(f"{name}={','.join(values)} names one more than once: name it once")
    peers = None if peer is None else tuple(name for name in peer if name != "none")
    raise typer.Exit(bench(model=model, names=tuple(workload or ["quick"]), cases=tuple(case or []), tp=tp, peers=peers,
                           fabric=fabric, dtype=dtype, device=device, rounds=rounds, against=against,
                           save_baseline=save_baseline, out=out))


def compare_command(
    baseline: Annotated[Path, typer.Argument(help="A report.json, or the folder that holds one.")],
    candidate: Annotated[Path, typer.Argument(help="The same, of the run to judge.")],
    gate: Annotated[bool | None, typer.Option("--gate/--no-gate", help="Whether a slower row fails. Default: on like "
                                              "machines, with a GPU every one, else those that are clearly slower.")] = None,
    allow_unlike: Annotated[bool, typer.Option("--allow-unlike", help="Compare speeds of unlike machines.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.json, .md, .html, .csv and .xml (JUnit).")] = Path(
        "reports/out/compare"),
) -> None:
    """Judge a run by a baseline, row by row: faster, slower, the same, or too noisy to tell; checks too.

    Writes Markdown to $GITHUB_STEP_SUMMARY as well, where that is set. Exits 0 if nothing got worse, 1 on a regression, 2 on
    wrong usage, 3 if it could not compare (a missing or damaged file, unlike machines, no row in both).
    """
    from harness.bench.cli import compare_reports

    raise typer.Exit(compare_reports(baseline, candidate, gate=gate, allow_unlike=allow_unlike, out=out))

"""``shardproof collect``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from harness.commands.options import Fabric, Quiet, Seed, check_device, numbers
from harness.commands.progress import about, errors
from harness.names import DTYPES


def collect_command(
    side: Annotated[str, typer.Argument(metavar="SIDE", help=(
        "An OpenAI-compatible server (http://host:port), a model folder or name (our engine, --tp), or reference:FOLDER."))],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file, .jsonl.")] = Path("logprobs.jsonl"),
    prompts: Annotated[Path | None, typer.Option(help="Sequences to score, a JSON list of token ids a line; by default drawn "
                                                      "ones.")] = None,
    count: Annotated[int, typer.Option(help="Drawn sequences.")] = 24,
    longest: Annotated[int, typer.Option(help="Most tokens of a drawn sequence.")] = 96,
    generate: Annotated[int, typer.Option(help="Tokens that a server generates after each prompt, with their log-probabilities; "
                                               "0: the prompts themselves are scored.")] = 0,
    batch_sizes: Annotated[str, typer.Option(help="Sequences that run together, in turn.")] = "1,4,7",
    tp: Annotated[int, typer.Option(help="Ranks of a model folder.")] = 1,
    dtype: Annotated[str, typer.Option(autocompletion=lambda: ["auto", *DTYPES], help=(
        f"In which it computes: {', '.join(DTYPES)}; auto: the checkpoint's, and of a server unknown."))] = "auto",
    top: Annotated[int, typer.Option(help="Most probable tokens to tell beside each.")] = 2,
    model: Annotated[str, typer.Option(help="Of a server; by default the only one that it serves.")] = "",
    key_env: Annotated[str, typer.Option(help="Environment variable with a server's key, which goes to that origin alone.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds for one answer of a server.")] = 120.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after what is in the file.")] = False,
    device: Annotated[str, typer.Option(help="Of a model folder or reference: cpu or cuda.")] = "cpu",
    fabric: Fabric = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write one side's log-probabilities to a file, for `verdict`: here, or on another machine at another time.

    Each sequence is in the file as soon as it is known: after Ctrl-C or an error, --resume goes on.

    Exits 0 when all is there, 2 on wrong usage, 3 if it could not go on.
    """
    sizes = numbers("batch_sizes", batch_sizes)
    check_device(device)
    from harness.verdict.collect import CollectPlan, collect
    from harness.verdict.sides import SideOptions

    options = SideOptions(tp_size=tp, dtype=dtype, num_top=top, device=device, fabric=fabric, model=model, key_env=key_env,
                          timeout_s=timeout, batch_sizes=sizes)
    plan = CollectPlan(side=side, path=out, options=options, prompts=prompts, count=count, longest=longest, generate=generate,
                       resume=resume, seed=seed)
    started_at = time.monotonic()
    first: list[int] = []

    def on_done(done: int, total: int) -> None:
        first[:] = first or [done - 1]
        seconds = (time.monotonic() - started_at) / (done - first[0]) * (total - done)
        if not quiet:
            left = about(seconds)
            errors.print(f"{done} of {total} sequences{f', {left} left' if left else ''}", highlight=False)

    total = collect(plan, on_done)
    sys.stdout.write(f"{total} sequences in {out}\n")

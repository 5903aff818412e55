"""What several commands take, and how it is checked before any work."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from harness.bench.shapes import SHAPES
from harness.commands.progress import errors
from harness.errors import COULD_NOT_RUN, CouldNotRunError, UsageError
from harness.names import FABRICS

if TYPE_CHECKING:
    from reports.records import Report

DEFAULT_MODEL = "smollm2"
SUFFIXES = ("json", "md", "html", "csv", "xml")

Model = Annotated[str, typer.Argument(autocompletion=lambda: [DEFAULT_MODEL, *SHAPES], help=(
    f"smollm2, a Hugging Face folder, or a hub id; or a shape with random weights: {', '.join(SHAPES)}."))]
Fabric = Annotated[str, typer.Option(autocompletion=lambda: list(FABRICS), help=f"{', '.join(FABRICS[:-1])} or {FABRICS[-1]}.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]
Python = Annotated[Path | None, typer.Option(help="The interpreter of a subject that runs in one of its own, as vllm does.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report's JSON on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what is wrong.")]


def numbers(name: str, text: str) -> tuple[int, ...]:
    """``"2,3"`` -> ``(2, 3)``."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{name}={text!r} must be numbers with commas between them, as 1,2,4") from None


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        CouldNotRunError: if it is a GPU, and there is none.
    """
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise CouldNotRunError(f"device={device!r}, but torch sees no GPU")


def begin_ranks(tp_sizes: Sequence[int], fabric: str, *, preload: Sequence[str]) -> None:
    """Start the fork server of the ranks, so that its imports run beside those of this process: call it before them.

    Does nothing under torchrun. If ranks turn out to be threads, nobody uses the server, and it ends with this process.
    """
    if max(tp_sizes) > 1 and fabric in ("auto", "gloo", "nccl") and "LOCAL_WORLD_SIZE" not in os.environ:
        from engine.ranks.forking import start_fork_server

        with suppress(RuntimeError):  # ranks will say so
            start_fork_server(max(tp_sizes), preload)


def prepare_out(out: Path, *, set_aside: bool = True) -> None:
    """See whether a report can be written to ``out``, and set an older one there aside, ``report.md`` as ``report.old.md``.

    To be called when the options are right and before any work, so that none is lost, and so that no older report is taken for
    that of a run that ends without one.

    Raises:
        UsageError: if no report can be written there.
    """
    place = out
    try:
        while not place.is_dir() and not place.is_symlink() and not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
        for path in (out / f"report.{suffix}" for suffix in SUFFIXES):
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            if set_aside and path.exists():
                path.replace(path.with_name(f"report.old{path.suffix}"))
    except OSError as error:
        raise UsageError(f"out={str(out)!r}: no report can be written there: {error.strerror or error} ({place})") from error


def end_of_run(report: Report, out: Path, *, show: Callable[[], None], summary: str, interrupted: bool, as_json: bool,
               quiet: bool) -> NoReturn:
    """Show what came of a run, write its report and leave with its exit code."""
    from harness.interrupted import NOTICE, undisturbed

    with undisturbed() if interrupted else nullcontext():
        try:
            if not as_json:
                show()
        finally:  # also where nobody reads standard output any more
            page = write_report(report, out, as_json=as_json)
        if not as_json and not (quiet and report.exit_code == 0):
            sys.stdout.write(f"\n{summary}; report: {page}\n")
    if interrupted:
        errors.print(NOTICE, highlight=False)
    raise typer.Exit(COULD_NOT_RUN if interrupted else report.exit_code)


def write_report(report: Report, out: Path, *, as_json: bool = False) -> Path:
    """Write the report in all its forms; returns the page's path. ``as_json``: also to standard output.

    Raises:
        CouldNotRunError: if it can't be written.
    """
    from reports.render import write_all

    try:
        paths = write_all(report, out)
    except OSError as error:
        raise CouldNotRunError(f"out={str(out)!r}: the report was not written: {error}") from error
    if as_json:
        sys.stdout.write(paths["json"].read_text(encoding="utf-8"))
    return paths["html"]

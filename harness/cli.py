"""The command line: ``shardproof verify | faults | calibrate | bench | …``, the same as ``python -m harness``.

Here every mistake becomes its line and its exit code; what each command takes and does stands in ``harness.commands``.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup

from harness.commands.atlas import atlas_command
from harness.commands.bench import bench_command, compare_command
from harness.commands.calibrate import calibrate_command
from harness.commands.collect import collect_command
from harness.commands.faults import faults_command
from harness.commands.generate import fetch_command, generate_command
from harness.commands.progress import errors
from harness.commands.verdict import verdict_command
from harness.commands.verify import verify_command
from harness.errors import COULD_NOT_RUN, REPORT_IT, UNEXPECTED, told
from harness.shardproof import __version__


class Commands(TyperGroup):
    """All commands, and the one place where an error becomes an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message"):  # typer's own
                raise
            raise typer.Exit(exit_with(error)) from error


def exit_with(error: BaseException) -> int:
    """Say what is wrong on standard error: one line, or the traceback of what nobody expected. Returns the exit code."""
    if isinstance(error, BrokenPipeError):  # who reads standard output has seen enough, as in `| head`
        with suppress(io.UnsupportedOperation):  # else Python complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return COULD_NOT_RUN
    if isinstance(error, KeyboardInterrupt):
        errors.print("[red]interrupted[/red]", highlight=False)
        return COULD_NOT_RUN
    if (known := told(error)) is None:
        sys.stderr.write("".join(traceback.format_exception(error)))
        message, code = REPORT_IT, UNEXPECTED
    else:
        message, code = known
    errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, markup=True, soft_wrap=True)
    return code


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"shardproof {__version__}\n")
        raise typer.Exit


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def shardproof(version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                                     help="Print the version and exit.")] = False) -> None:
    """Proves tensor-parallel LLM inference correct: is it a bug, or is it rounding?

    Exit codes of all commands: 0 all is well; 1 a finding or a regression, and nothing else; 2 the command line is wrong;
    3 it could not run, or not to its end: a model, a file, the machine, an exception inside a check, Ctrl-C; 4 an exception that
    nobody expected.
    """


app.command("verify")(verify_command)
app.command("verdict")(verdict_command)
app.command("collect")(collect_command)
app.command("faults")(faults_command)
app.command("atlas")(atlas_command)
app.command("generate")(generate_command)
app.command("fetch")(fetch_command)
app.command("bench")(bench_command)
app.command("compare")(compare_command)
app.command("calibrate")(calibrate_command)


def main() -> None:
    """Entry point of ``shardproof`` and ``python -m harness``."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> NoReturn:
        """As after Ctrl-C, so that ranks, ports and temporary folders go with the command and a report is written."""
        received.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        app()
    except SystemExit as leave:
        if received and leave.code == COULD_NOT_RUN:
            raise SystemExit(128 + received[0]) from None
        raise


if __name__ == "__main__":
    main()

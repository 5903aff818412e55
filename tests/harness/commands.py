"""Every command that the project prints for people to type, and what is wrong with it, found without running it.

A command is a line of a console block, a ``run`` of a workflow, a command of a tox environment, or a span of inline code that
begins with a program's name or has an option. Each is parsed by the very command line that it names; one that nobody here
knows is wrong.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import typer.main
import yaml
from packaging.requirements import InvalidRequirement, Requirement
from torch.distributed.run import get_args_parser

from harness.cli import app
from tests.harness.installed import PROJECT, ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [path for folder in ("engine", "reference", "harness", "reports", "tests/benchmarks")
           for path in sorted((ROOT / folder).rglob("*.py"))]
SHELL = {"git", "cat"}
"""Programs of a workflow's shell that are not held against anything."""
MODULES = {"harness.studies.aa", "harness.studies.oracle", "harness.studies.scoreboard", "reports.by_seed", "reports.same_power",
           "tests.benchmarks.kernels_gpu", "tests.benchmarks.live_ranks"}
"""Run by ``python -m``; their ``main`` parses with argparse before all else."""


@dataclass(frozen=True, slots=True)
class Printed:
    """One command.

    where    the file that prints it
    line     as it is to be typed
    inline   from within a text, which may name a command or an option without what must follow
    """

    where: str
    line: str
    inline: bool = False


Selections = list[tuple[str, ...]]
"""Arguments of pytest."""


def printed() -> list[Printed]:
    """All commands of pages, sources and tox.ini."""
    found = [command for page in PAGES for command in in_page(page.name, page.read_text(encoding="utf-8"))]
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += in_text(str(source.relative_to(ROOT)), node.value)
    found += [Printed("tox.ini", f"tox -e {name}") for name in tox_commands()]
    return found


def in_page(where: str, text: str) -> Iterator[Printed]:
    """The commands of a page in Markdown."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language == "console":
            lines = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
        elif language in ("bash", "sh"):
            lines = block.splitlines()
        elif language == "yaml":
            steps = [step for job in yaml.safe_load(block)["jobs"].values() for step in job["steps"]]
            lines = [line for step in steps for line in step.get("run", "").splitlines()]
        else:
            continue
        yield from (Printed(where, part.strip()) for line in lines for part in line.split("&&"))
    yield from in_text(where, re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def in_text(where: str, text: str) -> Iterator[Printed]:
    """The commands among the inline code of a text."""
    for quoted, single in re.findall(r"``([^`]+)``|`([^`]+)`", text):
        span = " ".join((quoted or single).split())
        if is_command(span):
            yield from (Printed(where, line, inline=True) for line in alternatives(span))


def is_command(span: str) -> bool:
    first, *rest = span.split()
    has_option = any(re.match(r"--?[a-zA-Z]", word) for word in rest)
    return first in PROGRAMS or (has_option and re.fullmatch(r"[a-z][\w.-]*", first) is not None)


def alternatives(span: str) -> Iterator[str]:
    """``shardproof verify | faults`` is two commands; ``[--option]`` may be typed; ``…`` is anything."""
    first, *others = re.sub(r"\[(--[^\]]*)\]", r"\1", span.replace("…", "")).split(" | ")
    yield first.strip()
    yield from (f"{first.split()[0]} {other.strip()}" for other in others if other.strip())


def look_at(commands: list[Printed]) -> tuple[list[str], Selections]:
    """What is wrong with them, in words; and which tests remain to be collected."""
    wrong: list[str] = []
    selections: Selections = []
    for command in commands:
        words = shlex.split(command.line, comments=True)
        if words and (problem := problem_of(words, command.inline, selections)):
            wrong.append(f"{command.where}: {command.line}: {problem}")
    return wrong, list(dict.fromkeys(selections))


def problem_of(words: list[str], inline: bool, selections: Selections) -> str | None:
    program, *rest = words
    program = Path(program).name
    if inline and program in SUBCOMMANDS:
        return shardproof(words, inline, selections)
    if program not in PROGRAMS:
        return f"{program} is a program that nobody here knows: classify it in {Path(__file__).name}"
    return PROGRAMS[program](rest, inline, selections)


def python(words: list[str], inline: bool, selections: Selections) -> str | None:
    if "-m" not in words:
        result = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True, timeout=60)
        return None if result.returncode == 0 else result.stderr
    start = words.index("-m")
    if len(words) == start + 1:
        return "a module's name is missing"
    module, rest = words[start + 1], words[start + 2 :]
    if module in MODULES:
        return by_argparse(module, rest)
    if module == "harness":
        return shardproof(rest, inline, selections)
    if module in ("pip", "pytest", "tox"):
        return PROGRAMS[module](rest, inline, selections)
    if module in ("venv", "ensurepip") and not any(word.startswith("-") for word in rest):
        return None
    return f"{module} is a module that nobody here knows: classify it in {Path(__file__).name}"


class _ParsedError(Exception):
    pass


def by_argparse(module: str, words: list[str]) -> str | None:
    real, said = argparse.ArgumentParser.parse_args, io.StringIO()

    def parse_and_stop(parser: argparse.ArgumentParser, *arguments: list[str] | None) -> None:
        real(parser, *arguments)
        raise _ParsedError

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop), \
            mock.patch.object(sys, "argv", [module, *words]), contextlib.redirect_stderr(said):
        try:
            importlib.import_module(module).main()
        except _ParsedError:
            return None
        except SystemExit:
            return said.getvalue()
    return f"{module} does not parse its arguments"


def shardproof(words: list[str], inline: bool, selections: Selections) -> str | None:
    if not words:
        return None if inline else "a command's name is missing"
    name, *rest = words
    if name in OWN_OPTIONS and not rest:
        return None
    if name not in SUBCOMMANDS:
        return f"no command {name}"
    if inline and not rest:
        return None  # it is only named
    try:
        SUBCOMMANDS[name].make_context(name, list(rest))
    except Exception as error:  # typer's or click's own, whichever it is built on
        message = error.format_message() if hasattr(error, "format_message") else repr(error)
        named = inline and rest[-1].startswith("-") and "requires an argument" in message
        return None if named else message
    return None


def tox(words: list[str], inline: bool, selections: Selections) -> str | None:
    if words == ["list"]:
        return None
    if words[:1] != ["-e"] or len(words) < 2 or words[2:3] not in ([], ["--"]):
        return "a tox command is `tox -e ENVIRONMENT,… [-- ARGUMENTS]`"
    known, posargs = tox_commands(), words[3:]
    for name in words[1].split(","):
        if name not in known:
            return f"no tox environment {name}"
        for line in known[name]:
            default = re.search(r"\{posargs(?::(.*))?\}", line)
            if posargs and default is None:
                return f"tox environment {name} takes no arguments"
            line = line.removeprefix("- ")  # whatever its exit code
            filled = line if default is None else line.replace(default[0], shlex.join(posargs) or default[1] or "")
            if problem := problem_of(shlex.split(filled), False, selections):
                return f"{filled}: {problem}"
    return None


def tox_commands() -> dict[str, list[str]]:
    """The commands of each environment, as they stand there."""
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT / "tox.ini")
    return {section.removeprefix("testenv:"): ini[section]["commands"].strip().splitlines()
            for section in ini.sections() if section.startswith("testenv:")}


def pytest_selection(words: list[str], inline: bool, selections: Selections) -> str | None:
    selections.append(tuple(words))  # collected in one go by the test, as that takes a while
    return None


def pip(words: list[str], inline: bool, selections: Selections) -> str | None:
    if words[:1] != ["install"] or len(words) < 2:
        return "no `pip install`"
    for option, word in pairwise(words):
        if word in ("-e", "-c", "."):
            continue
        if option == "-c":
            if not (ROOT / word).is_file():
                return f"no {word}"
            continue
        try:
            requirement = Requirement(word)
        except InvalidRequirement as error:
            return str(error)
        if requirement.name == PROJECT["name"] and (odd := requirement.extras - PROJECT["optional-dependencies"].keys()):
            return f"no extra {', '.join(odd)}"
    return None


def uv(words: list[str], inline: bool, selections: Selections) -> str | None:
    if words[:2] == ["pip", "compile"]:  # needs the network, and uv, which tox installs for it alone
        return linter([word for word in words[2:] if word.endswith((".toml", ".txt"))], inline, selections)
    return pip(words[1:], inline, selections) if words[:1] == ["pip"] else "no `uv pip`"


def torchrun(words: list[str], inline: bool, selections: Selections) -> str | None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            options = get_args_parser().parse_args(words)
        except SystemExit:
            return said.getvalue()
    module = ["-m"] if options.module else []
    return python([*module, options.training_script, *options.training_script_args], inline, selections)


def linter(words: list[str], inline: bool, selections: Selections) -> str | None:
    missing = [word for word in words if word != "check" and not (ROOT / word).exists()]
    return f"no {', '.join(missing)}" if missing else None


def shell(words: list[str], inline: bool, selections: Selections) -> str | None:
    return None


SUBCOMMANDS = typer.main.get_group(app).commands
OWN_OPTIONS = {option for parameter in typer.main.get_command(app).params for option in parameter.opts} | {"-h", "--help"}
"""Of ``shardproof`` itself."""
PROGRAMS: dict[str, Callable[[list[str], bool, Selections], str | None]] = {
    "python": python, "python3": python, "shardproof": shardproof, "tox": tox, "pytest": pytest_selection, "pip": pip, "uv": uv,
    "torchrun": torchrun, "ruff": linter, "mypy": linter, **dict.fromkeys(SHELL, shell),
}


class CollectedBefore:
    """A plugin that has pytest, where it is asked for all tests, take those that were collected before."""

    def __init__(self, tests: list[pytest.Item] | None) -> None:
        self.tests = tests

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        if self.tests is None or not self._is_asked_for_all(session.config):
            return None
        session.items = list(self.tests)
        session.config.hook.pytest_collection_modifyitems(session=session, config=session.config, items=session.items)
        session.testscollected = len(session.items)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.tests is None and self._is_asked_for_all(config):
            self.tests = list(items)

    def _is_asked_for_all(self, config: pytest.Config) -> bool:
        return config.args_source is config.ArgsSource.TESTPATHS


def collect(selections: Selections, tests: list[pytest.Item] | None) -> list[str]:
    """Those selections that pytest does not take, or that collect nothing, but for files that are skipped as a whole.

    Args:
        selections: arguments of pytest.
        tests: all of the project's, where they are collected already: that takes a while.
    """
    before = CollectedBefore(tests)
    # The first of these plugins looks for garbage among all tests ten times a selection, the other is for a whole process.
    options = ["--collect-only", "-qq", "-s", "-W", "default", "--assert=plain", "-p", "no:cacheprovider",
               "-p", "no:unraisableexception", "-p", "no:faulthandler"]
    wrong = []
    for selection in selections:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.chdir(ROOT):
            code = pytest.main([*options, *selection], plugins=[before])
        names_files = any(word.startswith("tests/") for word in selection)
        is_skipped = names_files and code == pytest.ExitCode.NO_TESTS_COLLECTED and "SKIPPED [" in said.getvalue()
        if code != pytest.ExitCode.OK and not is_skipped:
            wrong.append(f"pytest {shlex.join(selection)}: exit code {int(code)}: {said.getvalue()[-300:]}")
    return wrong

"""What the documents tell people to type exists: commands and their options, tox environments, markers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from harness.cli import app
from reports.records import read_report

ROOT = Path(__file__).parents[2]
CI = ROOT / "docs" / "ci.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASELINES = "reports/baselines/"


def tox_environments() -> set[str]:
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT / "tox.ini")
    return {section.removeprefix("testenv:") for section in ini.sections() if section.startswith("testenv:")}


def markers(pytestconfig: pytest.Config) -> set[str]:
    return {line.partition(":")[0] for line in pytestconfig.getini("markers")}


def wrong_with(line: str, known_markers: set[str]) -> list[str]:
    """What a line of shell asks for that does not exist."""
    words = shlex.split(line, comments=True)
    found: list[str] = []
    if "tox" in words and "-e" in words:
        environments = words[words.index("-e") + 1].split(",")
        found += [f"tox environment {name}" for name in environments if name not in tox_environments()]
        if "--" in words and environments == ["bench"]:
            found += wrong_options("bench", words[words.index("--") + 1 :])
    for name in ("shardproof", "harness"):
        if name in words[:3] and len(words) > words.index(name) + 1:
            command, *rest = words[words.index(name) + 1 :]
            found += wrong_options(command, rest)
    if "pytest" in words and "-m" in words[words.index("pytest") :]:
        marker = words[words.index("-m", words.index("pytest")) + 1]
        found += [f"marker {marker}"] if marker not in known_markers else []
    return found


def wrong_options(command: str, words: list[str]) -> list[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    commands: dict[str, Any] = group.commands
    if command not in commands:
        return [f"command {command}"]
    options = {name for parameter in commands[command].params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [f"option {word} of {command}" for word in words if word.startswith("--") and word.partition("=")[0] not in options]


def lines_of_workflow(text: str) -> Iterator[str]:
    """Every line that a step of the workflow in ``text`` runs."""
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    for job in yaml.safe_load(block)["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


def test_the_workflow_for_a_ci_runs_commands_that_there_are(pytestconfig: pytest.Config) -> None:
    lines = list(lines_of_workflow(CI.read_text()))
    assert len(lines) > 8
    assert [wrong for line in lines for wrong in wrong_with(line, markers(pytestconfig))] == []


@pytest.mark.parametrize(("right", "wrong", "found"), [
    ("tox -e verify", "tox -e verfiy", "tox environment verfiy"),
    ("--tp 1 --against", "--tp 1 --aganst", "option --aganst of bench"),
    ("-m harness compare", "-m harness compare-to", "command compare-to"),
    ("pytest -m multigpu", "pytest -m multi_gpu", "marker multi_gpu"),
    ("--workload w1", "--work-load w1", "option --work-load of bench"),
])
def test_a_slip_in_the_workflow_would_be_noticed(right: str, wrong: str, found: str, pytestconfig: pytest.Config) -> None:
    text = CI.read_text()
    assert right in text
    lines = lines_of_workflow(text.replace(right, wrong))
    assert found in [problem for line in lines for problem in wrong_with(line, markers(pytestconfig))]


def test_the_workflow_knows_its_events_and_needs_no_action_but_githubs_own() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", CI.read_text(), re.DOTALL)
    workflow = yaml.safe_load(block)
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads "on" as true
    assert set(workflow["jobs"]) == {"cpu", "gpu"}
    used = re.findall(r"uses: (\S+)", block)
    assert used
    assert all(name.startswith("actions/") for name in used)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_code_blocks_of_a_page_exist(page: Path, pytestconfig: pytest.Config) -> None:
    blocks = re.findall(r"```(?:console|bash|sh)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [part for block in blocks for line in block.splitlines() if line.startswith("$ ") for part in line[2:].split("&&")]
    assert [wrong for line in lines for wrong in wrong_with(line, markers(pytestconfig))] == []


@pytest.mark.parametrize("path", sorted((ROOT / BASELINES).rglob("*.json")), ids=lambda path: path.stem)
def test_a_committed_record_is_whole_and_names_no_folder_of_the_machine_that_made_it(path: Path) -> None:
    report = read_report(path)
    assert path.parent.name == report.run.machine.folder
    assert not [word for word in report.run.argv if re.search(r"(^|[=,])(/|~)", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_record_that_a_page_refers_to_is_committed(page: Path) -> None:
    text = re.sub(r"```yaml\n.*?```", "", page.read_text(), flags=re.DOTALL)  # a baseline of the reader's own machines
    for name in re.findall(rf"{re.escape(BASELINES)}[\w./-]+\.json", text):
        assert (ROOT / name).is_file(), name

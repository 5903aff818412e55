"""The pages on adding a check, a fault and a subject: their steps, done as they stand, in a copy of the project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.checks import CHECK_NAMES
from harness.faults.layouts import LAYOUTS
from reports.records import CheckRow, read_report
from tests.harness.conftest import MakeModel
from tests.harness.installed import ROOT

pytestmark = pytest.mark.slow


def steps(page: str) -> tuple[str, list[str]]:
    """The path that a page gives its first file, and its Python blocks."""
    text = (ROOT / "docs" / page).read_text()
    (path, *_) = re.findall(r"`([\w/]+\.py)`:\n", text)
    return path, re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def copied(folder: Path) -> Path:
    """A checkout to change, compiled as far as this one is."""
    for name in ("engine", "harness", "reference", "reports"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("baselines", "out"))
    return folder


def add_line(path: Path, before: str, line: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, f"{line}{before}"))


def add_check(project: Path) -> None:
    path, (source, name) = steps("add_a_check.md")
    (project / path).write_text(source)
    add_line(project / "harness" / "checks" / "__init__.py", f'"{CHECK_NAMES[-1]}")', f"{name.strip()} ")


def add_fault(project: Path) -> None:
    path, (source, line) = steps("add_a_fault.md")
    (project / path).write_text(source)
    init = project / "harness" / "faults" / "__init__.py"
    init.write_text(init.read_text() + line)


def add_subject(project: Path) -> None:
    text = (ROOT / "docs" / "add_a_subject.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    (project / "my_tp.py").write_text(source)


SEVERAL = """
import json, sys
from typer.testing import CliRunner
from harness.cli import app
from harness.subjects.engine_rank import EngineRank

draw = EngineRank.draw
for name, words in json.loads(sys.argv[1]).items():
    if name == "drawn apart":
        EngineRank.draw = lambda rank, logits, rows: draw(rank, logits if rank.tp_rank == 0 else -logits, rows)
    done = CliRunner().invoke(app, words)
    print(done.output)
    print(f"@@ {name}: {done.exit_code}")
"""
"""Commands one after the other, in an interpreter that imports the project once."""


@pytest.fixture(scope="module")
def done(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[CheckRow]]]:
    """What each command ends with and reports, in a copy of the project that has the check, the fault and the subject."""
    project = copied(tmp_path_factory.mktemp("project"))
    for add in (add_check, add_fault, add_subject):
        add(project)
    model = str(tiny_model(LAYOUTS["llama"].config))
    agreement = ["verify", model, "--tp", "2", "--fabric", "threads", "--check", "agreement"]
    commands = {"fault": ["faults", "--only", "last-feature-left-out"],
                "subject": ["verify", model, "--tp", "1", "--subject", "my_tp:Mine"],
                "check": agreement, "drawn apart": agreement}
    words = {name: [*command, "--out", str(project / "out" / name)] for name, command in commands.items()}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", SEVERAL, json.dumps(words)], cwd=project, env=env, capture_output=True, text=True,
                         timeout=600)
    codes = dict(re.findall(r"^@@ (.*): (\d+)$", run.stdout, flags=re.MULTILINE))
    assert list(codes) == list(commands), run.stdout + run.stderr
    return {name: (int(code), read_report(project / "out" / name).checks) for name, code in codes.items()}


def test_a_check_is_a_file_and_a_name_and_sees_ranks_that_draw_apart(done: dict[str, tuple[int, list[CheckRow]]]) -> None:
    code, (row,) = done["check"]
    assert (code, row.check, row.verdict, row.cases, row.compared) == (0, "agreement", "pass", 8, 2 * 8 * 50)
    code, (row,) = done["drawn apart"]
    assert (code, row.verdict, row.rank, row.module) == (1, "finding", 1, "sampler")


@pytest.mark.endurance
def test_the_pages_check_is_not_green_for_a_subject_that_shows_nothing_right(tmp_path: Path) -> None:
    project = copied(tmp_path)
    add_check(project)
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, project)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/harness/test_subjects.py", "-k", "has_no_green_row"],
                          cwd=project, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


@pytest.mark.multirank
def test_a_fault_is_a_function_and_an_import_and_is_seen(done: dict[str, tuple[int, list[CheckRow]]]) -> None:
    code, (row, *_) = done["fault"]
    assert (code, row.verdict, set(row.extra["red"])) == (0, "pass", {"layers", "logits"})
    assert row.module == "model.layers.0.self_attn.o_proj"


def test_a_subject_is_a_class_in_a_folder_of_ones_own(done: dict[str, tuple[int, list[CheckRow]]]) -> None:
    code, rows = done["subject"]
    assert code == 0
    assert {row.name for row in rows if row.verdict == "pass"} == {
        "weights: model", "weights: indexed", "logits: model", "logits: near eps", "generation: model"}
    assert all(row.message.startswith("not applicable") for row in rows if row.verdict == "skipped")

"""The pages on adding a check, a fault and a subject: their steps, done as they stand, in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.checks import CHECK_NAMES
from harness.faults.layouts import LAYOUTS
from reports.records import read_report
from tests.harness.conftest import MakeModel
from tests.harness.installed import ROOT

pytestmark = pytest.mark.slow


def steps(page: str) -> tuple[str, list[str]]:
    """The path that a page gives its first file, and its Python blocks."""
    text = (ROOT / "docs" / page).read_text()
    (path, *_) = re.findall(r"`([\w/]+\.py)`:\n", text)
    return path, re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout to change."""
    for name in ("engine", "harness", "reference", "reports"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "baselines", "out"))
    return tmp_path


def shardproof(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-m", "harness", *map(str, words), "--out", str(folder / "out")], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=300)


def add_line(path: Path, before: str, line: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, f"{line}{before}"))


def test_a_check_is_a_file_and_a_name_and_sees_ranks_that_draw_apart(project: Path, tiny_model: MakeModel) -> None:
    path, (source, name) = steps("add_a_check.md")
    (project / path).write_text(source)
    add_line(project / "harness" / "checks" / "__init__.py", f'"{CHECK_NAMES[-1]}")', f"{name.strip()} ")
    words = ("verify", tiny_model(LAYOUTS["llama"].config), "--tp", "2", "--fabric", "threads", "--check", "agreement")
    done = shardproof(project, *words)
    assert done.returncode == 0, done.stderr
    (row,) = read_report(project / "out").checks
    assert (row.check, row.verdict, row.cases, row.compared) == ("agreement", "pass", 8, 2 * 8 * 50)
    rank = project / "harness" / "subjects" / "engine_rank.py"
    add_line(rank, "        return sample(logits_V", "        logits_V = logits_V if self.tp_rank == 0 else -logits_V\n")
    done = shardproof(project, *words)
    assert done.returncode == 1, done.stderr
    (row,) = read_report(project / "out").checks
    assert (row.verdict, row.rank, row.module) == ("finding", 1, "sampler")


@pytest.mark.endurance
def test_the_pages_check_is_not_green_for_a_subject_that_shows_nothing_right(project: Path) -> None:
    path, (source, name) = steps("add_a_check.md")
    (project / path).write_text(source)
    add_line(project / "harness" / "checks" / "__init__.py", f'"{CHECK_NAMES[-1]}")', f"{name.strip()} ")
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / file, project)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/harness/test_subjects.py", "-k", "has_no_green_row"],
                          cwd=project, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


@pytest.mark.multirank
def test_a_fault_is_a_function_and_an_import_and_is_seen(project: Path) -> None:
    path, (source, line) = steps("add_a_fault.md")
    (project / path).write_text(source)
    init = project / "harness" / "faults" / "__init__.py"
    init.write_text(init.read_text() + line)
    done = shardproof(project, "faults", "--only", "last-feature-left-out")
    assert done.returncode == 0, done.stdout + done.stderr
    row = read_report(project / "out").checks[0]
    assert (row.verdict, set(row.extra["red"])) == ("pass", {"layers", "logits"})
    assert row.module == "model.layers.0.self_attn.o_proj"


def test_a_subject_is_a_class_in_a_folder_of_ones_own(project: Path, tiny_model: MakeModel) -> None:
    text = (ROOT / "docs" / "add_a_subject.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    (project / "my_tp.py").write_text(source)
    done = shardproof(project, "verify", tiny_model(LAYOUTS["llama"].config), "--tp", "1", "--subject", "my_tp:Mine")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_report(project / "out").checks
    assert {row.name for row in rows if row.verdict == "pass"} == {
        "weights: model", "weights: indexed", "logits: model", "logits: near eps", "generation: model"}
    assert all(row.message.startswith("not applicable") for row in rows if row.verdict == "skipped")

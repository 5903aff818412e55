"""The page docs/your_own_tp.md: what it prints runs as it stands, in a project that is not ours."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reference.checkpoints import random_checkpoint
from reports.records import read_report
from tests.harness.installed import PLUGIN, ROOT, install

pytestmark = [pytest.mark.multirank, pytest.mark.slow]

TEXT = (ROOT / "docs" / "your_own_tp.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the page's files, beside an installation."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name, source in zip(re.findall(r"In `(\w+\.py)`", TEXT), blocks("python"), strict=True):
        (folder / name).write_text(source)
    install(tmp_path / "site")
    return folder


def run(project: Path, command: str) -> subprocess.CompletedProcess[str]:
    """One of the page's commands, as it is printed but for what must be told of this environment."""
    name, *words = shlex.split(command.removeprefix("$ "))
    site = project.parent / "site"
    start = [sys.executable, str(site / "bin" / name)] if name == "shardproof" else [
        sys.executable, "-m", name, "-p", PLUGIN, "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": str(site), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([*start, *words], cwd=project, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.endurance
def test_the_command_is_green_as_it_is_printed(project: Path) -> None:
    (config,) = re.findall(r"^CONFIG = (\{.*?\})$", TEXT, flags=re.DOTALL | re.MULTILINE)
    random_checkpoint(project / "MODEL", eval(config))
    done = run(project, blocks("console")[0])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_report(project / "reports" / "out" / "verify").checks
    assert {(row.name, row.tp_size) for row in rows if row.verdict == "pass"} == {
        (name, tp_size) for tp_size in (1, 2)
        for name in ("weights: model", "weights: indexed", "logits: model", "logits: near eps", "generation: model")}


@pytest.mark.endurance
def test_the_test_is_green_as_it_is_printed_and_red_with_the_pages_mistake(project: Path) -> None:
    done = run(project, blocks("console")[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    module = project / "my_tp.py"
    source = module.read_text()
    assert source.count("ColwiseParallel(output_layouts=Replicate())") == 1
    module.write_text(source.replace("ColwiseParallel(output_layouts=Replicate())", "ColwiseParallel()"))
    done = run(project, blocks("console")[1].replace("2,3", "2"))
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    assert "the logits are (101, 51) on rank 0, they should be (101, 101)" in done.stdout


def test_the_function_takes_twenty_lines_at_most() -> None:
    for source in blocks("python"):
        assert len([line for line in source.splitlines() if line.strip()]) <= 20

"""Someone else's ``engine``, ``harness``, ``reference`` or ``reports`` where ours is needed: one line says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.installed import ROOT, environment, install


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("installed") / "site")


def make_foreign(folder: Path, name: str) -> Path:
    """A user's module or package of that name; returns what the message must show."""
    if name.endswith(".py"):
        (folder / name).write_text("raise RuntimeError('nobody asked for this')\n")
    else:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
    return folder / name


def run(arguments: list[str], cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment(*path), capture_output=True, text=True,
                          timeout=120)


def assert_told(result: subprocess.CompletedProcess[str], name: str, found: Path) -> None:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: package={name} is found at {found}, but Shardproof's own is {ROOT / name}: rename the other")
    assert result.stdout == ""


@pytest.mark.parametrize("foreign", ["engine.py", "engine", "reference.py", "reference", "reports.py", "reports"])
def test_python_m_harness_names_what_is_not_ours_in_the_current_folder(foreign: str, site: Path, tmp_path: Path) -> None:
    found = make_foreign(tmp_path, foreign)
    assert_told(run(["-m", "harness", "verify", "--help"], tmp_path, site), foreign.removesuffix(".py"), found)


@pytest.mark.parametrize("foreign", ["engine.py", "harness.py", "harness", "reference.py", "reports"])
def test_the_console_script_names_what_is_not_ours_on_the_path(foreign: str, site: Path, tmp_path: Path) -> None:
    found = make_foreign(tmp_path, foreign)
    result = run([str(site / "bin" / "shardproof"), "verify", "--help"], tmp_path, tmp_path, site)
    assert_told(result, foreign.removesuffix(".py"), found)


def test_the_console_script_minds_nothing_in_the_current_folder(site: Path, tmp_path: Path) -> None:
    for name in ("engine.py", "harness.py", "reference", "reports"):
        make_foreign(tmp_path, name)
    result = run([str(site / "bin" / "shardproof"), "verify", "--help"], tmp_path, site)
    assert (result.returncode, result.stderr) == (0, "")


LOOK = "from shardproof.packages import foreign; print(foreign('engine'), foreign('reports'))"


def test_what_the_message_advises_helps(site: Path, tmp_path: Path) -> None:
    make_foreign(tmp_path, "engine.py")
    assert run(["-c", LOOK], tmp_path, site).stdout.startswith("package=engine")
    assert run(["-P", "-c", LOOK], tmp_path, site).stdout == "None None\n"


def test_a_folder_of_reports_in_the_current_one_is_no_package(site: Path, tmp_path: Path) -> None:
    (tmp_path / "reports" / "out" / "verify").mkdir(parents=True)  # as a run before this one has left it
    assert run(["-c", LOOK], tmp_path, site).stdout == "None None\n"


def test_another_checkout_that_is_found_first_is_whole(site: Path, tmp_path: Path) -> None:
    for name in ("engine", "harness"):
        make_foreign(tmp_path, name)
    (tmp_path / "harness" / "shardproof").mkdir()
    (tmp_path / "harness" / "shardproof" / "packages.py").touch()
    result = run(["-c", LOOK], tmp_path, site)
    assert result.stdout.startswith(f"None package=reports is found at {ROOT / 'reports'}"), result.stderr


RANKS = """
from engine.ranks.ranks import Ranks

def job(rank):
    return rank.tp.rank

if __name__ == "__main__":
    with Ranks(2, fabric="gloo") as ranks:
        print(ranks.run(job))
"""


@pytest.mark.multirank
def test_ranks_find_the_engine_that_their_driver_has(site: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "start.py").write_text(RANKS)
    make_foreign(tmp_path, "engine.py")
    result = run(["scripts/start.py"], tmp_path, site)
    assert result.stdout == "[0, 1]\n", result.stderr

"""The page docs/your_own_layer.md: its example runs as it stands, and turns red when its layer is broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engine.test_torchrun import torchrun

PAGE = Path(__file__).parents[2] / "docs" / "your_own_layer.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def planted() -> tuple[str, str]:
    """The line of the layer that the page changes, and what it becomes."""
    (diff,) = blocks("diff")
    old, new = diff.splitlines()
    return old.removeprefix("-"), new.removeprefix("+")


def run(pytester: pytest.Pytester, example: str) -> pytest.RunResult:
    pytester.makepyfile(test_row_parallel=example)
    return pytester.runpytest_inprocess("-p", "harness.plugin", "-p", "no:cacheprovider", "--tp-fabric", "gloo")


@pytest.mark.multirank
def test_the_example_is_green_as_it_stands(pytester: pytest.Pytester) -> None:
    run(pytester, blocks("python")[0]).assert_outcomes(passed=1)


@pytest.mark.multirank
def test_the_planted_bug_is_found_in_its_smallest_shape(pytester: pytest.Pytester) -> None:
    example = blocks("python")[0]
    old, new = planted()
    assert example.count(old) == 1
    result = run(pytester, example.replace(old, new))
    result.assert_outcomes(failed=1)
    output = result.stdout.str()
    assert "rank 0 of 2 is off by" in output
    for smallest in ("rows=1,", "num_in=1,", "num_out=1,"):
        assert smallest in output


def test_the_test_takes_about_twenty_lines() -> None:
    job_and_test = blocks("python")[0].split("def run_layer", 1)[1]
    assert len([line for line in job_and_test.splitlines() if line.strip()]) <= 20


def test_the_options_that_the_page_names_are_the_plugins(pytester: pytest.Pytester) -> None:
    shown = pytester.runpytest_inprocess("-p", "harness.plugin", "--help").stdout.str()
    markers = pytester.runpytest_inprocess("-p", "harness.plugin", "--markers").stdout.str()
    page = PAGE.read_text(encoding="utf-8")
    for option in set(re.findall(r"--tp-[a-z]+(?:-[a-z]+)*", page)):
        assert option in shown, option
    for marker in set(re.findall(r"@pytest\.mark\.([a-z]+)", page)):
        assert f"@pytest.mark.{marker}:" in markers, marker


@pytest.mark.multirank
def test_the_script_for_several_hosts_runs_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "my_jobs.py").write_text("def job(rank, x, y):\n    return rank.tp.all_reduce_min(rank.tp.rank + x + y)\n")
    script = tmp_path / "script.py"
    script.write_text(blocks("python")[1])
    ((code, output, _),) = torchrun([str(script)], hosts=1, ranks_a_host=2)
    assert code == 0, output
    assert "[3, 3]" in output

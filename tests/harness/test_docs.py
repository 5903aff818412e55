"""What the documents tell people to type is taken by the command lines that it is for, and the tests it selects are there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reports.records import read_report
from tests.harness import test_your_own_layer, test_your_own_tp
from tests.harness.commands import PAGES, Printed, collect, in_page, in_text, look_at, printed
from tests.harness.conftest import ALL_TESTS
from tests.harness.installed import ROOT, environment, install, pytest_command

CI = ROOT / "docs" / "ci.md"
BASELINES = "reports/baselines/"
USERS_FILES = {"test_row_parallel.py": test_your_own_layer.blocks("python")[0],
               "test_my_tp.py": test_your_own_tp.blocks("python")[1]}
"""What docs/your_own_layer.md and docs/your_own_tp.md have their readers write; two tests each."""


def test_every_command_that_is_printed_is_taken_by_its_command_line() -> None:
    commands = printed()
    assert {page.name for page in PAGES} | {"tox.ini", "harness/cli.py", "tests/benchmarks/conftest.py"} \
        <= {command.where for command in commands}
    wrong, _ = look_at(commands)
    assert wrong == []


@pytest.mark.slow
def test_every_selection_of_tests_that_is_printed_collects_some(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _, selections = look_at(printed())
    assert ("-m", "multirank", "-k", "row_parallel") in selections
    users = [selection for selection in selections if USERS_FILES.keys() & set(selection)]
    file = "tests/engine/test_linear.py"
    planted = [("-m", "multirank", "-k", "row_paralel"), (file, "-m", "multi_gpu"), (file, "--no-such-option"),
               ("tests/no_such_file.py",)]
    ours = [selection for selection in selections if selection not in users]
    wrong = collect([*ours, *planted], request.config.stash.get(ALL_TESTS, None))
    assert [line.partition(": ")[0] for line in wrong] == [f"pytest {' '.join(selection)}" for selection in planted]
    site = install(tmp_path / "site")
    for name, source in USERS_FILES.items():
        (tmp_path / name).write_text(source)
    assert sorted(name for selection in users for name in selection if name in USERS_FILES) == sorted(USERS_FILES)
    one_by_one = "import json, sys, pytest\nfor words in json.loads(sys.argv[1]): pytest.main(words)"
    words = [[*pytest_command("--collect-only", "-q")[3:], *selection] for selection in users]
    result = subprocess.run([sys.executable, "-c", one_by_one, json.dumps(words)], cwd=tmp_path, capture_output=True, text=True,
                            env=environment(site), timeout=120)
    assert result.stdout.count("2 tests collected") == len(users), result.stdout + result.stderr


@pytest.mark.parametrize(("line", "problem"), [
    ("shardproof verfy", "no command verfy"),
    ("shardproof --versoin", "no command --versoin"),
    ("shardproof verify MODEL --tps 2", "No such option"),
    ("shardproof verify MODEL MODEL", "unexpected extra argument"),
    ("shardproof generate --tp 1", "Missing argument"),
    ("shardproof bench --rounds many", "Invalid value for '--rounds'"),
    ("python -m harness compare BASELINE", "Missing argument"),
    (".venv/bin/python -m harness verify --tp", "requires an argument"),
    ("python -m harness.studies.aa --minute 3 --no-such", "unrecognized arguments: --no-such"),
    ("python -m tests.benchmarks.live_ranks --sweep", "unrecognized arguments"),
    ("python -m harness.studies.ab", "nobody here knows"),
    ("python -Z", "nknown option"),
    ("tox -e verfiy", "no tox environment verfiy"),
    ("tox -e lint,typos", "no tox environment typos"),
    ("python -m tox -e bench -- --work-load w1", "No such option"),
    ("tox -e lint -- --fix", "takes no arguments"),
    ("tox run verify", "a tox command is"),
    ("pip install shardproof[flash]", "no extra flash"),
    ("pip install --upgrade shardproof", "--upgrade"),
    ("python -m pip uninstall tox", "no `pip install`"),
    ("pip install -c no_such.txt -e .", "no no_such.txt"),
    ("uv pip compile --upgrade no_such.toml", "no no_such.toml"),
    ("torchrun --nodes N -m harness verify", "unrecognized arguments"),
    ("torchrun --nnodes 2 -m harness verify --tps 2", "No such option"),
    ("mypy engin", "no engin"),
    ("make test", "nobody here knows"),
])
def test_a_command_that_is_not_taken_is_noticed(line: str, problem: str) -> None:
    (wrong,), _ = look_at(list(in_page("page.md", f"Type this:\n```console\n$ {line}    # and see\nwhat it says\n```\n")))
    assert wrong.startswith(f"page.md: {line}")
    assert problem in wrong


@pytest.mark.parametrize(("text", "lines"), [
    ("`make test -j2` or `tox -e test`", ["make test -j2", "tox -e test"]),
    ("``shardproof verify | faults | …``", ["shardproof verify", "shardproof faults"]),
    ("`python -m tests.benchmarks.kernels_gpu [--sweep]`", ["python -m tests.benchmarks.kernels_gpu --sweep"]),
    ("`bench --rounds` measures `x - y` and `tp_size = 2`", ["bench --rounds"]),
])
def test_commands_are_told_from_other_code_in_a_text(text: str, lines: list[str]) -> None:
    assert [command.line for command in in_text("page.md", text)] == lines


@pytest.mark.parametrize(("line", "right"), [
    ("shardproof generate", True), ("bench --rounds", True), ("bench --round-s", False), ("make test -j2", False),
])
def test_a_text_may_name_a_command_without_what_must_follow(line: str, right: bool) -> None:
    wrong, _ = look_at([Printed("page.md", line, inline=True)])
    assert (wrong == []) == right


@pytest.mark.parametrize(("right", "wrong", "problem"), [
    ("tox -e verify", "tox -e verfiy", "no tox environment verfiy"),
    ("--tp 1 --against", "--tp 1 --aganst", "--aganst"),
    ("-m harness compare", "-m harness compare-to", "no command compare-to"),
    ("--workload w1", "--work-load w1", "--work-load"),
])
def test_a_slip_in_the_workflow_would_be_noticed(right: str, wrong: str, problem: str) -> None:
    text = CI.read_text()
    assert right in text
    found, _ = look_at(list(in_page(CI.name, text.replace(right, wrong))))
    assert any(problem in line for line in found)


def test_the_workflow_knows_its_events_and_needs_no_action_but_githubs_own() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", CI.read_text(), re.DOTALL)
    workflow = yaml.safe_load(block)
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads "on" as true
    assert set(workflow["jobs"]) == {"cpu", "gpu"}
    used = re.findall(r"uses: (\S+)", block)
    assert used
    assert all(name.startswith("actions/") for name in used)


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

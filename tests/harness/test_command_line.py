"""What people expect of a command line: help at once, versions, JSON, quiet, lists, progress without a terminal, signals."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from engine.ranks import forking
from harness.checks import all_checks
from harness.checks.base import Outcome
from harness.cli import app
from harness.commands.options import begin_ranks
from harness.faults import FAULTS
from harness.machine import run_info
from harness.subjects.engine import EngineSubject
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import VerifyPlan, _options, verify
from reference.hf import Reference
from reports.records import read_report
from reports.tables import checks_pivot
from tests.harness.checking import check_of
from tests.harness.conftest import MakeModel
from tests.harness.installed import ROOT, environment
from tests.harness.test_exit_codes import run
from tests.harness.test_packages import assert_told, make_foreign
from tests.reference.tiny import small_config
from tests.reports.builders import a_check

HEAVY = ("torch", "transformers", "numpy", "pandas", "safetensors", "engine", "reference", "reports")


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> Path:
    return tiny_model(small_config("llama", num_q_heads=4, num_kv_heads=2))


# Light


LOOK = """
import sys
from harness.cli import main
sys.argv = ["shardproof", *sys.argv[1:]]
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
print("@@", *(name for name in sys.modules if "." not in name))
"""


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], *([name, "--help"] for name in (
    "verify", "faults", "generate", "fetch", "bench", "compare", "calibrate"))], ids=" ".join)
def test_help_loads_nothing_heavy_and_takes_little_time(words: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", LOOK, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    shown, _, modules = result.stdout.partition("@@ ")
    assert shown.strip()
    assert not set(HEAVY) & set(modules.split())
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 3, "1 s on a machine that has nothing else to do"


def test_a_mistake_in_the_numbers_is_told_before_torch_is_loaded() -> None:
    script = ("import sys\nfrom typer.testing import CliRunner\nfrom harness.cli import app\n"
              "result = CliRunner().invoke(app, ['faults', '--no-such'])\nprint(result.exit_code, 'torch' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "2 False\n", result.stderr


BEGUN = """
import sys
import engine.ranks.forking as forking

def start(tp_size, preload=()):
    print(tp_size, "torch" in sys.modules)
    raise SystemExit

forking.start_fork_server = start
from harness.cli import main
sys.argv = ["shardproof", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("words", [["verify", "no-such-model", "--tp", "1,2"], ["generate", "no-such", "text", "--tp", "2"]],
                         ids=lambda words: words[0])
def test_what_ranks_are_forked_from_begins_to_load_before_the_command_loads_torch(words: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", BEGUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "2 False\n"), result.stderr


@pytest.mark.parametrize(("tp_sizes", "fabric", "launched", "begun"), [
    ((1, 2), "auto", False, [2]), ((3,), "gloo", False, [3]), ((2,), "nccl", False, [2]),
    ((1,), "auto", False, []), ((2,), "threads", False, []), ((2,), "auto", True, []),
])
def test_it_begins_where_ranks_may_be_processes_of_ours_alone(
    tp_sizes: tuple[int, ...], fabric: str, launched: bool, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(forking, "start_fork_server", lambda tp_size, preload: asked.append(tp_size))
    if launched:  # by torchrun
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    begin_ranks(tp_sizes, fabric, preload=())
    assert asked == begun


# Expected


def test_the_version_is_the_projects_own_everywhere() -> None:
    version = run_info("verify", started_at=datetime.now(UTC), seed=0).version
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert run("--version").stdout == f"shardproof {version}\n"


def test_json_alone_is_on_standard_output(model: Path, tmp_path: Path) -> None:
    words = ("verify", model, "--tp", "2", "--fabric", "threads", "--check", "collectives", "--json", "--out", tmp_path)
    result = run(*words)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text())
    assert "[1/1] tp 2  collectives  pass" in result.stderr
    assert run(*words, "--quiet").stderr == ""
    refused = run(*words, "--tp", "x")
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_quiet_prints_what_is_wrong_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("verify", model, "--tp", "1", "--check", "collectives", "--check", "lifecycle", "--quiet", "--out", tmp_path)
    result = run(*words)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert len(read_report(tmp_path).checks) == 2
    monkeypatch.setitem(all_checks(), "collectives", check_of(
        lambda context: Outcome(cases=1, compared=1, finding="planted"), name="collectives"))
    result = run(*words)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "FINDING in collectives at tp_size=1: planted" in result.stdout
    assert "lifecycle" not in result.stdout


def test_faults_are_listed_with_what_they_are_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("faults", "--list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[::2] == list(FAULTS)
    assert lines[1::2] == [f"    {fault.what}" for fault in FAULTS.values()]
    assert run("faults", "--list", "--only", "reduced-twice").stdout.splitlines()[0] == "reduced-twice"
    assert run("faults", "--list", "--only", "none").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_shell_completes_commands_options_and_names() -> None:
    def completed(words: str) -> list[str]:
        result = CliRunner().invoke(app, [], prog_name="shardproof", env={
            "_SHARDPROOF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)})
        return result.stdout.split()

    assert "verify" in completed("shardproof ver")
    assert "--check" in completed("shardproof verify --che")
    assert completed("shardproof verify --check l") == ["layers", "logits", "lifecycle"]
    assert "--install-completion" in run("--help").stdout


def test_a_long_run_says_how_far_it_is_without_a_terminal(model: Path, tmp_path: Path) -> None:
    result = run("verify", model, "--tp", "1,2", "--fabric", "threads", "--check", "collectives", "--check", "weights",
                 "--check", "kv", "--out", tmp_path, "--check", "layers")
    lines = result.stderr.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [f"[{number}/8]" for number in range(1, 9)]
    assert all("left" in line for line in lines[:-1])
    assert "left" not in lines[-1]


# Nothing is computed that nobody asked for


@pytest.mark.parametrize("check", ["collectives", "weights", "kv", "layers"])
def test_a_check_that_needs_no_reference_loads_none(check: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needless(*args: object, **kwargs: object) -> None:
        raise AssertionError("nobody asked for a reference")

    monkeypatch.setattr(Reference, "load", needless)
    report = verify(VerifyPlan(model="tiny", folder=model, tp_sizes=(2,), fabric="threads", checks=(check,)))
    assert {row.verdict for row in report.checks} == {"pass"}


def test_collectives_load_no_model_and_no_tokenizer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needless(*args: object, **kwargs: object) -> None:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(EngineSubject, "load", needless)
    monkeypatch.setattr(ReferenceResults, "prompts", property(needless))
    report = verify(VerifyPlan(model="tiny", folder=model, tp_sizes=(2,), fabric="threads", checks=("collectives",)))
    assert [row.verdict for row in report.checks] == ["pass"]


def test_the_cache_is_as_large_as_what_is_generated_asks_for(model: Path) -> None:
    results = ReferenceResults(model, dtype="float32")
    longest = [*map(len, results.schedule.sequences), *map(len, results.greedy_sequences)]
    assert _options(results)["num_kv_blocks"] == sum(-(-(length + 1) // 16) for length in longest) + 1


# Words


def test_a_bound_of_rounding_is_no_near_miss(model: Path, tmp_path: Path) -> None:
    result = run("verify", model, "--tp", "2", "--fabric", "threads", "--check", "collectives", "--check", "layers", "--out",
                 tmp_path)
    collectives, layers = result.stdout.splitlines()[2:4]
    assert collectives.endswith("(≤1)")
    assert "≤" not in layers
    assert "(≤1): a bound that right sums reach" in result.stdout
    for name in ("report.md", "report.html"):
        assert "(≤1)" in (tmp_path / name).read_text()
    rows = [a_check("collectives", 2, error_over_budget=0.996, extra={"bound": "rounding"}),
            a_check("collectives", 4, "finding", error_over_budget=1.5, extra={"bound": "rounding"})]
    assert checks_pivot(rows)[["tp 2", "tp 4"]].iloc[0].tolist() == ["pass 0.996 (≤1)", "finding 1.5"]


def test_a_skip_says_what_would_run_it(model: Path, tmp_path: Path) -> None:
    result = run("verify", model, "--tp", "1,3", "--fabric", "threads", "--check", "collectives", "--check", "lifecycle",
                 "--out", tmp_path)
    assert "it runs at tp_size=2" not in result.stdout
    assert result.stdout.count("SKIPPED in lifecycle at tp_size=1, 3: it is for tp_size=2 alone (--tp 2)") == 1


# Signals


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "harness", *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"})


@pytest.mark.multirank
@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code", "fabric"), [
    (signal.SIGINT, 3, "threads"), pytest.param(signal.SIGINT, 3, "gloo", marks=pytest.mark.endurance),
    pytest.param(signal.SIGTERM, 143, "gloo", marks=pytest.mark.endurance)])
def test_a_signal_in_verify_leaves_the_report_of_what_was_finished_and_nothing_else(
    number: signal.Signals, code: int, fabric: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    process = start("verify", model, "--tp", "2", "--fabric", fabric, "--check", "collectives", "--check", "lifecycle",
                    "--out", tmp_path / "out")
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "[1/2] tp 2  collectives  pass" in line, line + process.stderr.read()
        time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert [row.verdict for row in read_report(tmp_path / "out").checks] == ["pass", "error"]
    assert "interrupted: the report holds what was finished" in stderr
    assert family or fabric == "threads"
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert list(scratch.iterdir()) == []


# Someone else's packages


def test_the_study_of_compare_names_what_is_not_ours(tmp_path: Path) -> None:
    found = make_foreign(tmp_path, "engine.py")
    result = subprocess.run([sys.executable, "-m", "harness.studies.aa", "--help"], cwd=tmp_path, env=environment(ROOT),
                            capture_output=True, text=True, timeout=120)
    assert_told(result, "engine", found)


@pytest.mark.endurance
def test_the_study_of_compare_ends_with_2_on_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "harness.studies.aa", "--model", "", "--out", str(tmp_path / "file")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert "no report can be written there" in result.stderr



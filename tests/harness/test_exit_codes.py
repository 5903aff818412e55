"""Exit 1 means a finding or a regression and nothing else: every mistake, in every command that can make it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import harness.verification.verify
from engine.parallel.parameter import CheckpointError as EnginesCheckpointError
from harness.checks import all_checks
from harness.checks.base import CheckContext, Outcome
from harness.cli import app
from harness.faults import run as fault_run
from harness.subjects import on_ranks
from harness.subjects.engine_rank import EngineRank
from reference.checkpoints import CheckpointError
from reports.records import read_report, whole_checks, write_report
from tests.harness.checking import check_of
from tests.harness.conftest import MakeModel
from tests.reference.tiny import small_config
from tests.reports.builders import a_bench, a_report

WORKS: dict[str, tuple[str, ...]] = {
    "verify": ("verify", "MODEL", "--tp", "2", "--fabric", "threads", "--check", "collectives"),
    "faults": ("faults", "--only", "reduced-twice"),
    "generate": ("generate", "MODEL", "text", "--device", "cpu"),
    "fetch": ("fetch", "MODEL"),
    "bench": ("bench", "MODEL", "--device", "cpu"),
    "calibrate": ("calibrate", "--models", "1"),
    "compare": ("compare", "RECORD", "RECORD"),
    "verdict": ("verdict", "MODEL", "MODEL", "--fabric", "threads"),
}
"""A right command line of each command, but for the folder it writes to."""
WRITES = ("verify", "faults", "bench", "calibrate", "compare", "verdict")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> Path:
    return tiny_model(small_config("llama", num_q_heads=4, num_kv_heads=2))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return write_report(tmp_path / "record", a_report(a_bench()))


def words_of(command: str, model: Path, record: Path) -> list[str]:
    names = {"MODEL": str(model), "RECORD": str(record)}
    return [names.get(word, word) for word in WORKS[command]]


def assert_one_line(result: Result, code: int, says: str) -> None:
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


INSIDE = {
    "verify": "harness.verification.verify.ReferenceResults", "faults": "harness.faults.run.FaultPlan.cases",
    "generate": "engine.llm.Stream.__next__",
    "fetch": "reference.checkpoints.resolve", "bench": "harness.bench.bench.Workers.get",
    "calibrate": "harness.studies.calibrate.run.CalibratePlan.tasks", "compare": "harness.bench.cli.write_comparison",
    "verdict": "harness.verdict.verdict.align",
}
"""What each command calls in the middle of its work."""


def plant(monkeypatch: pytest.MonkeyPatch, command: str, error: BaseException) -> None:
    """Have the command's work raise."""
    def planted(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(INSIDE[command], planted)
    # The tiny model has no tokenizer.
    monkeypatch.setattr("engine.frontend.requests.read_prompt", lambda prompt, tokenizer: (None, [1, 2]))


def replaced(words: list[str], option: str, value: str) -> list[str]:
    """With another value for the option, or the option with it."""
    if option in words:
        place = words.index(option) + 1
        return [*words[:place], value, *words[place + 1 :]]
    return [*words, option, value]


# (mistake, option or place, value, exit code, what the line says), for the commands that can make it
MISTAKES: list[tuple[tuple[str, ...], str, str, int, str]] = [
    (("verify", "faults", "bench"), "--tp", "x", 2, "tp='x' must be numbers"),
    (("verify", "faults", "bench"), "--tp", "", 2, "tp='' must be numbers"),
    (("verify", "faults", "bench"), "--tp", "2,,3", 2, "tp='2,,3' must be numbers"),
    (("verify", "faults", "bench"), "--tp", "2,2", 2, "2"),
    (("verify", "faults", "bench"), "--tp", "3,2,3", 2, "3"),
    (("verify", "faults", "bench"), "--tp", "0", 2, "0"),
    (("verify", "faults", "bench"), "--tp", "-2", 2, "-2"),
    (("verify", "bench"), "--tp", "5", 2, "num_q_heads=4"),
    (("generate",), "--tp", "5", 2, "num_q_heads=4"),
    (("generate",), "--tp", "0", 2, "must be a whole number of at least 1"),
    (("verify", "generate", "bench"), "--dtype", "int8", 2, "dtype='int8' is unknown"),
    (("verify", "generate", "bench"), "--fabric", "pigeon", 2, "fabric='pigeon' is"),
    (("verify", "faults", "generate", "bench"), "--device", "tpu", 2, "device='tpu'"),
    (("verify", "faults", "generate", "bench"), "--device", "cuda", 3, "device='cuda', but torch sees no GPU"),
    (("verify",), "--check", "taste", 2, "['taste'] are unknown"),
    (("faults",), "--only", "taste", 2, "['taste'] are no faults"),
    (("bench",), "--workload", "taste", 2, "['taste'] are unknown"),
    (("bench",), "--peer", "taste", 2, "['taste'] are unknown"),
    (("bench",), "--rounds", "0", 2, "rounds=0 must be at least 1"),
    (("bench",), "--against", "/nowhere", 2, "against=/nowhere"),
    (("calibrate",), "--models", "0", 2, "models=0 must be at least 1"),
    (("generate",), "--temperature", "-1", 2, "temperature=-1.0 must"),
    (("generate",), "--max-tokens", "0", 2, "max_tokens=0 must"),
    (("generate",), "--top-p", "2", 2, "top_p=2.0 must"),
    (("generate",), "--top-k", "-2", 2, "top_k=-2 must"),
    (("generate",), "--stop", "", 2, "none of them empty"),
    (("generate",), "--n", "0", 2, "n=0 must"),
    (("generate",), "--n", "2", 2, "greedy completions are all the same"),
    (("generate",), "--seed", "-1", 2, "seed=-1 must"),
    (("verify", "generate", "fetch", "bench"), "MODEL", "", 2, "model='' names nothing"),
    (("verify", "generate", "fetch", "bench"), "MODEL", "/nowhere/at all", 3, "/nowhere/at all"),
    (("compare",), "RECORD", "/nowhere/at all", 3, "/nowhere/at all"),
    (("verify",), "--case", "/nowhere/at all", 3, "/nowhere/at all"),
]


@pytest.mark.parametrize(("command", "option", "value", "code", "says"), [
    (command, *rest) for commands, *rest in MISTAKES for command in commands])
def test_a_mistake_is_one_line_with_one_exit_code_in_every_command(
    command: str, option: str, value: str, code: int, says: str, model: Path, record: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command not in ("fetch", "generate"):
        plant(monkeypatch, command, AssertionError("work was done"))
    if option in ("MODEL", "RECORD"):
        words = [value if word == option else word for word in WORKS[command]]
        words = [str(model) if word == "MODEL" else word for word in words]
    else:
        words = replaced(words_of(command, model, record), option, value)
    out = ["--out", str(tmp_path / "out")] if command in WRITES else []
    assert_one_line(run(*words, *out), code, says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "option"), [("verify", "--check"), ("faults", "--only"), ("bench", "--workload"),
                                                 ("bench", "--peer")])
def test_what_is_named_twice_is_refused_before_work(command: str, option: str, model: Path, record: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, command, AssertionError("work was done"))
    value = {"--check": "collectives", "--only": "reduced-twice", "--workload": "quick", "--peer": "transformers"}[option]
    words = [*replaced(words_of(command, model, record), option, value), option, value, "--out", str(tmp_path / "out")]
    assert_one_line(run(*words), 2, value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", WORKS)
@pytest.mark.parametrize("words", [["--no-such-option"], ["--seed"], ["a", "b", "c", "d"]])
def test_what_the_parser_refuses_ends_with_2(command: str, words: list[str]) -> None:
    result = run(command, *words)
    assert (result.exit_code, result.stdout) == (2, "")


# Where the report goes


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "deep" / "er"


def a_folder_named_as_the_report(folder: Path) -> Path:
    (folder / "out" / "report.json").mkdir(parents=True)
    return folder / "out"


def below_a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / "out"


def nowhere_by_a_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


def where_nobody_writes(folder: Path) -> Path:
    return Path("/proc/shardproof/out")


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


OUTS = [a_file, below_a_file, a_folder_named_as_the_report, below_a_loop, nowhere_by_a_link, where_nobody_writes, too_long]


@pytest.mark.parametrize("command", WRITES)
@pytest.mark.parametrize("make", OUTS)
def test_where_no_report_can_be_written_no_work_is_done(command: str, make: Callable[[Path], Path], model: Path, record: Path,
                                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, command, AssertionError("work was done"))
    out = make(tmp_path)
    assert_one_line(run(*words_of(command, model, record), "--out", out), 2, f"out={str(out)!r}: no report can be written there")


def test_an_older_report_does_not_pass_for_that_of_a_run_without_one(model: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    words = [str(model) if word == "MODEL" else word for word in WORKS["verify"]]
    assert run(*words, "--out", out).exit_code == 0
    green = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert set(green) == {"report.json", "report.md", "report.html", "report.csv"}

    def dies(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(harness.verification.verify, "ReferenceResults", dies)
    assert run(*words, "--out", out).exit_code == 4
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        name.replace("report.", "report.old."): text for name, text in green.items()}
    monkeypatch.undo()
    assert run(*words, "--tp", "x", "--out", out).exit_code == 2
    assert len(list(out.iterdir())) == 4, "wrong usage leaves all as it was"


def test_the_table_is_printed_before_the_report_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reports.render.write_report", full)
    result = run(*[str(model) if word == "MODEL" else word for word in WORKS["verify"]], "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "collectives  pass" in result.stdout
    assert f"out={str(tmp_path / 'out')!r}: the report was not written" in result.stderr
    assert "No space left" in result.stderr


def test_a_reader_who_leaves_does_not_cost_the_report(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **kwargs: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("reports.text_tables.to_text", gone)
    result = run(*[str(model) if word == "MODEL" else word for word in WORKS["verify"]], "--out", tmp_path)
    assert result.exit_code == 3
    assert "Traceback" not in result.stderr
    assert [row.verdict for row in read_report(tmp_path).checks] == ["pass"]


# What goes wrong inside


def raises(context: CheckContext) -> Outcome:
    raise ValueError("planted deep inside\nwith a second line")


def test_an_exception_inside_a_check_is_an_error_row_and_the_others_go_on(model: Path, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch,
                                                                          caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(all_checks(), "weights", check_of(raises))
    result = run("verify", model, "--tp", "1,2", "--fabric", "threads", "--check", "collectives", "--check", "weights",
                 "--check", "kv", "--out", tmp_path)
    assert result.exit_code == 3, result.output
    rows = whole_checks(read_report(tmp_path).checks)
    assert [(row.tp_size, row.check, row.verdict) for row in rows] == [
        (tp_size, check, verdict) for tp_size in (1, 2)
        for check, verdict in (("collectives", "pass"), ("weights", "error"), ("kv", "pass"))]
    row = rows[1]
    assert row.message == "ValueError: planted deep inside"
    assert "in raises" in row.extra["traceback"]
    assert result.stdout.count("ERROR in weights at tp_size=1, 2: ValueError: planted deep inside") == 1
    assert "in raises" in caplog.text, "main() shows it on standard error"


@pytest.mark.parametrize("others", ["finding", "pass"])
def test_a_finding_beside_an_error_stays_visible(others: str, model: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(all_checks(), "weights", check_of(raises))
    if others == "finding":
        monkeypatch.setitem(all_checks(), "collectives", check_of(
            lambda context: Outcome(cases=1, compared=1, finding="planted"), name="collectives"))
    words = ("--check", "collectives", "--check", "weights")
    result = run("verify", model, "--tp", "1", *words, "--out", tmp_path)
    assert result.exit_code == (1 if others == "finding" else 3)


INF = float("inf")


@pytest.mark.parametrize("extra", [{"tie_margin": INF}, {"deep": [{"x": -INF}]}])
def test_a_figure_that_is_not_finite_is_kept(extra: dict[str, Any], model: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(all_checks(), "weights", check_of(lambda context: Outcome(cases=1, compared=1, extra=extra)))
    assert run("verify", model, "--tp", "1", "--check", "weights", "--out", tmp_path).exit_code == 0
    assert read_report(tmp_path).checks[0].extra == extra


@pytest.mark.parametrize("values", [{"error_over_budget": -1.0}, {"rank": 7}, {"excused": 2.0}])
@pytest.mark.parametrize("is_finding", [True, False])
def test_a_value_that_no_record_holds_does_not_lose_the_run(values: dict[str, Any], is_finding: bool, model: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(cases=1, compared=1, finding="planted" if is_finding else None, **values)
    monkeypatch.setitem(all_checks(), "weights", check_of(lambda context: outcome))
    result = run("verify", model, "--tp", "1", "--check", "collectives", "--check", "weights", "--out", tmp_path)
    assert result.exit_code == (1 if is_finding else 3), result.exception
    rows = read_report(tmp_path).checks
    assert [row.verdict for row in rows] == ["pass", "finding" if is_finding else "error"]
    assert next(iter(values)) in rows[1].extra["left_out"]


@pytest.mark.parametrize("command", WORKS)
def test_what_nobody_expected_ends_with_its_traceback_and_4(command: str, model: Path, record: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, command, ValueError("planted deep inside"))
    out = ["--out", str(tmp_path / "out")] if command in WRITES else []
    result = run(*words_of(command, model, record), *out)
    assert result.exit_code == 4, result.output
    assert "Traceback (most recent call last)" in result.stderr
    assert "ValueError: planted deep inside" in result.stderr
    assert "please report it" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", WORKS)
def test_ctrl_c_anywhere_is_one_line_and_3(command: str, model: Path, record: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, command, KeyboardInterrupt())
    out = ["--out", str(tmp_path / "out")] if command in WRITES else []
    result = run(*words_of(command, model, record), *out)
    assert (result.exit_code, result.stderr) == (3, "interrupted\n")
    if command != "compare":  # which tells before it writes
        assert result.stdout == ""


# A checkpoint that can't be loaded


def test_a_checkpoint_that_ranks_refuse_is_one_line_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise EnginesCheckpointError("tensor=planted is of no use")

    monkeypatch.setattr(EngineRank, "load", refuse)
    for tp in ("1,2", "2"):
        result = run("verify", model, "--tp", tp, "--fabric", "threads", "--check", "collectives", "--check", "weights",
                     "--check", "logits", "--out", tmp_path / "out")
        assert_one_line(result, 3, "tensor=planted is of no use")
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_a_check_refuses_is_an_error_of_that_check(model: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(context: CheckContext) -> Outcome:
        raise CheckpointError("tensor=planted is of no use")

    monkeypatch.setitem(all_checks(), "weights", check_of(refuse))
    result = run("verify", model, "--tp", "1,2", "--fabric", "threads", "--check", "collectives", "--check", "weights",
                 "--out", tmp_path)
    assert result.exit_code == 3
    assert [row.verdict for row in read_report(tmp_path).checks] == ["pass", "error", "pass", "error"]
    assert result.stdout.count("tensor=planted is of no use") == 1
    assert "Traceback" not in result.output


def test_ranks_that_cannot_start_are_the_reason_of_what_is_missing(model: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    real = on_ranks.Ranks

    def none_at_2(tp_size: int, **options: Any) -> Any:
        if tp_size == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(tp_size, **options)

    monkeypatch.setattr(on_ranks, "Ranks", none_at_2)
    words = ("verify", model, "--fabric", "threads", "--check", "collectives", "--out", tmp_path)
    result = run(*words, "--tp", "1,2,3")
    assert result.exit_code == 3
    assert [row.verdict for row in read_report(tmp_path).checks] == ["pass", "error", "error"]
    assert "Too many open files" in result.stdout
    assert_one_line(run(*words, "--tp", "2"), 3, "Too many open files")


# The same in faults


@pytest.mark.multirank
@pytest.mark.slow
def test_exceptions_in_faults_are_error_rows_and_the_other_faults_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fault_run.checks_of
    monkeypatch.setitem(all_checks(), "weights", check_of(raises))
    quick = {name: all_checks()[name] for name in ("collectives", "weights")}
    monkeypatch.setattr(fault_run, "all_checks", lambda: quick)

    def raises_once(fault: Any) -> list[str]:
        if fault.name == "minimum-became-a-sum":
            raise KeyError("planted beside the checks")
        return real(fault)

    monkeypatch.setattr(fault_run, "checks_of", raises_once)
    only = ("minimum-became-a-sum", "one-barrier-more")
    result = run("faults", *(word for name in only for word in ("--only", name)), "--out", tmp_path)
    assert result.exit_code == 3, result.output
    rows = {row.fault: row for row in read_report(tmp_path).checks}
    assert [rows[name].verdict for name in only] == ["error", "error"]
    assert "KeyError: 'planted beside the checks'" in rows[only[0]].message
    assert "in raises_once" in rows[only[0]].extra["traceback"]
    assert rows[only[1]].message == "checks raised instead of answering: weights: ValueError: planted deep inside"
    assert "in raises" in rows[only[1]].extra["traceback of weights"]
    assert rows[only[1]].compared == 1, "collectives went on"

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.records import BenchRow, CheckRow, Machine, Report, read_report, write_report
from reports.render import write_all
from reports.tables import checks_pivot
from reports.text_tables import to_text
from reports.typed_json import RecordError
from tests.reports.builders import CPU, GPU, a_bench, a_check, a_report, a_run

texts = st.text(max_size=20)
names = st.text(min_size=1, max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
not_finite = st.sampled_from([math.inf, -math.inf, math.nan, float("nan")])
tempting = st.sampled_from(["inf", "-inf", "nan", "NaN", "Infinity", "float"])  # texts that could be taken for numbers
positive = st.floats(min_value=1e-9, max_value=1e12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | not_finite | texts | tempting,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | tempting, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def check_rows(draw: st.DrawFn) -> CheckRow:
    verdict = draw(st.sampled_from(["pass", "finding", "skipped", "error"]))
    tp_size = draw(st.integers(1, 8))
    errors = st.floats(0, 1) if verdict == "pass" else st.floats(min_value=0) | not_finite.filter(lambda error: not error < 0)
    return a_check(
        draw(names),
        tp_size,
        verdict,
        kind=draw(st.just("") | texts),
        cases=draw(st.integers(0, 10**6)),
        compared=draw(st.integers(1 if verdict == "pass" else 0, 10**12)),
        error_over_budget=draw(st.none() | errors),
        rank=draw(st.none() | st.integers(0, tp_size - 1)),
        module=draw(st.none() | texts),
        message=draw(texts) + ("" if verdict == "pass" else "why"),
        excused=draw(st.none() | st.floats(0, 1)),
        extra=draw(st.dictionaries(texts, json_values, max_size=3)),
    )


def test_a_row_from_before_there_were_kinds_has_none(tmp_path: Path) -> None:
    path = write_report(tmp_path, a_report(a_check()))
    path.write_text(path.read_text().replace('"kind": "", ', ""))
    assert '"kind"' not in path.read_text()
    assert read_report(path).checks == [a_check()]


@st.composite
def bench_rows(draw: st.DrawFn) -> BenchRow:
    units = st.sampled_from(["output_tokens_per_s", "ttft_ms", "step_us", "peak_gib", "sent_bytes"])
    samples = st.dictionaries(units, st.lists(positive, min_size=1, max_size=5), min_size=1, max_size=3)
    return a_bench(draw(names), draw(st.integers(1, 8)), samples=draw(samples), axes=draw(st.dictionaries(texts, finite)))


reports = st.builds(
    Report,
    run=st.builds(
        a_run,
        argv=st.lists(texts, max_size=3),
        commit=st.none() | texts,
        dirty=st.booleans(),
        seed=st.none() | st.integers(),
        machine=st.sampled_from([Machine(**CPU), Machine(**CPU, instruction_set="AVX2"), Machine(**GPU)]),
        switches=st.dictionaries(texts, json_values, max_size=3),
        version=st.none() | texts,
    ),
    checks=st.lists(check_rows(), max_size=4, unique_by=lambda row: row.key),
    benches=st.lists(bench_rows(), max_size=3, unique_by=lambda row: row.key),
)


@given(report=reports)
@settings(deadline=None, max_examples=80)
def test_a_report_comes_back_from_its_file_as_it_went_in(report: Report, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("report")
    path = write_report(folder, report)
    assert read_report(path) == report
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_figure_that_is_not_finite_is_kept_and_never_taken_for_a_text(value: float, tmp_path: Any) -> None:
    extra = {"tie_margin": value, "texts": [str(value), {"float": "not a number"}], "inside": [{"a": [value]}]}
    try:
        path = write_report(tmp_path, a_report(a_check(extra=extra)))
    except RecordError as error:
        pytest.fail(f"the run is lost: {error}")
    (row,) = read_report(path).checks
    assert repr(row.extra) == repr(extra)  # a NaN equals nothing, and is written like any other


def test_an_error_that_is_no_number_is_a_finding_that_every_form_shows(tmp_path: Any) -> None:
    try:
        report = a_report(a_check("logits", verdict="finding", error_over_budget=math.nan))
    except RecordError as error:
        pytest.fail(f"the run is lost: {error}")
    paths = write_all(report, tmp_path)
    assert read_report(tmp_path) == report
    assert {suffix for suffix, path in paths.items() if "nan" in path.read_text().lower()} == {"json", "md", "html", "csv"}
    assert "finding NaN" in to_text(checks_pivot(report.checks))
    with pytest.raises(RecordError, match="a check over its budget has not passed"):
        a_check(error_over_budget=math.nan)


def test_a_record_from_before_versions_were_noted_can_be_read(tmp_path: Any) -> None:
    path = write_report(tmp_path, a_report(a_check()))
    data = json.loads(path.read_text())
    assert data["run"].pop("version", "no such field") is None
    path.write_text(json.dumps(data))
    assert read_report(path) == a_report(a_check())


def test_rows_are_written_one_a_line(tmp_path: Any) -> None:
    rows = [a_check("weights", tp_size) for tp_size in (1, 2, 4)]
    lines = write_report(tmp_path, a_report(*rows)).read_text().splitlines()
    assert [line for line in lines if '"check": "weights"' in line] == [line for line in lines if line.startswith("    {")]
    assert sum(line.startswith("    {") for line in lines) == 3


def test_an_infinite_error_and_a_lone_surrogate_survive_the_file(tmp_path: Any) -> None:
    row = a_check(verdict="finding", error_over_budget=math.inf, message="bytes \udc80 of a log")
    assert read_report(write_report(tmp_path, a_report(row))).checks == [row]


def test_a_record_keeps_its_own_copy_of_what_it_was_given() -> None:
    samples = {"ttft_ms": [1, 2]}
    row = a_bench(samples=samples)
    samples["ttft_ms"].append(3)
    assert row.samples == {"ttft_ms": [1.0, 2.0]}


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_check().verdict = "pass"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"verdict": "passed"},
            "verdict: must be one of 'pass', 'finding', 'skipped', 'error', got 'passed'",
        ),
        ({"compared": 0}, "compared=0: a check that compared nothing has not passed"),
        ({"error_over_budget": 1.01}, "a check over its budget has not passed"),
        ({"error_over_budget": math.nan}, "error_over_budget=nan: a check over its budget has not passed"),
        ({"error_over_budget": -0.1}, "cannot be negative"),
        ({"tp_size": 0}, "tp_size=0: must be at least 1"),
        ({"tp_size": True}, "tp_size: must be a whole number, got bool True"),
        ({"tp_size": 2.0}, "tp_size: must be a whole number, got float 2.0"),
        ({"rank": 2}, "rank=2: no such rank in tp_size=2"),
        ({"excused": 1.5}, "a share is between 0 and 1"),
        ({"seconds": math.inf}, "must be finite"),
        ({"cases": -1}, "cases=-1"),
        ({"check": ""}, "a check has a name"),
        ({"module": 3}, "module: must be a string, got int 3"),
        ({"verdict": "skipped", "message": " "}, "verdict='skipped' needs a reason"),
        ({"verdict": "finding", "message": ""}, "verdict='finding' needs a reason"),
        ({"extra": {"a": object()}}, r"extra\.a: must be a list, got object"),
        ({"extra": {3: 1}}, "extra: must be a string as its key"),
    ],
)
def test_a_check_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        a_check(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": {}}, "at least one metric"),
        ({"samples": {"ttft_ms": []}}, r"samples\.ttft_ms: has zero samples"),
        ({"samples": {"ttft_ms": [1.0, math.nan]}}, r"samples\.ttft_ms\[1\]: nan: a measurement is positive and finite"),
        ({"samples": {"ttft_ms": [1.0, 0.0]}}, r"samples\.ttft_ms\[1\]: 0\.0: a measurement is positive"),
        ({"samples": {"ttft_ms": [math.inf]}}, r"samples\.ttft_ms\[0\]: inf"),
        ({"samples": {"speed": [1.0]}}, r"samples\.speed: a metric's name ends in its unit"),
        ({"samples": {"ttft_ms": 3.0}}, r"samples\.ttft_ms: must be a list, got float"),
        ({"metrics": {"memory_gib": math.inf}}, r"metrics\.memory_gib: inf is not finite"),
        ({"first": {"ttft_ms": "1"}}, r"first\.ttft_ms: must be a number, got str"),
        ({"axes": {"batch_size": 10**400}}, r"axes\.batch_size: is too large"),
    ],
)
def test_a_benchmark_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        a_bench(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"started_at": "2026-01-31T12:00:00"}, "must be ISO 8601 in UTC"),
        ({"started_at": "2026-01-31T12:00:00+01:00"}, "must be ISO 8601 in UTC"),
        ({"started_at": "yesterday"}, "must be ISO 8601 in UTC"),
        ({"command": ""}, "a run has a command"),
        ({"machine": CPU | {"cores": 0}}, r"machine\.cores: cores=0"),
        ({"machine": {"type": "x"}}, "machine: Machine lacks cpu, cores, memory_gib"),
        ({"machine": CPU | {"colour": "red"}}, "machine: Machine has no field colour"),
        ({"machine": CPU | {"gpus": [{"name": "x"}]}}, r"machine\.gpus\[0\]: Gpu lacks driver"),
        ({"versions": {"torch": 2}}, r"versions\.torch: must be a string"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        a_run(**changes)


def test_two_rows_that_nobody_could_tell_apart_are_refused() -> None:
    with pytest.raises(RecordError, match=r"checks\[1\]: is the same row as checks\[0\]"):
        a_report(a_check(), a_check(seconds=3.0))
    with pytest.raises(RecordError, match=r"benches\[1\]: is the same row as benches\[0\]"):
        a_report(a_bench(), a_bench())


@pytest.mark.parametrize(
    ("rows", "exit_code"),
    [
        ([a_check()], 0),
        ([a_check(), a_check("kv", verdict="skipped")], 0),
        ([a_bench()], 0),
        ([a_check(), a_check("kv", verdict="finding")], 1),
        ([a_check("logits", verdict="error"), a_check("kv", verdict="finding")], 1),
        ([a_check(), a_check("kv", verdict="error")], 3),
        ([a_check(verdict="skipped")], 3),
        ([a_check(verdict="skipped"), a_bench()], 3),
        ([], 3),
    ],
)
def test_the_exit_code_says_whether_it_is_fine_found_something_or_could_not_run(rows: Any, exit_code: int) -> None:
    assert a_report(*rows).exit_code == exit_code


def test_records_can_be_written_where_neither_pandas_nor_torch_is_imported() -> None:
    heavy = {"pandas", "matplotlib", "jinja2", "torch"}
    code = f"import reports.records, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

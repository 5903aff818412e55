"""What a change of the code took from the checks is named, and what it did not is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.records import CheckRow, Report, write_report
from reports.same_power import RENAMED, compare, fewer_judged, lost_power, lost_tests
from tests.reports.builders import a_check, a_run


def report_of(seed: int, *rows: CheckRow) -> Report:
    return Report(run=a_run(command="faults", seed=seed), checks=list(rows))


def a_fault(name: str, *red: str, module: str | None = None, expected: str | None = None, control: bool = False) -> CheckRow:
    return a_check("faults", fault=name, tp_size=2, module=module,
                   extra={"patched": "layers", "red": dict.fromkeys(red, "off"), "control": control, "module_expected": expected})


def test_a_check_that_is_red_no_more_and_a_module_that_is_not_named_are_lost() -> None:
    before = [report_of(0, a_fault("one", "layers", "logits", module="norm", expected="norm"), a_fault("two", "kv"))]
    assert list(lost_power(before, before, {})) == []
    after = [report_of(0, a_fault("one", "logits", module="lm_head", expected="norm"))]
    assert list(lost_power(before, after, {})) == [
        "two at tp_size=2, seed=0: not planted any more", "one at tp_size=2, seed=0: layers no longer red",
        "one at tp_size=2, seed=0: names lm_head, it was norm"]


def test_a_control_that_turns_red_is_lost_and_more_red_is_not() -> None:
    before = [report_of(0, a_fault("right", control=True), a_fault("one", "kv"))]
    assert list(lost_power(before, [report_of(0, a_fault("right", control=True), a_fault("one", "kv", "logits"))], {})) == []
    (line,) = lost_power(before, [report_of(0, a_fault("right", "kv", control=True), a_fault("one", "kv"))], {})
    assert "a control that turns kv red" in line


def test_other_names_are_the_same_thing_and_the_later_report_of_a_seed_counts() -> None:
    names = {"checks": {"kv": "cache"}, "modules": {"norm": "final_norm"}}
    before = [report_of(0, a_fault("one")), report_of(0, a_fault("one", "kv", module="norm", expected="norm"))]
    assert list(lost_power(before, [report_of(0, a_fault("one", "cache", module="final_norm", expected="norm"))], names)) == []
    assert len(list(lost_power(before, [report_of(0, a_fault("one", "kv", module="norm", expected="norm"))], names))) == 2


def test_a_fault_that_older_records_name_as_a_model_is_the_same_one() -> None:
    old = a_check("faults", model="one", tp_size=2, extra=a_fault("one", "kv").extra)
    assert list(lost_power([report_of(0, old)], [report_of(0, a_fault("one", "kv"))], {})) == []


def test_fewer_cases_or_values_are_lost_kinds_taken_together() -> None:
    before = report_of(0, a_check("layers", tp_size=2, cases=9, compared=90), a_check("kv", tp_size=2, cases=4, compared=4))
    parts = [a_check("layers", kind=kind, tp_size=2, cases=5, compared=50) for kind in ("row", "column")]
    assert list(fewer_judged(before, report_of(0, *parts, a_check("kv", tp_size=2, cases=4, compared=4)), {})) == []
    lines = list(fewer_judged(before, report_of(0, parts[0]), {}))
    assert [line.partition(":")[0] for line in lines] == ["layers at tp_size=2", "kv at tp_size=2"]


def test_a_test_that_is_gone_needs_a_successor_that_is_there_or_a_reason() -> None:
    before = ["tests/a.py::test_one[x]", "tests/a.py::test_two", "tests/b.py::test_three", "tests/c.py::test_four"]
    names = {"tests": {"tests/a.py::test_two": "tests/a.py::test_deux", "tests/b.py": "tests/z.py",
                       "tests/c.py::test_four": "gone: nobody has such files any more"}}
    after = ["tests/a.py::test_one[y]", "tests/a.py::test_deux", "tests/z.py::test_three"]
    assert list(lost_tests(before, after, names)) == []
    assert len(list(lost_tests(before, after, {}))) == 3
    (line,) = lost_tests(before, after[:2], names)
    assert "its successor tests/z.py::test_three is not there" in line


def test_folders_are_held_against_each_other_and_half_a_pair_is_refused(tmp_path: Path) -> None:
    sides = [tmp_path / "before", tmp_path / "after"]
    with pytest.raises(ValueError, match="neither has faults, v or tests"):
        compare(*sides, {})
    for side in sides:
        write_report(side / "v", report_of(0, a_check("kv", tp_size=2)))
    (sides[0] / "tests").write_text("tests/a.py::test_one\n")
    with pytest.raises(ValueError, match="tests is in one of"):
        compare(*sides, {})
    (sides[1] / "tests").write_text("")
    lost, done = compare(*sides, {})
    assert (len(lost), done) == (1, "v, tests")


def test_what_a_run_before_left_in_the_folder_does_not_count(tmp_path: Path) -> None:
    for side, red in (("before", ("kv",)), ("after", ())):
        folder = tmp_path / side / "faults" / "0"
        write_report(folder, report_of(0, a_fault("one", "kv")))
        (folder / "report.json").rename(folder / "report.old.json")
        write_report(folder, report_of(0, a_fault("one", *red)))
    assert compare(tmp_path / "before", tmp_path / "after", {}) == (["one at tp_size=2, seed=0: kv no longer red"], "faults")


def test_the_committed_names_are_of_tests_that_are_there() -> None:
    import json

    root = RENAMED.parents[1]
    for successor in json.loads(RENAMED.read_text())["tests"].values():
        file, _, name = successor.partition("::")
        if not successor.startswith("gone: "):
            assert (root / file).is_file()
            assert name in (root / file).read_text()

"""A comparison for machines: JSON, and JUnit XML, which every CI can show."""

from __future__ import annotations

from xml.etree import ElementTree

from reports.compare import AtlasChange, CheckChange, Comparison, SpeedChange
from reports.metrics import label
from reports.tables import verdict_cell
from reports.text_tables import format_number, printable
from reports.typed_json import plain, to_json

_NOT_COMPARED = ("only in baseline", "only in candidate", "too noisy", "no longer compared")


def comparison_json(comparison: Comparison) -> str:
    """Every field of the comparison and its rows, one row a line, with its exit code."""
    head = {"format": "shardproof-comparison", "format_version": 1, "exit_code": comparison.exit_code}
    return to_json(head | plain(comparison)) + "\n"


def comparison_junit(comparison: Comparison) -> str:
    """One test case a row: regressions are failures, rows that could not be compared are skipped."""
    root = ElementTree.Element("testsuites", name="shardproof compare")
    failed = {id(change) for change in comparison.regressions}
    suites: tuple[tuple[str, list[SpeedChange | CheckChange | AtlasChange]], ...] = (
        ("checks", list(comparison.checks)),
        ("speed", list(comparison.speeds)),
        ("atlas", list(comparison.atlas)),
    )
    for name, changes in suites:
        if name == "atlas" and not changes:
            continue
        suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(changes)), errors="0")
        suite.set("failures", str(sum(id(change) in failed for change in changes)))
        suite.set("skipped", str(sum(change.verdict in _NOT_COMPARED for change in changes)))
        for change in changes:
            case = ElementTree.SubElement(suite, "testcase", classname=f"{name}.{_group(change)}", name=_name(change))
            if id(change) in failed:
                failure = ElementTree.SubElement(case, "failure", message=change.verdict)
                failure.text = printable(_detail(change))
            elif change.verdict in _NOT_COMPARED:
                ElementTree.SubElement(case, "skipped", message=change.verdict)
            elif change.verdict != "same":
                ElementTree.SubElement(case, "system-out").text = printable(f"{change.verdict}: {_detail(change)}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _group(change: SpeedChange | CheckChange | AtlasChange) -> str:
    if isinstance(change, AtlasChange):
        return printable(change.architecture)
    return printable(change.check if isinstance(change, CheckChange) else change.workload)


def _name(change: SpeedChange | CheckChange | AtlasChange) -> str:
    if isinstance(change, AtlasChange):
        return printable(f"{change.layout} {change.subject} {change.dtype} tp{change.tp_size}")
    layout = f"{change.model} {change.dtype} {change.fabric} tp{change.tp_size}"
    if isinstance(change, CheckChange):
        return printable(f"{change.name} {layout}")
    return printable(f"{change.case} {change.engine} {layout} {change.metric}")


def _detail(change: SpeedChange | CheckChange | AtlasChange) -> str:
    if isinstance(change, CheckChange | AtlasChange):
        replay = f"\nRun it again: {change.replay}" if change.replay else ""
        before = verdict_cell(change.baseline or "absent", change.baseline_error)
        sides = f"{before} before, {verdict_cell(change.candidate or 'absent', change.candidate_error)} now"
        return f"{sides}\n{change.message}{replay}"
    values = (change.baseline_median, change.candidate_median, change.gain, change.low, change.high)
    before, after, gain, low, high = (format_number(value) if value is not None else "–" for value in values)
    return f"{label(change.metric)}: {before} before, {after} now; times better {gain}, between {low} and {high}"

"""The file format between harness and reports: the only place that knows it.

A report is one JSON file: what ran (`RunInfo`), one row a check and layout (`CheckRow`; of some checks one
a kind of case), one row a benchmark case (`BenchRow`), one row for each that was asked for and has no
figures (`NotMeasured`), and of a calibration how far correct code is off and what is seen of planted errors
(`Calibration`). Rows are written one a line, so that a diff of two reports reads row by row. Everything is
checked when it is made, by the same rules in Python and from a file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reports.files import write_whole
from reports.rows import (
    VERDICTS,
    BenchRow,
    Calibration,
    CheckRow,
    ErrorRow,
    Gpu,
    Machine,
    NotMeasured,
    PowerRow,
    Record,
    RunInfo,
    Tolerance,
    Verdict,
    refuse_twins,
    whole_checks,
)
from reports.typed_json import RecordError, conform, plain

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "FORMAT_VERSION",
    "VERDICTS",
    "BenchRow",
    "Calibration",
    "CheckRow",
    "ErrorRow",
    "Gpu",
    "Machine",
    "NotMeasured",
    "PowerRow",
    "RecordError",
    "Report",
    "RunInfo",
    "Tolerance",
    "Verdict",
    "read_report",
    "whole_checks",
    "write_report",
]

FORMAT = "shardproof-report"
FORMAT_VERSION = 1
FILE_NAME = "report.json"
LARGEST_FILE = 64 * 2**20
"""Bytes that are read at most; a whole calibration has a third of a million."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Record):
    """A run and its rows. Two rows of one kind with one ``key`` are refused: nobody could tell them apart."""

    run: RunInfo
    checks: list[CheckRow] = field(default_factory=list)
    benches: list[BenchRow] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)
    calibration: Calibration | None = None

    def _check(self) -> None:
        refuse_twins("checks", (row.key for row in self.checks))
        refuse_twins("benches", (row.key for row in self.benches))

    @property
    def exit_code(self) -> int:
        """0 fine; 1 a finding; 3 could not run: an error, checks that compared nothing, or no row at all.

        A finding is told even where something else could not run.
        """
        verdicts = {row.verdict for row in self.checks} | {row.verdict for row in self.not_measured}
        if "finding" in verdicts:
            return 1
        did_something = any(row.compared for row in self.checks) if self.checks else bool(self.benches)
        return 0 if did_something and "error" not in verdicts else 3


def write_report(folder_or_path: str | os.PathLike[str], report: Report) -> Path:
    """Write ``report`` as ``report.json`` into a folder, or as the ``.json`` file named; return its path.

    The file appears whole or not at all, and a failed write leaves an older one as it was.
    """
    path = _file_of(folder_or_path)
    write_whole(path, _encode(report))
    return path


def read_report(folder_or_path: str | os.PathLike[str]) -> Report:
    """Read a report written by `write_report`.

    Raises RecordError naming the file, and the line and JSON path of what is wrong; OSError without a file.
    """
    path = Path(folder_or_path)
    path = path / FILE_NAME if path.is_dir() else path
    with path.open("rb") as file:  # a file, a pipe, or a device that never ends
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise RecordError(f"no report of ours: larger than {LARGEST_FILE >> 20} MiB", file=str(path))
    try:
        text = content.decode()
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RecordError(f"not JSON, or cut short ({error.msg})", where=where, file=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 text ({error.reason} at byte {error.start})", file=str(path)) from error
    except RecordError as error:
        raise RecordError(error.problem, where=_line_of_constant(text), file=str(path)) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; a thousand nested lists
        raise RecordError(f"not a report's JSON ({error})", file=str(path)) from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise RecordError(f'no report of ours: "format" is not "{FORMAT}"', where=_line_of_key("format", text), file=str(path))
    if (version := data.pop("format_version", None)) != FORMAT_VERSION:
        rule = f"this code reads {FORMAT_VERSION}; write the report again, or use the code that wrote it"
        where = f"{_line_of_key('format_version', text)}, format_version"
        raise RecordError(f"format_version={version!r}: {rule}", where=where, file=str(path))
    try:
        report: Report = conform(Report, data, "")
    except RecordError as error:
        raise RecordError(error.problem, where=_with_line(error.where, text, data), file=str(path)) from None
    except RecursionError:
        raise RecordError("holds values inside values too deep for a report", file=str(path)) from None
    return report


def _with_line(where: str, text: str, data: dict[str, Any]) -> str:
    """``where``, and the line of the row that it is in if rows stand one a line, as `write_report` puts them."""
    match = re.match(r"(checks|benches|not_measured)\[(\d+)\]", where)
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if match and line.strip() == f'"{match[1]}": ['), None)
    if match is None or head is None:
        return where
    number = head + 1 + int(match[2])
    try:
        same = json.loads(lines[number].strip().removesuffix(",")) == data[match[1]][int(match[2])]
    except (ValueError, IndexError):
        return where
    return f"line {number + 1}, {where}" if same else where


def _line_of_key(key: str, text: str) -> str:
    """The line where a key of the whole file first stands, or should."""
    found = re.search(rf'"{key}"\s*:', text)
    return f"line {text.count(chr(10), 0, found.start()) + 1 if found else 1}"


def _line_of_constant(text: str) -> str:
    """The line of the first NaN or Infinity that stands in no string; nothing if there is none."""
    outside = re.sub(r'"(?:\\.|[^"\\])*"', lambda match: "_" * len(match[0]), text)
    found = re.search(r"\b(NaN|Infinity)\b", outside)
    return f"line {text.count(chr(10), 0, found.start()) + 1}" if found else ""


def _file_of(folder_or_path: str | os.PathLike[str]) -> Path:
    path = Path(folder_or_path)
    return path if path.suffix == ".json" and not path.is_dir() else path / FILE_NAME


def _encode(report: Report) -> str:
    def rows(items: Iterable[Record], indent: str = "  ") -> str:
        lines = ",\n".join(f"{indent}  {_dump(plain(item))}" for item in items)
        return f"[\n{lines}\n{indent}]" if lines else "[]"

    run = ",\n".join(f"    {_dump(name)}: {_dump(value)}" for name, value in plain(report.run).items())
    parts = {
        "format": _dump(FORMAT),
        "format_version": _dump(FORMAT_VERSION),
        "run": f"{{\n{run}\n  }}",
        "checks": rows(report.checks),
        "benches": rows(report.benches),
        "not_measured": rows(report.not_measured),
    }
    if (calibration := report.calibration) is not None:
        lists = {item.name: rows(getattr(calibration, item.name), "    ") for item in fields(calibration)}
        parts["calibration"] = "{\n" + ",\n".join(f"    {_dump(name)}: {text}" for name, text in lists.items()) + "\n  }"
    return "{\n" + ",\n".join(f"  {_dump(name)}: {text}" for name, text in parts.items()) + "\n}\n"


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _refuse_constant(name: str) -> float:
    raise RecordError(f"{name} stands in the file, and JSON has no such number")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise RecordError(f"twice in one object: {sorted({name for name in names if names.count(name) > 1})}")
    return data

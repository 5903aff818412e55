"""The file format between harness and reports: the only place that knows it.

A report is one JSON file: what ran (`RunInfo`), one row a check and layout (`CheckRow`; of some checks one
a kind of case), one row a benchmark case (`BenchRow`), one row for each that was asked for and has no
figures (`NotMeasured`), of a calibration how far correct code is off and what is seen of planted errors
(`Calibration`), of an atlas one row an architecture, layout and tp_size (`AtlasRow`), of two streams of
log-probabilities the verdict (`VerdictRow`), and how often such verdicts are right (`ScoreRow`). Rows are written
one a line, so that a diff of two reports reads row by row. Everything is checked when it is made, by the
same rules in Python and from a file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports.files import write_whole
from reports.rows import (
    AtlasRow,
    AtlasVerdict,
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
    refuse_duplicates,
    whole_checks,
)
from reports.typed_json import RecordError, conform, plain, to_json
from reports.verdict_rows import Answer, ScoreRow, VerdictPlaces, VerdictRow, VerdictTest

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "FORMAT_VERSION",
    "Answer",
    "AtlasRow",
    "AtlasVerdict",
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
    "ScoreRow",
    "Tolerance",
    "Verdict",
    "VerdictPlaces",
    "VerdictRow",
    "VerdictTest",
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
    atlas: list[AtlasRow] = field(default_factory=list)
    verdict: VerdictRow | None = None
    scores: list[ScoreRow] = field(default_factory=list)

    def _check(self) -> None:
        refuse_duplicates("checks", (row.key for row in self.checks))
        refuse_duplicates("benches", (row.key for row in self.benches))
        refuse_duplicates("atlas", (row.key for row in self.atlas))
        refuse_duplicates("scores", (row.key for row in self.scores))

    @property
    def exit_code(self) -> int:
        """0 fine; 1 a finding; 3 could not run: an error, checks that compared nothing, or no row at all.

        A finding is told even where something else could not run. Of a verdict: 0 rounding, 1 a bug, 3 can't tell.
        """
        if self.verdict is not None:
            return self.verdict.exit_code
        verdicts = {row.verdict for row in self.checks} | {row.verdict for row in self.not_measured}
        places = {row.verdict for row in self.atlas}
        if "finding" in verdicts or "wrong" in places:
            return 1
        did_something = (any(row.compared for row in self.checks) if self.checks else
                         bool(self.benches or self.scores) or "right" in places)
        return 0 if did_something and "error" not in verdicts else 3


def write_report(folder_or_path: str | os.PathLike[str], report: Report) -> Path:
    """Write ``report`` as ``report.json`` into a folder, or as the ``.json`` file named; return its path.

    The file appears whole or not at all, and a failed write leaves an older one as it was.
    """
    path = _file_of(folder_or_path)
    values = plain(report)
    for name in ("calibration", "atlas", "verdict", "scores"):
        if not getattr(report, name):
            del values[name]
    write_whole(path, to_json({"format": FORMAT, "format_version": FORMAT_VERSION} | values) + "\n")
    return path


def read_report(folder_or_path: str | os.PathLike[str]) -> Report:
    """Read a report written by `write_report`.

    Raises:
        RecordError: naming the file, and the JSON path of what is wrong; in a file cut short, the line.
        OSError: without a file.
    """
    path = Path(folder_or_path)
    path = path / FILE_NAME if path.is_dir() else path
    with path.open("rb") as file:  # a file, a pipe, or a device that never ends
        content = file.read(LARGEST_FILE + 1)
    try:
        return _decode(content)
    except RecordError as error:
        raise RecordError(error.problem, error.where, str(path)) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RecordError(f"not JSON, or cut short ({error.msg})", where, str(path)) from error
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 text ({error.reason} at byte {error.start})", file=str(path)) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; a thousand nested lists
        raise RecordError(f"not a report's JSON ({error})", file=str(path)) from error


def _decode(content: bytes) -> Report:
    if len(content) > LARGEST_FILE:
        raise RecordError(f"no report of ours: larger than {LARGEST_FILE >> 20} MiB")
    data = json.loads(content.decode(), object_pairs_hook=_refuse_repeats)
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise RecordError(f'no report of ours: "format" is not "{FORMAT}"')
    if (version := data.pop("format_version", None)) != FORMAT_VERSION:
        rule = f"this code reads {FORMAT_VERSION}; write the report again, or use the code that wrote it"
        raise RecordError(f"format_version={version!r}: {rule}", "format_version")
    report: Report = conform(Report, data, "")
    return report


def _file_of(folder_or_path: str | os.PathLike[str]) -> Path:
    path = Path(folder_or_path)
    return path if path.suffix == ".json" and not path.is_dir() else path / FILE_NAME


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise RecordError(f"twice in one object: {sorted({name for name in names if names.count(name) > 1})}")
    return data

"""The file format between harness and reports: the only place that knows it.

A report is one JSON file: what ran (`RunInfo`), one row a check and layout (`CheckRow`), one row a benchmark
case (`BenchRow`), one row for each that was asked for and has no figures (`NotMeasured`), and of a calibration
how far correct code is off and what is seen of planted errors (`Calibration`). Rows are written one a line, so
that a diff of two reports reads row by row. Everything is checked when it is made, by the same rules in Python
and from a file.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from reports.files import write_whole
from reports.metrics import direction
from reports.typed_json import RecordError, conform

FORMAT = "shardproof-report"
FORMAT_VERSION = 1
FILE_NAME = "report.json"

Verdict = Literal["pass", "finding", "skipped", "error"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class _Record:
    """Base of all records: field types are checked and containers copied when one is made."""

    __slots__ = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = conform(hints[item.name], getattr(self, item.name), item.name)
            object.__setattr__(self, item.name, value)
        self._check()

    def _check(self) -> None:
        """Raise RecordError for values that fit their types and yet make no sense."""

    def _require(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise RecordError(f"{name}={getattr(self, name)!r}: {rule}", where=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu(_Record):
    """One accelerator of the machine."""

    name: str
    driver: str
    memory_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine(_Record):
    """Where it ran. ``type`` is a short name to file baselines under: ``cpu-2core``, ``nvidia-h200``, …"""

    type: str
    cpu: str
    cores: int
    memory_gib: float
    gpus: list[Gpu] = field(default_factory=list)

    def _check(self) -> None:
        self._require(self.type != "", "type", "a machine type has a name")
        self._require(self.cores >= 1, "cores", "a machine has a core")
        self._require(0 < self.memory_gib < math.inf, "memory_gib", "must be positive and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo(_Record):
    """What ran, where and with which switches.

    command     the subcommand, such as ``verify``
    argv        the whole command line, to run it again
    commit      of the code under test; None outside a repository; ``dirty`` if files differed from it
    started_at  ISO 8601 in UTC
    seconds     wall clock of the whole run
    versions    ``python``, ``torch``, ``nccl``, …
    switches    what changes numbers or speed: TF32, reduced-precision reduction, NCCL_*, backends
    """

    command: str
    argv: list[str]
    commit: str | None
    dirty: bool
    seed: int | None
    started_at: str
    seconds: float
    machine: Machine
    versions: dict[str, str]
    switches: dict[str, Any]

    def _check(self) -> None:
        self._require(self.command != "", "command", "a run has a command")
        self._require(0 <= self.seconds < math.inf, "seconds", "must be finite and not negative")
        try:
            offset = datetime.fromisoformat(self.started_at).utcoffset()
        except ValueError:
            offset = None
        rule = "must be ISO 8601 in UTC, as 2026-01-31T12:00:00+00:00"
        self._require(offset == timedelta(0), "started_at", rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow(_Record):
    """One check on one layout.

    cases              examples drawn and run
    compared           values compared; a pass with none is refused, for nothing uncompared passes
    error_over_budget  worst error as a fraction of its budget, over 1 in a finding; infinite if the candidate
                       has NaN or the budget is zero; None where the verdict is not about size
    excused            share of greedy ids excused as near-ties, 0 to 1
    rank, module       where it first goes wrong
    message            why: needed unless it passed
    replay             the one command that runs the finding again
    """

    check: str
    model: str
    tp_size: int
    fabric: str
    dtype: str
    cases: int
    verdict: Verdict
    compared: int
    seconds: float
    error_over_budget: float | None = None
    rank: int | None = None
    module: str | None = None
    message: str = ""
    replay: str | None = None
    excused: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def _check(self) -> None:
        error = self.error_over_budget
        self._require(self.check != "", "check", "a check has a name")
        self._require(self.tp_size >= 1, "tp_size", "must be at least 1")
        self._require(self.cases >= 0, "cases", "cannot be negative")
        self._require(self.compared >= 0, "compared", "cannot be negative")
        self._require(0 <= self.seconds < math.inf, "seconds", "must be finite and not negative")
        self._require(error is None or error >= 0, "error_over_budget", "cannot be negative")
        if self.rank is not None:
            self._require(0 <= self.rank < self.tp_size, "rank", f"no such rank in tp_size={self.tp_size}")
        self._require(self.excused is None or 0 <= self.excused <= 1, "excused", "a share is between 0 and 1")
        if self.verdict == "pass":
            self._require(self.compared > 0, "compared", "a check that compared nothing has not passed")
            within = error is None or error <= 1
            self._require(within, "error_over_budget", "a check over its budget has not passed")
        else:
            self._require(self.message.strip() != "", "message", f"verdict={self.verdict!r} needs a reason")

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What makes two rows the same row."""
        return (self.check, self.model, self.dtype, self.fabric, self.tp_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow(_Record):
    """One benchmark case on one layout.

    samples  metric -> one value a round, after warm-up; the unit is the name's end (``output_tokens_per_s``,
             ``ttft_ms``), and says which way is better
    first    metric -> the first run, apart from the samples
    metrics  other single figures: ``memory_gib``; ``bound_<metric>`` is the hardware bound of that metric in
             its unit; ``percent_of_bound`` speaks of the first metric of ``samples``
    axes     what was varied, for plots: ``batch_size``, ``message_bytes``
    """

    workload: str
    case: str
    model: str
    engine: str
    tp_size: int
    dtype: str
    fabric: str
    samples: dict[str, list[float]]
    first: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    axes: dict[str, float] = field(default_factory=dict)

    def _check(self) -> None:
        self._require(self.workload != "", "workload", "a workload has a name")
        self._require(self.tp_size >= 1, "tp_size", "must be at least 1")
        self._require(bool(self.samples), "samples", "a benchmark row has at least one metric")
        for metric, values in self.samples.items():
            where = f"samples.{metric}"
            if direction(metric) is None:
                rule = "a metric's name ends in its unit (_per_s, _ms, _us, _s, _bytes, _gib, …)"
                raise RecordError(rule, where=where)
            if not values:
                raise RecordError("has zero samples: leave out what was not measured", where=where)
            for i, value in enumerate(values):
                if not 0 < value < math.inf:
                    rule = "a measurement is positive and finite"
                    raise RecordError(f"{value}: {rule}", where=f"{where}[{i}]")
        for name in ("first", "metrics", "axes"):
            for metric, value in getattr(self, name).items():
                if not math.isfinite(value):
                    raise RecordError(f"{value} is not finite", where=f"{name}.{metric}")

    @property
    def key(self) -> tuple[str, str, str, str, str, str, int]:
        """What makes two rows the same row."""
        return (self.workload, self.case, self.model, self.engine, self.dtype, self.fabric, self.tp_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured(_Record):
    """A benchmark case that was asked for and has no figures: a peer that is missing, an interrupted run.

    case     None for all cases of the workload; likewise tp_size
    """

    workload: str
    engine: str
    reason: str
    case: str | None = None
    tp_size: int | None = None

    def _check(self) -> None:
        self._require(self.reason.strip() != "", "reason", "what was not measured has a reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance(_Record):
    """The budget of one statistic, ``max(k * the baseline's error, c)``; errors in roundoffs of their scale.

    k, c                what the checks use
    fitted_k, fitted_c  what the samples of correct code ask for, with ``margin`` to spare
    worst               the largest of the samples' errors, as a fraction of its budget
    """

    statistic: str
    k: float
    c: float
    fitted_k: float
    fitted_c: float
    margin: float
    samples: int
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow(_Record):
    """How far correct code is off: the samples of one kind, statistic, dtype and tp_size; in roundoffs of their scale.

    candidate, baseline  quantiles of their errors: ``{"0.5": the median, …, "1": the worst}``
    ratio                the same of candidate over baseline, but for the ``lucky`` samples, whose baseline has no error at all
    needs_k, needs_c     what these samples ask of either constant, the other one being as the checks have it
    cloud                [b, e, samples] with a baseline's error of about ``2 ** (b / 4)`` and a candidate's of ``2 ** (e / 4)``
    """

    kind: str
    statistic: str
    dtype: str
    tp_size: int
    samples: int
    lucky: int
    candidate: dict[str, float]
    baseline: dict[str, float]
    ratio: dict[str, float]
    needs_k: float
    needs_c: float
    cloud: list[list[int]]

    def _check(self) -> None:
        self._require(self.samples > 0, "samples", "a distribution has samples")
        self._require(all(len(bin_) == 3 for bin_ in self.cloud), "cloud", "each bin is [baseline, candidate, samples]")

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What makes two rows the same row."""
        return (self.kind, self.statistic, self.dtype, self.tp_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerRow(_Record):
    """Which relative error in one rank's part of a sum a check sees.

    values     ``reals`` or ``integers``: what is summed
    cases      drawn cases in which it was planted
    per_run    how many such cases a run of the check draws
    seen       [error, share of the cases in which it is seen], from the first error that is seen to one that always is
    half, most, run  the smallest error seen in half of the cases, in 99 % of them, and in 99 % of the runs of the check, by one
               of its cases at least; None if no error that was tried is
    """

    check: str
    values: str
    dtype: str
    tp_size: int
    cases: int
    per_run: int
    seen: list[list[float]]
    half: float | None
    most: float | None
    run: float | None

    def _check(self) -> None:
        self._require(self.cases > 0, "cases", "a share is one of cases")
        self._require(self.per_run > 0, "per_run", "a run has a case")
        self._require(all(len(point) == 2 for point in self.seen), "seen", "each point is [error, share]")

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What makes two rows the same row."""
        return (self.check, self.values, self.dtype, self.tp_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(_Record):
    """What the tolerances follow from, and what they can see."""

    tolerances: list[Tolerance] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    powers: list[PowerRow] = field(default_factory=list)

    def _check(self) -> None:
        _refuse_twins("tolerances", ((row.statistic,) for row in self.tolerances))
        _refuse_twins("errors", (row.key for row in self.errors))
        _refuse_twins("powers", (row.key for row in self.powers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(_Record):
    """A run and its rows. Two rows of one kind with one ``key`` are refused: nobody could tell them apart."""

    run: RunInfo
    checks: list[CheckRow] = field(default_factory=list)
    benches: list[BenchRow] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)
    calibration: Calibration | None = None

    def _check(self) -> None:
        _refuse_twins("checks", (row.key for row in self.checks))
        _refuse_twins("benches", (row.key for row in self.benches))

    @property
    def exit_code(self) -> int:
        """0 fine; 1 a finding; 3 could not run: an error, checks that compared nothing, or no row at all."""
        verdicts = {row.verdict for row in self.checks}
        if "finding" in verdicts:
            return 1
        did_something = any(row.compared for row in self.checks) if self.checks else bool(self.benches)
        return 0 if did_something and "error" not in verdicts else 3


def _refuse_twins(name: str, keys: Iterable[tuple[Any, ...]]) -> None:
    seen: dict[tuple[Any, ...], int] = {}
    for i, key in enumerate(keys):
        if key in seen:
            raise RecordError(f"is the same row as {name}[{seen[key]}]: {key}", where=f"{name}[{i}]")
        seen[key] = i


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
    try:
        text = path.read_bytes().decode()
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
    def rows(items: Iterable[_Record], indent: str = "  ") -> str:
        lines = ",\n".join(f"{indent}  {_dump(_plain(item))}" for item in items)
        return f"[\n{lines}\n{indent}]" if lines else "[]"

    run = ",\n".join(f"    {_dump(name)}: {_dump(value)}" for name, value in _plain(report.run).items())
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


def _plain(record: Any) -> Any:
    """A record as JSON values, its fields in the order in which they are declared."""
    if isinstance(record, _Record):
        return {item.name: _plain(getattr(record, item.name)) for item in fields(record)}  # type: ignore[arg-type]
    if isinstance(record, list):
        return [_plain(item) for item in record]
    return "inf" if record == math.inf else record


def _refuse_constant(name: str) -> float:
    raise RecordError(f"{name} stands in the file, and JSON has no such number")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise RecordError(f"twice in one object: {sorted({name for name in names if names.count(name) > 1})}")
    return data

"""What reports are made of, row by row. Everything is checked when it is made, by the same rules in Python and from a file.

How these become a file is the business of ``reports.records``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal, get_type_hints

from reports.metrics import direction
from reports.typed_json import RecordError, conform

Verdict = Literal["pass", "finding", "skipped", "error"]
AtlasVerdict = Literal["wrong", "crashed", "refused unclearly", "refused clearly", "not compared", "right"]


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tp_size": (lambda value: value is None or value >= 1, "must be at least 1"),
    "cases": (lambda value: value >= 0, "cannot be negative"),
    "compared": (lambda value: value >= 0, "cannot be negative"),
    "seconds": (lambda value: 0 <= value < math.inf, "must be finite and not negative"),
    "error_over_budget": (lambda value: value is None or not value < 0, "cannot be negative"),
    **dict.fromkeys(("excused", "sharded", "sharded_flops"),
                    (lambda value: value is None or 0 <= value <= 1, "a share is between 0 and 1")),
}
"""Of fields by these names, whatever the record."""


class Record:
    """Base of all records: field types are checked and containers copied when one is made.

    KEY  of rows: the fields that make two of them the same row
    """

    __slots__ = ()
    KEY: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = conform(hints[item.name], getattr(self, item.name), item.name)
            object.__setattr__(self, item.name, value)
        for name, (ok, rule) in _RULES.items():
            if name in hints:
                self._require(ok(getattr(self, name)), name, rule)
        self._check()

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same row."""
        return tuple(getattr(self, name) for name in self.KEY)

    def _check(self) -> None:
        """Raise RecordError for values that fit their types and yet make no sense."""

    def _require(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise RecordError(f"{name}={getattr(self, name)!r}: {rule}", where=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu(Record):
    """One accelerator of the machine."""

    name: str
    driver: str
    memory_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine(Record):
    """Where it ran.

    type             a short name: ``cpu-2core``, ``nvidia-h200``, …
    cpu              its model, as the system names it; some say no more than "AMD EPYC"
    instruction_set  that torch computes with on the CPU, such as ``AVX512``; None in records from before it was asked
    """

    type: str
    cpu: str
    cores: int
    memory_gib: float
    gpus: list[Gpu] = field(default_factory=list)
    instruction_set: str | None = None

    @property
    def folder(self) -> str:
        """Name of the folder for its baselines: without a GPU it says which CPU, whose sums another may round otherwise."""
        if self.gpus:
            return self.type
        model = re.sub(r"\((r|tm)\)|\b(cpu|processor|\d+-core)\b|@.*", " ", self.cpu.lower())
        return "-".join([self.type, *re.findall(r"[a-z0-9]+", f"{model} {self.instruction_set or ''}".lower())])

    def _check(self) -> None:
        self._require(self.type != "", "type", "a machine type has a name")
        self._require(self.cores >= 1, "cores", "a machine has a core")
        self._require(0 < self.memory_gib < math.inf, "memory_gib", "must be positive and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo(Record):
    """What ran, where and with which switches.

    command     the subcommand, such as ``verify``
    argv        the whole command line, to run it again
    commit      of the code under test; None outside a repository; ``dirty`` if files differed from it
    started_at  ISO 8601 in UTC
    seconds     wall clock of the whole run
    versions    ``python``, ``torch``, ``nccl``, …
    switches    what changes numbers or speed: TF32, reduced-precision reduction, NCCL_*, backends
    version     of this project; None in records from before it was noted
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
    version: str | None = None

    @property
    def code(self) -> str | None:
        """The commit, marked ``-dirty`` if files differed from it; None outside a repository."""
        return f"{self.commit}-dirty" if self.commit and self.dirty else self.commit

    def _check(self) -> None:
        self._require(self.command != "", "command", "a run has a command")
        try:
            offset = datetime.fromisoformat(self.started_at).utcoffset()
        except ValueError:
            offset = None
        rule = "must be ISO 8601 in UTC, as 2026-01-31T12:00:00+00:00"
        self._require(offset == timedelta(0), "started_at", rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow(Record):
    """One check on one layout, or one kind of its cases there.

    kind               of a check that tells its cases apart by kind: which one, such as ``row with bias``
    fault              of ``faults``: what was planted
    cases              examples drawn and run
    compared           values compared; a pass with none is refused, for nothing uncompared passes
    error_over_budget  worst error as a fraction of its budget, over 1 in a finding; infinite if the candidate
                       has NaN or the budget is zero; NaN, which never passes, if it can't be told; None where the verdict is
                       not about size
    excused            share of greedy ids excused as near-ties, 0 to 1
    rank, module       where it first goes wrong
    seconds            of the check, all of its kinds together
    message            why: needed unless it passed
    replay             the one command that runs the finding again
    extra              whatever else the check has to tell; ``traceback``: where an error came from
    """

    KEY: ClassVar[tuple[str, ...]] = ("check", "fault", "model", "dtype", "fabric", "tp_size", "kind")
    check: str
    model: str
    tp_size: int
    fabric: str
    dtype: str
    cases: int
    verdict: Verdict
    compared: int
    seconds: float
    kind: str = ""
    fault: str = ""
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
        if self.rank is not None:
            self._require(0 <= self.rank < self.tp_size, "rank", f"no such rank in tp_size={self.tp_size}")
        if self.verdict == "pass":
            self._require(self.compared > 0, "compared", "a check that compared nothing has not passed")
            within = error is None or error <= 1
            self._require(within, "error_over_budget", "a check over its budget has not passed")
        else:
            self._require(self.message.strip() != "", "message", f"verdict={self.verdict!r} needs a reason")

    @property
    def traceback(self) -> str:
        """Where an error came from; empty if the row does not say."""
        return str(self.extra.get("traceback") or "")

    @property
    def name(self) -> str:
        """For people: ``logits``, ``layers: row with bias``, ``faults: reduced-twice``."""
        return ": ".join(part for part in (self.check, self.kind, self.fault) if part)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What the rows of one check that differ in kind alone have in common."""
        return self.key[:-1]


def whole_checks(rows: Iterable[CheckRow]) -> list[CheckRow]:
    """One row a check and layout: of several kinds the worst, with the cases and values of all of them."""
    groups: dict[tuple[Any, ...], list[CheckRow]] = {}
    for row in rows:
        groups.setdefault(row.layout, []).append(row)
    return [group[0] if len(group) == 1 and not group[0].kind else _whole_check(group) for group in groups.values()]


def _whole_check(kinds: Sequence[CheckRow]) -> CheckRow:
    order: tuple[Verdict, ...] = ("finding", "error", "skipped", "pass")
    worst = min(kinds, key=lambda row: (order.index(row.verdict), -(row.error_over_budget or 0.0)))
    return replace(worst, kind="", cases=sum(row.cases for row in kinds), compared=sum(row.compared for row in kinds),
                   message=f"{worst.kind}: {worst.message}" if worst.kind and worst.message else worst.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtlasRow(Record):
    """What one architecture does on one number of ranks, by a tensor parallelism that is not ours.

    layout             what of the architecture's config was chosen: ``base``, or a change of it
    changes            the change: fields of the config
    verdict            ``right``: within budget. ``wrong``: over budget, and on one rank within. ``refused clearly``: the library
                       says itself what it does not take; ``refused unclearly``: all ranks fail alike, in some other way.
                       ``crashed``: a rank died or hung, or some failed and others did not. ``not compared``: for the reason given
    error_over_budget  of the logits
    sharded            share of the parameters that no rank holds whole; ``sharded_flops``: of the multiplications
    rank, module       where it first goes wrong
    said               warnings of the library
    message            why: needed unless it is right
    replay             the one command that runs it again
    """

    KEY: ClassVar[tuple[str, ...]] = ("architecture", "layout", "subject", "dtype", "tp_size")
    architecture: str
    layout: str
    subject: str
    tp_size: int
    dtype: str
    verdict: AtlasVerdict
    seconds: float
    changes: dict[str, Any] = field(default_factory=dict)
    error_over_budget: float | None = None
    sharded: float | None = None
    sharded_flops: float | None = None
    rank: int | None = None
    module: str | None = None
    message: str = ""
    said: list[str] = field(default_factory=list)
    replay: str = ""

    def _check(self) -> None:
        error = self.error_over_budget
        self._require(self.architecture != "", "architecture", "a row has an architecture")
        if self.verdict == "right":
            self._require(error is not None and error <= 1, "error_over_budget", "what is right is within budget")
        else:
            self._require(self.message.strip() != "", "message", f"verdict={self.verdict!r} needs a reason")

    @property
    def name(self) -> str:
        """For people: ``llama``, ``llama: tied``."""
        return self.architecture if self.layout == "base" else f"{self.architecture}: {self.layout}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow(Record):
    """One benchmark case on one layout.

    samples  metric -> one value a round, after warm-up; the unit is the name's end (``output_tokens_per_s``,
             ``ttft_ms``), and says which way is better
    first    metric -> the first run, apart from the samples
    metrics  other single figures: ``memory_gib``; ``bound_<metric>`` is the hardware bound of that metric in
             its unit; ``percent_of_bound`` speaks of the first metric of ``samples``
    axes     what was varied, for plots: ``batch_size``, ``message_bytes``
    """

    KEY: ClassVar[tuple[str, ...]] = ("workload", "case", "model", "engine", "dtype", "fabric", "tp_size")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured(Record):
    """A benchmark case that was asked for and has no figures: a peer that is missing, an interrupted run.

    case       None for all cases of the workload; likewise tp_size
    verdict    ``error`` if it was there and broke, or did not do what it was asked for; else ``skipped``
    reason     in one line
    traceback  where an error came from
    """

    workload: str
    engine: str
    reason: str
    case: str | None = None
    tp_size: int | None = None
    verdict: Literal["skipped", "error"] = "skipped"
    traceback: str = ""

    def _check(self) -> None:
        self._require(self.reason.strip() != "", "reason", "what was not measured has a reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance(Record):
    """The budget of one statistic, ``max(k * the baseline's error, c)``; errors in roundoffs of their scale.

    precision           the dtypes that it is for, as ``bfloat16, float16``; in older records it was for all

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
    precision: str = "all"

    def is_for(self, dtype: str) -> bool:
        """Whether it is the budget of this dtype."""
        return self.precision == "all" or dtype in self.precision.split(", ")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRow(Record):
    """How far correct code is off: the samples of one kind, statistic, dtype and tp_size; in roundoffs of their scale.

    candidate, baseline  quantiles of their errors: ``{"0.5": the median, …, "1": the worst}``
    ratio                the same of candidate over baseline, but for the ``lucky`` samples, whose baseline has no error at all
    needs_k, needs_c     what these samples ask of either constant, the other one being as the checks have it
    cloud                [b, e, samples] with a baseline's error of about ``2 ** (b / 4)`` and a candidate's of ``2 ** (e / 4)``
    """

    KEY: ClassVar[tuple[str, ...]] = ("kind", "statistic", "dtype", "tp_size")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerRow(Record):
    """Which relative error in one rank's part of a sum a check sees.

    values     ``reals`` or ``integers``: what is summed
    cases      drawn cases in which it was planted
    per_run    how many such cases a run of the check draws
    seen       [error, share of the cases in which it is seen], from the first error that is seen to one that always is
    half, most, run  the smallest error seen in half of the cases, in 99 % of them, and in 99 % of the runs of the check, by one
               of its cases at least; None if no error that was tried is
    """

    KEY: ClassVar[tuple[str, ...]] = ("check", "values", "dtype", "tp_size")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Record):
    """What the tolerances follow from, and what they can see."""

    tolerances: list[Tolerance] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    powers: list[PowerRow] = field(default_factory=list)

    def _check(self) -> None:
        refuse_duplicates("tolerances", ((row.precision, row.statistic) for row in self.tolerances))
        refuse_duplicates("errors", (row.key for row in self.errors))
        refuse_duplicates("powers", (row.key for row in self.powers))


def refuse_duplicates(name: str, keys: Iterable[tuple[Any, ...]]) -> None:
    """Raise ``ValueError`` if two rows of ``name`` have one key."""
    seen: dict[tuple[Any, ...], int] = {}
    for i, key in enumerate(keys):
        if key in seen:
            raise RecordError(f"is the same row as {name}[{seen[key]}]: {key}", where=f"{name}[{i}]")
        seen[key] = i

"""Baseline against candidate: what got slower, what broke, and whether the samples can tell at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from reports import metrics
from reports.bootstrap import can_be_sure, interval_of_gain, interval_of_paired_gain
from reports.records import AtlasRow, BenchRow, CheckRow, Report, RunInfo, whole_checks

SpeedVerdict = Literal["slower", "too noisy", "faster", "same", "only in baseline", "only in candidate"]
CheckVerdict = Literal[
    "broken", "new finding", "worse error", "no longer compared", "still failing", "fixed", "now compared",
    "same", "only in baseline", "only in candidate",
]  # fmt: skip
_Row = TypeVar("_Row", CheckRow, AtlasRow)
AtlasChangeVerdict = Literal["broken", "other verdict", "mended", "same", "only in baseline", "only in candidate"]

HARDWARE = "hardware"
"""The workload of rows that tell what the machine could do in this run. Slower ones explain, and fail nothing."""
CLEARLY_SLOWER = 1.8
"""On a CPU, whose speed changes from run to run, a row fails from so many times slower on, beyond what the machine itself lost.
Of 552 comparisons of the same code with itself, minutes apart on 2 cores that others kept busy, none had a row beyond 1.77
(docs/ci.md); at 1.5 four would have failed."""


class UnlikeMachinesError(ValueError):
    """Speeds of unlike machines were to be compared. ``differences``: field -> (baseline, candidate)."""

    def __init__(self, differences: dict[str, tuple[str, str]]) -> None:
        self.differences = differences
        listed = "; ".join(f"{name}: {old} against {new}" for name, (old, new) in differences.items())
        rule = "their speeds say nothing about the code; allow unlike machines to compare them anyway"
        super().__init__(f"the machines differ ({listed}): {rule}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedChange:
    """One benchmark case and metric, before and after.

    gain             how many times better the candidate's median is; above 1 is better, whatever the metric. Where both
                     took turns, the median over rounds of how many times better the candidate's round is
    low, high        interval of ``gain``, widened for the number of rows compared
    baseline_median, candidate_median  in the metric's unit, over so many rounds
    """

    workload: str
    case: str
    model: str
    engine: str
    dtype: str
    fabric: str
    tp_size: int
    metric: str
    verdict: SpeedVerdict
    baseline_median: float | None = None
    candidate_median: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    baseline_rounds: int = 0
    candidate_rounds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckChange:
    """One check and layout (of a check that has kinds, one kind there), before and after.

    ``message``, ``replay`` and ``traceback`` are the candidate's.
    """

    check: str
    kind: str = ""
    fault: str = ""
    model: str
    dtype: str
    fabric: str
    tp_size: int
    verdict: CheckVerdict
    baseline: str
    candidate: str
    baseline_error: float | None = None
    candidate_error: float | None = None
    message: str = ""
    replay: str | None = None
    traceback: str = ""

    @property
    def name(self) -> str:
        """As ``CheckRow.name``."""
        return ": ".join(part for part in (self.check, self.kind, self.fault) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtlasChange:
    """One architecture, layout and tp_size, before and after.

    ``broken`` was right and is not, ``mended`` was wrong, refused or crashed and is right; ``message`` and ``replay`` are the
    candidate's.
    """

    architecture: str
    layout: str
    subject: str
    dtype: str
    tp_size: int
    verdict: AtlasChangeVerdict
    baseline: str
    candidate: str
    baseline_error: float | None = None
    candidate_error: float | None = None
    message: str = ""
    replay: str = ""

    @property
    def name(self) -> str:
        """As ``AtlasRow.name``."""
        return self.architecture if self.layout == "base" else f"{self.architecture}: {self.layout}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that `compare` found. ``differences`` of machines, ``switches``: field -> (before, after).

    ``confidence`` is for all rows together; ``in_turns`` says whether rounds were held against each other in pairs; a slower row
    fails if it is for sure ``fails_at`` times slower at least: 1 for every slower row, None for no row.
    """

    baseline: RunInfo
    candidate: RunInfo
    speeds: Sequence[SpeedChange]
    checks: Sequence[CheckChange]
    differences: dict[str, tuple[str, str]]
    switches: dict[str, tuple[str, str]]
    fails_at: float | None
    smallest_effect: float
    confidence: float
    in_turns: bool = False
    atlas: Sequence[AtlasChange] = ()

    @property
    def counts(self) -> Counter[str]:
        """How many rows of each verdict, speeds, checks and atlas together."""
        return Counter([*(change.verdict for change in self.checks), *(change.verdict for change in self.speeds),
                        *(change.verdict for change in self.atlas)])

    @property
    def machine_lost(self) -> float:
        """How many times slower the hardware's own rows were, the worst of them; 1 if none was, or there are none."""
        return _machine_lost(self.speeds)

    @property
    def regressions(self) -> list[SpeedChange | CheckChange | AtlasChange]:
        """The rows that fail this comparison: what is broken, new findings and rows that are slower by enough (``fails_at``)."""
        broken = [change for change in self.checks if change.verdict in ("broken", "new finding")]
        return [*broken, *(change for change in self.atlas if change.verdict == "broken"),
                *(change for change in self.speeds if self._is_too_slow(change))]

    def _is_too_slow(self, change: SpeedChange) -> bool:
        if change.verdict != "slower" or change.workload == HARDWARE or self.fails_at is None:
            return False
        assert change.high is not None, "a row that is slower has an interval"
        return change.high * self.fails_at <= 1

    @property
    def exit_code(self) -> int:
        """0 fine, 1 a regression, 3 no row is in both reports, so that nothing was compared."""
        if self.regressions:
            return 1
        return 0 if set(self.counts) - {"only in baseline", "only in candidate"} else 3


def fingerprint(run: RunInfo) -> dict[str, str]:
    """What must agree before speeds are compared: machine, GPUs, driver, torch, NCCL; the CPU if no GPU."""
    machine = run.machine
    gpus = Counter(gpu.name for gpu in machine.gpus)
    print_ = {
        "machine type": machine.type,
        "GPUs": ", ".join(f"{count} × {name}" for name, count in sorted(gpus.items())) or "none",
        "driver": ", ".join(sorted({gpu.driver for gpu in machine.gpus})) or "none",
        "torch": run.versions.get("torch", "unknown"),
        "NCCL": run.versions.get("nccl", "none"),
    }
    if machine.gpus:
        return print_
    return print_ | {"CPU": machine.cpu, "cores": str(machine.cores), "instruction set": machine.instruction_set or "unknown"}


def compare(
    baseline: Report,
    candidate: Report,
    *,
    allow_unlike: bool = False,
    gate: bool | None = None,
    in_turns: bool = False,
    smallest_effect: float = 0.05,
    confidence: float = 0.99,
    error_spread: float = 0.25,
    seed: int = 0,
) -> Comparison:
    """Hold ``candidate`` against ``baseline``, row by row.

    allow_unlike     compare speeds although the machines' fingerprints differ
    gate             whether a slower row fails; None means: on like machines with a GPU, where speeds repeat, any; on like
                     machines without one those that are ``CLEARLY_SLOWER``, beyond what the hardware's own rows lost; else none
    in_turns         both sides were measured in one run, taking turns: their rounds are held against each other in pairs,
                     where there are enough of them
    smallest_effect  relative change of a median below which it does not matter
    confidence       that no row is called slower or faster by chance, over all rows together (Bonferroni)
    error_spread     growth of error_over_budget, in budgets, that counts as worse

    How many rounds it takes to be sure of a slow-down of 10 % among twelve rows, in 95 comparisons of a hundred:
    30 a side with 5 % of noise and outliers, 7 with 1 % of noise. The samples stand for one run each: what differs
    between runs but not within one (clocks, neighbours, memory layout) no interval can show. In turns, what slows the machine
    down for a while slows both sides of a pair: see harness/studies/aa.py.

    Raises UnlikeMachinesError if there are speeds to compare and the machines differ; ValueError for settings
    out of range.
    """
    if not smallest_effect > 0 or not 0 < confidence < 1:
        raise ValueError(f"{smallest_effect=} must be positive and {confidence=} between 0 and 1")
    old, new = fingerprint(baseline.run), fingerprint(candidate.run)
    differences = _differences(old, new)
    if differences and not allow_unlike and baseline.benches and candidate.benches:
        raise UnlikeMachinesError(differences)
    speeds = _compare_speeds(baseline.benches, candidate.benches, smallest_effect, 1 - confidence, seed, in_turns)
    fails_at = {True: 1.0, False: None}[gate] if gate is not None else _usual_gate(speeds, candidate.run, differences)
    return Comparison(
        baseline=baseline.run,
        candidate=candidate.run,
        speeds=speeds,
        checks=_compare_checks(baseline.checks, candidate.checks, error_spread),
        atlas=_compare_atlas(baseline.atlas, candidate.atlas),
        differences=differences,
        switches=_differences(_texts(baseline.run.switches), _texts(candidate.run.switches)),
        fails_at=fails_at,
        smallest_effect=smallest_effect,
        confidence=confidence,
        in_turns=in_turns,
    )


def _usual_gate(speeds: Sequence[SpeedChange], run: RunInfo, differences: dict[str, tuple[str, str]]) -> float | None:
    if differences:
        return None
    if run.machine.gpus:
        return 1.0
    return CLEARLY_SLOWER * _machine_lost(speeds)


def _machine_lost(speeds: Sequence[SpeedChange]) -> float:
    return max([1.0, *(1 / change.gain for change in speeds if change.workload == HARDWARE and change.gain)])


def _compare_speeds(
    old_rows: Sequence[BenchRow], new_rows: Sequence[BenchRow], effect: float, error_rate: float, seed: int, in_turns: bool
) -> list[SpeedChange]:
    old = {(row.key, metric): (row, values) for row in old_rows for metric, values in row.samples.items()}
    new = {(row.key, metric): (row, values) for row in new_rows for metric, values in row.samples.items()}
    num_compared = len(old.keys() & new.keys())
    changes = []
    for key in dict.fromkeys((*old, *new)):
        row, metric = (new.get(key) or old[key])[0], key[1]
        before, after = (old[key][1] if key in old else []), (new[key][1] if key in new else [])
        verdict: SpeedVerdict = "only in candidate" if not before else "only in baseline"
        gain = low = high = None
        if before and after:
            better, worse = (after, before) if metrics.direction(metric) == "higher" else (before, after)
            # Half of the error rate for either end, shared among all rows.
            tail = error_rate / 2 / num_compared
            pairs = min(len(before), len(after)) if in_turns else 0
            paired = interval_of_paired_gain(better[:pairs], worse[:pairs], tail=tail)
            if paired is not None:
                low, gain, high = paired
            else:
                gain = float(np.median(better) / np.median(worse))
                low, high = interval_of_gain(better, worse, tail=tail, seed=seed)
            sure = paired is not None or can_be_sure(len(before), len(after), tail=tail)
            verdict = _speed_verdict(gain, low, high, effect) if sure else "too noisy"
        changes.append(
            SpeedChange(
                **{name: getattr(row, name) for name in BenchRow.KEY},
                metric=metric,
                verdict=verdict,
                baseline_median=float(np.median(before)) if before else None,
                candidate_median=float(np.median(after)) if after else None,
                gain=gain,
                low=low,
                high=high,
                baseline_rounds=len(before),
                candidate_rounds=len(after),
            )
        )
    return changes


def _speed_verdict(gain: float, low: float, high: float, effect: float) -> SpeedVerdict:
    threshold = 1 + effect  # as a ratio, so that 1.05 times faster and 1.05 times slower are treated alike
    if high < 1 and gain <= 1 / threshold:
        return "slower"
    if low > 1 and gain >= threshold:
        return "faster"
    return "same" if low > 1 / threshold and high < threshold else "too noisy"


def _compare_checks(old_rows: Sequence[CheckRow], new_rows: Sequence[CheckRow], spread: float) -> list[CheckChange]:
    # Where one side has no kinds (an older record, a check that could not run), the other side's are taken together.
    whole = {row.layout for row in (*old_rows, *new_rows) if not row.kind}
    return [CheckChange(**_both_sides(before, after), verdict=_check_verdict(before, after, spread),
                        replay=after.replay if after else None, traceback=after.traceback if after else "")
            for before, after in _pairs(_with_whole(old_rows, whole), _with_whole(new_rows, whole))]


def _pairs(old_rows: Iterable[_Row], new_rows: Iterable[_Row]) -> Iterator[tuple[_Row | None, _Row | None]]:
    """Each row of either side beside the same row of the other; None where it has none."""
    old: dict[Any, _Row] = {row.key: row for row in old_rows}
    new: dict[Any, _Row] = {row.key: row for row in new_rows}
    return ((old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new)))


def _both_sides(before: _Row | None, after: _Row | None) -> dict[str, Any]:
    """What a change of a check's or an atlas's row tells of both."""
    row = after or before
    assert row is not None, "one of the two is there"
    return {name: getattr(row, name) for name in row.KEY} | {
        "baseline": before.verdict if before else "", "candidate": after.verdict if after else "",
        "baseline_error": before.error_over_budget if before else None,
        "candidate_error": after.error_over_budget if after else None, "message": after.message if after else ""}


def _with_whole(rows: Sequence[CheckRow], layouts: Set[tuple[Any, ...]]) -> Iterator[CheckRow]:
    """The rows, those of each of ``layouts`` as one."""
    wholes = {row.layout: row for row in whole_checks(rows)}
    return (wholes.pop(row.layout) if row.layout in layouts else row for row in rows
            if row.layout not in layouts or row.layout in wholes)


def _check_verdict(old: CheckRow | None, new: CheckRow | None, spread: float) -> CheckVerdict:
    if new is None:
        return "only in baseline"
    was, now = old.verdict if old else "absent", new.verdict
    if now in ("finding", "error"):
        if was == "pass":
            return "broken"
        if was in ("finding", "error"):
            return "still failing"
        return "new finding" if now == "finding" else ("only in candidate" if old is None else "same")
    if old is None:
        return "only in candidate"
    if now == "skipped":
        return "same" if was == "skipped" else "no longer compared"
    if was != "pass":
        return "now compared" if was == "skipped" else "fixed"
    grown = (new.error_over_budget or 0.0) - (old.error_over_budget or 0.0)
    return "worse error" if grown > spread else "same"


def _compare_atlas(old_rows: Sequence[AtlasRow], new_rows: Sequence[AtlasRow]) -> list[AtlasChange]:
    return [AtlasChange(**_both_sides(before, after), verdict=_atlas_verdict(before, after), replay=after.replay if after else "")
            for before, after in _pairs(old_rows, new_rows)]


def _atlas_verdict(old: AtlasRow | None, new: AtlasRow | None) -> AtlasChangeVerdict:
    if old is None or new is None:
        return "only in candidate" if old is None else "only in baseline"
    if old.verdict == new.verdict:
        return "same"
    return "broken" if old.verdict == "right" else "mended" if new.verdict == "right" else "other verdict"


def _differences(old: dict[str, str], new: dict[str, str]) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys((*old, *new))
    pairs = {name: (old.get(name, "not set"), new.get(name, "not set")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _texts(values: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}

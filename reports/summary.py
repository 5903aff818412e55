"""What a report or a comparison says in one line, and about its run: shared by Markdown and HTML."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd

from reports.compare import HARDWARE, Comparison
from reports.records import AtlasVerdict, Report, RunInfo, VerdictRow, whole_checks
from reports.text_tables import MISSING, format_cell, format_number

Tone = Literal["good", "bad", "warn", "quiet"]

TONES: dict[str, Tone] = {
    "pass": "good", "finding": "bad", "error": "warn", "skipped": "quiet",
    "broken": "bad", "new finding": "bad", "slower": "bad", "worse error": "warn",
    "no longer compared": "warn", "still failing": "warn",
    "too noisy": "quiet", "fixed": "good", "now compared": "good", "faster": "good",
    "other verdict": "warn", "mended": "good",
    "wrong": "bad", "crashed": "warn", "refused unclearly": "warn", "refused clearly": "quiet", "not compared": "quiet",
    "right": "good",
    "rounding": "good", "bug": "bad", "can't tell": "warn",
    "same": "quiet", "only in baseline": "quiet", "only in candidate": "quiet",
}  # fmt: skip

LAYOUT = ("workload", "case", "model", "engine", "layout", "subject", "dtype", "fabric", "tp_size", "metric", "rounds")
"""Columns that are told once above a table if all its rows agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The verdict on a whole report: ``text`` in words, ``detail`` in numbers."""

    text: str
    detail: str
    tone: Tone


def report_headline(report: Report) -> Headline:
    """The verdict on a run, agreeing with its exit code."""
    if report.verdict is not None:
        return _verdict_headline(report.verdict)
    checks = whole_checks(report.checks)
    counts = Counter[str](row.verdict for row in checks)
    measured = f"{plural(len(report.benches), 'benchmark case')} measured"
    compared = sum(row.compared for row in report.checks)
    parts = [f"{counts[name]} {word}" for name, word in (
        ("pass", "passed"), ("finding", "with a finding"), ("error", "could not run"), ("skipped", "skipped"),
    ) if counts[name]]  # fmt: skip
    if report.checks:
        values = f"{format_number(compared)} values compared"
        detail = f"{plural(len(checks), 'check')}: {', '.join(parts)}; {values}"
    else:
        detail = ""
    if report.benches:
        engines = ", ".join(dict.fromkeys(row.engine for row in report.benches))
        detail += f"; {measured}" if detail else f"Engines: {engines}"
    if report.not_measured:
        detail += f"; {len(report.not_measured)} not measured"
    if report.atlas:
        return _atlas_headline(report)
    if report.scores:
        runs = sum(row.runs for row in report.scores if row.rule == report.scores[0].rule)
        rules = len({row.rule for row in report.scores})
        return Headline(text=f"{plural(rules, 'rule')} scored", detail=f"{plural(runs, 'pair')} of streams", tone="good")
    if counts["finding"]:
        findings = sum(row.verdict == "finding" for row in report.checks)
        return Headline(text=plural(findings, "finding"), detail=detail, tone="bad")
    if counts["error"]:
        return Headline(text=f"{plural(counts['error'], 'check')} could not run", detail=detail, tone="warn")
    if report.exit_code:
        return Headline(text="Nothing was compared", detail=detail or "no check and no benchmark ran", tone="warn")
    text = f"{plural(counts['pass'], 'check')} passed" if report.checks else measured
    return Headline(text=text, detail=detail, tone="good")


def _verdict_headline(row: VerdictRow) -> Headline:
    text = {"rounding": "Rounding", "bug": "A bug", "can't tell": "Can't tell"}[row.answer]
    return Headline(text=text, detail=row.why, tone=TONES[row.answer])


def _atlas_headline(report: Report) -> Headline:
    counts = Counter[str](row.verdict for row in report.atlas)
    detail = (f"{plural(len({row.architecture for row in report.atlas}), 'architecture')}, {plural(len(report.atlas), 'row')}: "
              + ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(AtlasVerdict) if counts[verdict]))
    if whole := sum(row.verdict == "right" and row.sharded is not None and row.sharded < 0.5 for row in report.atlas):
        detail += f"; of those right, {whole} shard less than half of their parameters"
    if counts["wrong"]:
        return Headline(text=f"{plural(counts['wrong'], 'row')} wrong", detail=detail, tone="bad")
    if counts["right"]:
        return Headline(text="Nothing wrong", detail=detail, tone="good")
    return Headline(text="Nothing was compared", detail=detail, tone="warn")


def comparison_headline(comparison: Comparison) -> Headline:
    """The verdict on a comparison, agreeing with its exit code."""
    counts = comparison.counts
    detail = ", ".join(f"{count} {verdict}" for verdict in TONES if (count := counts[verdict]))
    if comparison.differences and comparison.speeds:
        unlike = (f"{name} {old} → {new}" for name, (old, new) in comparison.differences.items())
        detail += f"; unlike machines: {', '.join(unlike)}"
    if comparison.machine_lost > 1 + comparison.smallest_effect:
        detail += f"; the machine itself was up to {comparison.machine_lost:.3g} times slower ({HARDWARE})"
    if comparison.regressions:
        text = plural(len(comparison.regressions), "regression")
        return Headline(text=text, detail=detail, tone="bad")
    if comparison.exit_code:
        return Headline(text="Nothing was compared", detail=detail or "both reports are empty", tone="warn")
    if counts["slower"]:
        text = f"{plural(counts['slower'], 'row')} slower, not held against it"
        return Headline(text=text, detail=detail, tone="warn")
    return Headline(text="No regression", detail=detail, tone="good")


def speed_note(comparison: Comparison) -> str:
    """How the speed verdicts came about, in a few words."""
    effect, sure = f"{100 * comparison.smallest_effect:g} %", f"{100 * comparison.confidence:g} %"
    fails_at = comparison.fails_at
    if fails_at is None:
        gate = "A slower row is reported and does not fail the comparison."
    elif fails_at == 1:
        gate = "A slower row fails the comparison."
    else:
        gate = (f"A row that is for sure {fails_at:.3g} times slower at least fails the comparison; others are reported: a CPU's "
                "speed changes from run to run.")
    if comparison.differences:
        gate += " The machines differ: their speeds say little about the code."
    what = "the median ratio of rounds that took turns" if comparison.in_turns else "the ratio of medians"
    return (
        f"Times better is {what}, above 1 is better; slower or faster needs a change of "
        f"{effect} and an interval ({sure} sure for all rows together) that excludes 1. {gate}"
    )


def run_facts(run: RunInfo, models: list[str]) -> dict[str, str]:
    """What ran and where, for the head of a page: name -> value."""
    machine = run.machine
    gpus = Counter(f"{gpu.name}, driver {gpu.driver}" for gpu in machine.gpus)
    facts = {
        "model": ", ".join(models),
        "commit": (run.commit[:12] if run.commit else "not in a repository") + (" + uncommitted changes" if run.dirty else ""),
        "machine": f"{machine.type}: {machine.cpu}, {plural(machine.cores, 'core')}, "
        f"{format_number(round(machine.memory_gib, 1))} GiB",
        "GPUs": "; ".join(f"{count} × {name}" for name, count in gpus.items()),
        "started": run.started_at.replace("T", " ").replace("+00:00", " UTC").replace("Z", " UTC"),
        "version": run.version or "",
        "took": duration(run.seconds),
        "seed": "" if run.seed is None else str(run.seed),
    }
    return {name: value for name, value in facts.items() if value}


def models_of(report: Report) -> list[str]:
    """Every model named in a report, in the order of its rows."""
    names = [row.model for row in report.checks] + [row.model for row in report.benches]
    return list(dict.fromkeys(name for name in names if name))


def duration(seconds: float) -> str:
    """``seconds`` for people: ``0.42 s``, ``12 s``, ``3 min 5 s``, ``2 h 1 min``."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, noun: str) -> str:
    """``1 check``, ``2 checks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def without_constants(table: pd.DataFrame, names: tuple[str, ...] = LAYOUT) -> tuple[pd.DataFrame, dict[str, str]]:
    """``table`` without empty columns and without those of ``names`` that hold one value, and this value."""
    table = table[[name for name in table.columns if table[name].notna().any()]]
    if len(table) < 2:
        return table, {}
    constant = [name for name in names if name in table and table[name].nunique(dropna=False) == 1]
    told = {name: format_cell(table[name].iloc[0]) for name in constant}
    return table.drop(columns=constant), {name: text for name, text in told.items() if text != MISSING}

"""The whole of ``shardproof calibrate``: sample, fit, judge, and see what can be seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from harness.calibrate.collect import DTYPES, TP_SIZES, Pools, sample_models
from harness.calibrate.draws import Shape
from harness.calibrate.judge import SETTINGS, Verdict, judge
from harness.calibrate.power import POWER_CHECKS, Threshold, power_of_drawn, power_of_logits
from harness.calibrate.power import TP_SIZES as POWER_TP_SIZES
from harness.calibrate.report import make_report
from harness.calibrate.samples import Sample
from harness.machine import run_info
from reports.records import Report

DEFAULT_MODELS = 15

OnProgress = Callable[[str, int, int], None]
"""(what is done, cases done, cases of it in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratePlan:
    """How much of everything is drawn. ``models`` float32 models are judged under every setting, a third of that in 16 bits."""

    models: int = DEFAULT_MODELS
    seed: int = 0
    settings: tuple[str, ...] = tuple(SETTINGS)

    def __post_init__(self) -> None:
        if self.models < 1:
            raise ValueError(f"models={self.models} must be at least 1")

    @property
    def fitted_models(self) -> int:
        """Each is sampled at every one of ``TP_SIZES``."""
        return 4 * self.models

    @property
    def judged_models(self) -> dict[str, int]:
        """By dtype, under each setting."""
        return {dtype: self.models if dtype == "float32" else -(-self.models // 3) for dtype in DTYPES}

    @property
    def planted(self) -> int:
        """Sums of integers and of reals in which errors are planted, for each check, dtype and tp_size."""
        return 7 * self.models

    def draw(self, what: str) -> random.Random:
        """A generator of its own for each part."""
        return random.Random(f"{self.seed}/{what}")


@dataclass(slots=True)
class Findings:
    """What has been found so far."""

    samples: list[Sample] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    thresholds: list[Threshold] = field(default_factory=list)


def calibrate(plan: CalibratePlan, on_progress: OnProgress = lambda what, done, total: None) -> tuple[Report, bool]:
    """The report, and whether it was interrupted: then it holds what was finished, and names what was not."""
    started_at = datetime.now(UTC)
    found = Findings()
    left: str | None = None
    with Pools() as pools:
        try:
            for what, done, total in _work(plan, pools, found):
                left = what
                on_progress(what, done, total)
            left = None
        except KeyboardInterrupt:
            left = left or "sampling models"
    report = make_report(found.samples, found.verdicts, found.thresholds, interrupted_in=left,
                         run=lambda: run_info("calibrate", started_at=started_at, seed=plan.seed))
    return report, left is not None


def _work(plan: CalibratePlan, pools: Pools, found: Findings) -> Iterator[tuple[str, int, int]]:
    """Do it all, and say before and after each part how far it is."""
    seen: set[Shape] = set()
    what, total = "sampling models", plan.fitted_models * len(TP_SIZES)
    yield what, 0, total
    for number, sample in enumerate(sample_models(pools, plan.draw("fit models"), plan.fitted_models, seen), 1):
        found.samples.append(sample)
        yield what, number, total
    what, total = "judging runs, by setting and dtype", len(plan.settings) * len(DTYPES)
    yield what, 0, total
    for number, verdicts in enumerate(judge(plan.settings, plan.judged_models, plan.seed), 1):
        found.verdicts += verdicts
        yield what, number, total
    for check in (*POWER_CHECKS, "logits"):
        kinds_of_values = 1 if check == "logits" else 2
        what, total = f"errors planted in {check}", plan.planted * len(DTYPES) * len(POWER_TP_SIZES) * kinds_of_values
        yield what, 0, total
        for number, threshold in enumerate(_thresholds(plan, pools, check), 1):
            found.thresholds.append(threshold)
            yield what, number, total


def _thresholds(plan: CalibratePlan, pools: Pools, check: str) -> Iterator[Threshold]:
    for dtype in DTYPES:
        if check == "logits":
            yield from power_of_logits(pools, plan.draw(f"power logits {dtype}"), dtype, plan.planted)
            continue
        for tp_size in POWER_TP_SIZES:
            yield from power_of_drawn(check, pools, plan.draw(f"power {check} {dtype} {tp_size}"), dtype, tp_size, plan.planted)

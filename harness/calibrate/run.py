"""The whole of ``shardproof calibrate``: sample, fit, judge, and see what can be seen."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from harness.calibrate.collect import DTYPES, TP_SIZES, Pools, sample_layers, sample_models
from harness.calibrate.draws import Shape, drawn_models
from harness.calibrate.judge import DRAWN_CHECKS, Verdict, judge_drawn, judge_model, loaded
from harness.calibrate.judge import TP_SIZES as JUDGED_TP_SIZES
from harness.calibrate.power import POWER_CHECKS, Threshold, power_of_drawn, power_of_logits
from harness.calibrate.power import TP_SIZES as POWER_TP_SIZES
from harness.calibrate.report import make_report
from harness.calibrate.samples import Sample
from harness.machine import run_info
from reports.records import Report

DEFAULT_CASES, FEWEST_CASES = 6000, 20
PLANTED_PER_MODEL = 3

OnProgress = Callable[[str, int, int], None]
"""(what is done, cases done, cases of it in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratePlan:
    """How much of everything is drawn. ``cases`` is about how many clean cases are judged."""

    cases: int = DEFAULT_CASES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cases < FEWEST_CASES:
            raise ValueError(f"cases={self.cases} must be at least {FEWEST_CASES}: of fewer nothing can be told")

    @property
    def fitted_layers(self) -> int:
        return self.cases // 2

    @property
    def fitted_models(self) -> int:
        """Each is sampled at every one of ``TP_SIZES``."""
        return max(len(DTYPES), self.cases // 120)

    @property
    def judged(self) -> dict[str, int]:
        """Cases of each check that draws by itself."""
        shares = {"collectives": 0.4, "layers": 0.4, "attention": 0.05}
        return {check: max(1, round(self.cases * shares[check])) for check in DRAWN_CHECKS}

    @property
    def judged_models(self) -> int:
        """Each is judged at every one of ``JUDGED_TP_SIZES``, by each of ``MODEL_CHECKS``."""
        return max(len(DTYPES), self.cases // 70)

    @property
    def planted(self) -> int:
        """Sums of integers and of reals in which errors are planted, for each check, dtype and tp_size."""
        return max(5, self.cases // 60)

    def draw(self, what: str) -> random.Random:
        """A generator of its own for each part."""
        return random.Random(f"{self.seed}/{what}")


@dataclass(slots=True)
class Findings:
    """What has been found so far."""

    samples: list[Sample] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    thresholds: list[Threshold] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of judging, by check."""


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
            left = left or "sampling layers"
    report = make_report(found.samples, found.verdicts, found.thresholds, found.seconds, interrupted_in=left,
                         run=lambda: run_info("calibrate", started_at=started_at, seed=plan.seed))
    return report, left is not None


def _work(plan: CalibratePlan, pools: Pools, found: Findings) -> Iterator[tuple[str, int, int]]:
    """Do it all, and say before and after each case how far it is."""
    seen: set[Shape] = set()
    yield "sampling layers", 0, plan.fitted_layers
    for number, samples in enumerate(sample_layers(pools, plan.draw("fit layers"), plan.fitted_layers, seen), 1):
        found.samples += samples
        yield "sampling layers", number, plan.fitted_layers
    total = plan.fitted_models * len(TP_SIZES)
    yield "sampling models", 0, total
    for number, sample in enumerate(sample_models(pools, plan.draw("fit models"), plan.fitted_models, seen), 1):
        found.samples.append(sample)
        yield "sampling models", number, total
    for check, num_cases in plan.judged.items():
        yield f"judging {check}", 0, num_cases
        started = time.perf_counter()
        for number, verdict in enumerate(judge_drawn(check, pools, plan.draw(f"judge {check}"), num_cases, seen), 1):
            found.verdicts.append(verdict)
            found.seconds[check] += (now := time.perf_counter()) - started
            started = now
            yield f"judging {check}", number, num_cases
    yield from _work_on_models(plan, pools, found, seen)
    for check in POWER_CHECKS:
        layouts_of_power = [(dtype, tp_size) for dtype in DTYPES for tp_size in POWER_TP_SIZES]
        total = 2 * plan.planted * len(layouts_of_power)
        number = 0
        yield f"errors planted in {check}", 0, total
        for dtype, tp_size in layouts_of_power:
            draw = plan.draw(f"power {check} {dtype} {tp_size}")
            for threshold in power_of_drawn(check, pools, draw, dtype, tp_size, plan.planted):
                found.thresholds.append(threshold)
                number += 1
                yield f"errors planted in {check}", number, total


def _work_on_models(plan: CalibratePlan, pools: Pools, found: Findings, seen: set[Shape]) -> Iterator[tuple[str, int, int]]:
    what, total, number = "judging models", plan.judged_models * len(JUDGED_TP_SIZES), 0
    draw, power_draw = plan.draw("judge models"), plan.draw("power logits")
    yield what, 0, total
    for truth in drawn_models(draw, "judge", plan.judged_models, DTYPES, seen):
        for tp_size in JUDGED_TP_SIZES:
            ranks = loaded(pools, draw, truth, tp_size)
            started = time.perf_counter()
            for verdict in judge_model(ranks, truth):
                found.verdicts.append(verdict)
                found.seconds[verdict.check] += (now := time.perf_counter()) - started
                started = now
            if tp_size in POWER_TP_SIZES:
                found.thresholds += power_of_logits(ranks, truth, power_draw, PLANTED_PER_MODEL)
            number += 1
            yield what, number, total

"""``shardproof bench``: candidate, peers and baseline take turns, round by round, and their figures become rows."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from harness.bench import micro
from harness.bench.plan import BenchPlan, Setting
from harness.bench.step import Outcome, Watcher
from harness.bench.steps import Steps, Workers
from reports.records import Report, RunInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Reports by side: ``candidate``, and ``baseline`` if there is one. ``failed``: the project's own engine did not run."""

    reports: dict[str, Report]
    interrupted: bool
    failed: bool


def run_bench(plan: BenchPlan, watcher: Watcher | None = None, *, argv: list[str] | None = None, workers: Workers | None = None,
              with_hardware: bool = True) -> BenchResult:
    """Run the plan. Ctrl-C ends it early: what is finished is in the reports, and so is what is not.

    Args:
        argv: the command line, for the report.
        workers: those of an earlier run, to go on with; they stay, unless it is interrupted.
        with_hardware: measure the hardware's ceilings first; without them no row has a bound.

    Raises:
        ValueError: if the model can't be run as planned.
        WorkerError: if not even the first worker starts.
    """
    started_at = datetime.now(UTC)
    setting = Setting.of(plan)
    watcher = watcher or Watcher()
    outcome = Outcome(rows={}, watcher=watcher)
    pool = workers or Workers()
    all_steps = Steps(setting, pool, outcome)
    outcome.rows |= {side.name: [] for side in all_steps.sides}
    heads: dict[str, RunInfo] = {}
    interrupted = True  # whatever ends it but a last step that is done
    try:
        for side in all_steps.sides:
            watcher.on_status(f"starting {side.name}")
            heads[side.name] = pool.first_micro(side, setting).call(
                micro.describe, "bench", started_at, plan.seed, argv if argv is not None else ["shardproof", *sys.argv[1:]],
                timeout_s=300.0)
        steps = list(all_steps.steps(with_hardware=with_hardware))
        try:
            while steps:
                steps[0].run(outcome)
                steps.pop(0)
            interrupted = False
        except KeyboardInterrupt:
            for step in steps[1:]:
                step.say_interrupted(outcome)
    finally:
        if interrupted or workers is None:
            pool.close(at_once=interrupted)
    seconds = (datetime.now(UTC) - started_at).total_seconds()
    reports = {name: Report(run=replace(head, seconds=seconds), benches=outcome.rows[name], not_measured=outcome.missing)
               for name, head in heads.items()}
    return BenchResult(reports=reports, interrupted=interrupted, failed=outcome.failed)

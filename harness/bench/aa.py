"""Does ``compare`` cry wolf, and does it see the wolf? ``python -m harness.bench.aa`` asks a hundred times each.

The same code is measured against itself, and then against itself with one layer slowed down by a tenth: both sides run the
workload ``layers-subset`` with one rank, each on fresh ranks for every comparison, taking turns round by round, and
``compare`` judges the two records. The answer is a record too, with one row a question.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.bench.bench import run_bench
from harness.bench.lineup import BASELINE, CANDIDATE, Workers
from harness.bench.plan import BenchPlan
from harness.bench.shapes import model_folder
from harness.bench.worker import CHECKOUT
from harness.machine import run_info
from reports.compare import Comparison, compare
from reports.records import CheckRow, Report, write_report
from reports.render import write_all

ALLOWED_ALARMS, ALLOWED_MISSES = 0.02, 0.05
"""Shares of comparisons: with any slower row though nothing changed, and without one where there is a slow-down."""
WORKLOAD = "layers-subset"
RENEW_EVERY = 10
"""Comparisons on one pair of interpreters: where one lies in memory makes Python code up to 4 % faster or slower."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a number of comparisons said.

    hits      comparisons with a slower row among those that count
    by_row    how often each row was called slower
    ratios    candidate's median time over the baseline's, of every row in every comparison
    """

    comparisons: int = 0
    compared: int = 0
    hits: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    by_row: Counter[str] = field(default_factory=Counter)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def add(self, comparison: Comparison, counts: Callable[[str], bool]) -> None:
        """``counts`` says whether a slower row of this case is what is looked for."""
        self.comparisons += 1
        self.compared += len(comparison.speeds)
        slower = [change.case for change in comparison.speeds if change.verdict == "slower"]
        self.hits += any(map(counts, slower))
        self.by_row.update(slower)
        self.verdicts.update(change.verdict for change in comparison.speeds)
        for change in comparison.speeds:
            assert change.gain is not None, f"{change.case} is in one record only"
            self.ratios.setdefault(change.case, []).append(1 / change.gain)


def ask(plan: BenchPlan, comparisons: int, counts: Callable[[str], bool],
        on_progress: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """Compare the plan's two sides so often, each time on fresh ranks. Ctrl-C ends it early."""
    tally = Tally()
    workers = Workers()
    try:
        while tally.comparisons < comparisons:
            if tally.comparisons % RENEW_EVERY == 0:
                workers.close()
            started = time.perf_counter()
            result = run_bench(plan, workers=workers, with_hardware=False)
            if result.interrupted:
                break
            if result.failed:
                raise RuntimeError("; ".join(item.reason for item in result.reports[CANDIDATE].not_measured))
            # Two sides took their turns in this time.
            tally.seconds.append((time.perf_counter() - started) / 2)
            tally.add(compare(result.reports[BASELINE], result.reports[CANDIDATE], gate=True), counts)
            on_progress(tally)
    finally:
        workers.close()
    return tally


def row_of(check: str, plan: BenchPlan, tally: Tally, *, wrong: int, allowed: int, message: str) -> CheckRow:
    """The answer to one question: ``wrong`` comparisons, of which ``allowed`` may be."""
    error = wrong / allowed if allowed else math.inf if wrong else 0.0
    ordered = {case: sorted(values) for case, values in tally.ratios.items()}
    extra: dict[str, Any] = {
        "wrong": wrong, "allowed": allowed, "verdicts": dict(tally.verdicts), "called_slower": dict(tally.by_row),
        "median_time_ratio": {case: round(values[len(values) // 2], 4) for case, values in ordered.items()},
        "largest_time_ratio": {case: round(values[-1], 4) for case, values in ordered.items()},
        "smallest_time_ratio": {case: round(values[0], 4) for case, values in ordered.items()},
        "median_seconds_a_run": round(sorted(tally.seconds)[len(tally.seconds) // 2], 2),
    }
    return CheckRow(check=check, model=plan.model, tp_size=1, fabric="solo", dtype=plan.dtype, cases=tally.comparisons,
                    compared=tally.compared, verdict="pass" if error <= 1 else "finding", error_over_budget=error,
                    seconds=round(2 * sum(tally.seconds), 1), message="" if error <= 1 else message, extra=extra)


def run(model: str, folder: Path, *, comparisons: int, layer: str, share: float, dtype: str = "bfloat16",
        rounds: int | None = None,
        on_progress: Callable[[str], None] = lambda text: None) -> Report:
    """Both questions, ``comparisons`` times each."""
    started_at = datetime.now(UTC)
    rows = []
    questions: tuple[dict[str, float], ...] = ({}, {layer: share})
    for slower in questions:
        plan = BenchPlan(model=model, folder=folder, workloads=(WORKLOAD,), device="cpu", dtype=dtype, against=CHECKOUT,
                         slower=slower, rounds=rounds)
        name = f"{100 * share:g} % more work in {layer}" if slower else "the same code"

        def say(tally: Tally, name: str = name) -> None:
            rows = ", ".join(f"{case} × {count}" for case, count in tally.by_row.items())
            on_progress(f"{name}: {tally.hits} of {tally.comparisons} comparisons with a slower row"
                        f"{f' ({rows})' if rows else ''}, {tally.seconds[-1]:.1f} s a run")

        tally = ask(plan, comparisons, (lambda case: case.startswith(f"{layer},")) if slower else lambda case: True, say)
        if not tally.comparisons:
            break
        wrong, share_allowed = (tally.comparisons - tally.hits, ALLOWED_MISSES) if slower else (tally.hits, ALLOWED_ALARMS)
        what = "were not called slower" if slower else "had a slower row"
        rows.append(row_of(name, plan, tally, wrong=wrong, allowed=math.floor(share_allowed * tally.comparisons),
                           message=f"{wrong} of {tally.comparisons} comparisons {what}"))
        if tally.comparisons < comparisons:
            break  # interrupted
    return Report(run=run_info("bench aa", started_at=started_at, seed=None, argv=["python", "-m", "harness.bench.aa",
                                                                                 *sys.argv[1:]]), checks=rows)


def main() -> int:
    """The command line. Exits 0 if compare was right often enough, 1 if not, 3 if nothing was compared."""
    parser = argparse.ArgumentParser(prog="python -m harness.bench.aa", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="whose layers are measured")
    parser.add_argument("--comparisons", type=int, default=100, help="of each kind")
    parser.add_argument("--layer", default="down_proj", help="which layer is slowed down")
    parser.add_argument("--share", type=float, default=0.1, help="of the layer's work that is done on top")
    parser.add_argument("--save-baseline", action="store_true", help="also write reports/baselines/<machine type>/aa.json")
    parser.add_argument("--out", type=Path, default=Path("reports/out/aa"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parser.parse_args()
    if options.comparisons < 1:
        parser.error(f"--comparisons={options.comparisons} must be at least 1")
    report = run(options.model, model_folder(options.model), comparisons=options.comparisons, layer=options.layer,
                 share=options.share, on_progress=lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    paths = write_all(report, options.out)
    sys.stdout.write(paths["md"].read_text())
    if options.save_baseline and report.exit_code == 0:
        path = Path("reports/baselines") / report.run.machine.type / "aa.json"
        sys.stdout.write(f"\nbaseline: {write_report(path, report)}\n")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())

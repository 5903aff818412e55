"""False positives and detection rate of ``compare``: ``python -m harness.studies.aa`` counts a hundred comparisons of each kind.

The same code is measured against itself, and then against itself with one layer slowed down by a tenth: both sides run the
workload ``layers-subset`` with one rank, each on fresh ranks for every comparison, taking turns round by round, and
``compare`` judges the two records. The answer is a record too, with one row a question. It takes about half an hour;
``--minutes`` ends a piece of it, and the same command goes on from what is there.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.shardproof.command import check_packages

if __name__ == "__main__":
    check_packages()  # before what may be somebody else's is imported

from harness.bench.bench import BASELINE, CANDIDATE, Workers, run_bench
from harness.bench.plan import BenchPlan
from harness.bench.shapes import model_folder
from harness.bench.worker import CHECKOUT
from harness.cli import exit_with
from harness.commands.options import prepare_out
from harness.errors import UsageError, usage
from harness.machine import run_info
from reports.compare import Comparison, compare, fingerprint
from reports.records import CheckRow, Report, RunInfo, read_report, write_report
from reports.render import write_all

ALLOWED_ALARMS, ALLOWED_MISSES = 0.02, 0.05
"""Shares of comparisons: with any slower row though nothing changed, and without one where there is a slow-down."""
WORKLOAD = "layers-subset"
RENEW_EVERY = 10
"""Comparisons on one pair of interpreters: where one lies in memory makes Python code up to 4 % faster or slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one comparison said.

    slower    cases that were called slower
    verdicts  how many rows got which
    ratios    candidate's median time over the baseline's, by case
    seconds   of one run; both sides took their turns in twice this time
    """

    slower: list[str]
    verdicts: dict[str, int]
    ratios: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, comparison: Comparison, seconds: float) -> Judged:
        ratios = {}
        for change in comparison.speeds:
            assert change.gain is not None, f"{change.case} is in one record only"
            ratios[change.case] = round(1 / change.gain, 4)
        return cls(slower=[change.case for change in comparison.speeds if change.verdict == "slower"],
                   verdicts=dict(Counter[str](change.verdict for change in comparison.speeds)), ratios=ratios,
                   seconds=round(seconds, 2))


@dataclass(slots=True, kw_only=True)
class Question:
    """One of the two questions, and what the comparisons so far said. ``slower``: layer -> share; empty for the same code."""

    slower: dict[str, float]
    judged: list[Judged] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As in the record."""
        return ", ".join(f"{100 * share:g} % more work in {layer}" for layer, share in self.slower.items()) or "the same code"

    def is_hit(self, judged: Judged) -> bool:
        """Whether a row was called slower: any row, or, where a layer was slowed down, one of that layer."""
        return any(not self.slower or case.split(",")[0] in self.slower for case in judged.slower)

    @property
    def hits(self) -> int:
        """Comparisons with such a row."""
        return sum(map(self.is_hit, self.judged))

    def row(self, model: str, dtype: str) -> CheckRow:
        """The answer so far."""
        count = len(self.judged)
        wrong, share = (count - self.hits, ALLOWED_MISSES) if self.slower else (self.hits, ALLOWED_ALARMS)
        allowed = math.floor(share * count)
        error = wrong / allowed if allowed else math.inf if wrong else 0.0
        what = "were not called slower" if self.slower else "had a slower row"
        ratios = {case: sorted(judged.ratios[case] for judged in self.judged) for case in self.judged[0].ratios}
        verdicts = sum((Counter(judged.verdicts) for judged in self.judged), Counter[str]())
        seconds = sorted(judged.seconds for judged in self.judged)
        extra: dict[str, Any] = {
            "wrong": wrong, "allowed": allowed, "verdicts": dict(verdicts),
            "called_slower": dict(Counter(case for judged in self.judged for case in judged.slower)),
            "median_time_ratio": {case: values[count // 2] for case, values in ratios.items()},
            "smallest_time_ratio": {case: values[0] for case, values in ratios.items()},
            "largest_time_ratio": {case: values[-1] for case, values in ratios.items()},
            "median_seconds_a_run": seconds[count // 2], "longest_seconds_a_run": seconds[-1],
            "comparisons": [asdict(judged) | {"ratios": list(judged.ratios.values())} for judged in self.judged],
        }
        return CheckRow(check=self.name, model=model, tp_size=1, fabric="solo", dtype=dtype, cases=count,
                        compared=verdicts.total(), verdict="pass" if error <= 1 else "finding", error_over_budget=error,
                        seconds=round(2 * sum(seconds), 1), extra=extra,
                        message="" if error <= 1 else f"{wrong} of {count} comparisons {what}")

    def take(self, row: CheckRow) -> None:
        """Go on from the comparisons of ``row``."""
        cases = list(row.extra["median_time_ratio"])
        self.judged += [Judged(**judged | {"ratios": dict(zip(cases, judged["ratios"], strict=True))})
                        for judged in row.extra["comparisons"]]


def ask(plan: BenchPlan, question: Question, comparisons: int, is_over: Callable[[], bool],
        on_progress: Callable[[Question], None]) -> bool:
    """Compare the plan's two sides so often more, each time on fresh ranks; False if it ended early."""
    workers = Workers()
    try:
        for _ in range(comparisons):
            if is_over():
                return False
            started = time.perf_counter()
            result = run_bench(replace(plan, slower=question.slower), workers=workers, with_hardware=False)
            if result.interrupted:
                return False
            if result.failed:
                raise RuntimeError("; ".join(item.reason for item in result.reports[CANDIDATE].not_measured))
            comparison = compare(result.reports[BASELINE], result.reports[CANDIDATE], gate=True, in_turns=True)
            question.judged.append(Judged.of(comparison, (time.perf_counter() - started) / 2))
            on_progress(question)
    finally:
        workers.close()
    return True


def study(plan: BenchPlan, questions: list[Question], comparisons: int, *, is_over: Callable[[], bool] = lambda: False,
          on_progress: Callable[[Question], None] = lambda question: None) -> bool:
    """Ask every question until it has so many answers, in turns of a few; False if it ended early. Ctrl-C ends it."""
    while open_ := [question for question in questions if len(question.judged) < comparisons]:
        question = min(open_, key=lambda each: len(each.judged))
        if not ask(plan, question, min(RENEW_EVERY, comparisons - len(question.judged)), is_over, on_progress):
            return False
    return True


def go_on_from(path: Path, questions: list[Question], now: RunInfo) -> None:
    """Take what an earlier piece has found.

    Raises:
        UsageError: if it asked something else, of other code or on another machine.
    """
    earlier = read_report(path)
    rows = {row.check: row for row in earlier.checks}
    if unknown := set(rows) - {question.name for question in questions}:
        raise UsageError(f"{path} answers {sorted(unknown)}: other questions; name another folder (--out)")
    was, is_ = ({"commit": str(run.commit)} | fingerprint(run) for run in (earlier.run, now))
    if was != is_:
        differs = "; ".join(f"{name}: {was[name]} then, {is_.get(name)} now" for name in was if was[name] != is_.get(name))
        raise UsageError(f"{path} cannot be gone on from ({differs}); name another folder (--out)")
    for question in questions:
        with suppress(KeyError):
            question.take(rows[question.name])


def main() -> int:
    """The command line. Exits 0 if compare was right often enough, 1 if not, 3 if there are comparisons still to make."""
    parser = argparse.ArgumentParser(prog="python -m harness.studies.aa", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="whose layers are measured")
    parser.add_argument("--comparisons", type=int, default=100, help="of each kind")
    parser.add_argument("--layer", default="down_proj", help="which layer is slowed down")
    parser.add_argument("--share", type=float, default=0.1, help="of the layer's work that is done on top")
    parser.add_argument("--minutes", type=float, help="end this piece then; the same command goes on from there")
    parser.add_argument("--save-baseline", action="store_true", help="also write reports/baselines/<machine>/aa.json")
    parser.add_argument("--out", type=Path, default=Path("reports/out/aa"), help="also where an earlier piece is looked for")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = parser.parse_args()
    if options.comparisons < 1:
        parser.error(f"--comparisons={options.comparisons} must be at least 1")
    started_at, argv = datetime.now(UTC), ["python", "-m", "harness.studies.aa", *sys.argv[1:]]
    questions = [Question(slower={}), Question(slower={options.layer: options.share})]
    head = run_info("bench aa", started_at=started_at, seed=None, argv=argv)
    if (options.out / "report.json").is_file():
        go_on_from(options.out / "report.json", questions, head)
    prepare_out(options.out, set_aside=False)
    with usage():
        plan = BenchPlan(model=options.model, folder=model_folder(options.model), workloads=(WORKLOAD,), device="cpu",
                         dtype="bfloat16", against=CHECKOUT)
    ends_at = time.monotonic() + 60 * (options.minutes or math.inf)
    is_done = False
    with suppress(KeyboardInterrupt):  # between two runs: within one, the run has answered it
        is_done = study(plan, questions, options.comparisons, is_over=lambda: time.monotonic() > ends_at, on_progress=_say)
    rows = [question.row(options.model, plan.dtype) for question in questions if question.judged]
    report = Report(run=replace(head, seconds=sum(row.seconds for row in rows)), checks=rows)
    paths = write_all(report, options.out)
    sys.stdout.write(paths["md"].read_text())
    if not is_done:
        sys.stdout.write("\nnot done yet: run the same command again to go on\n")
        return 3
    if options.save_baseline:
        path = Path("reports/baselines") / report.run.machine.folder / "aa.json"
        sys.stdout.write(f"\nbaseline: {write_report(path, report)}\n")
    return report.exit_code


def _say(question: Question) -> None:
    rows = ", ".join(f"{case} × {count}" for case, count in
                     Counter(case for judged in question.judged for case in judged.slower).items())
    sys.stderr.write(f"{question.name}: {question.hits} of {len(question.judged)} comparisons with a slower row"
                     f"{f' ({rows})' if rows else ''}, {question.judged[-1].seconds:.1f} s a run\n")


if __name__ == "__main__":
    try:
        exit_code = main()
    except (Exception, KeyboardInterrupt) as error:
        exit_code = exit_with(error)
    sys.exit(exit_code)

"""How often ``verdict`` is wrong, beside the rules that people use: ``python -m harness.studies.scoreboard``.

Draws pairs of streams whose answer is known, asks every rule, and counts. What is done stands in ``said.jsonl`` in the folder of
the report: ``--minutes`` ends a piece of the work, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from harness.cli import exit_with
from harness.faults.models import FaultModels
from harness.machine import run_info
from harness.names import BASELINES
from harness.studies.score.counts import Line, line_of, scores
from harness.studies.score.pairs import (
    DTYPES,
    FITTED_SEED,
    JUDGED_SEED,
    NUM_TOKENS,
    TP_SIZES,
    Subjects,
    clean_pairs,
    faulty_pair,
    plantable,
)
from reports.records import Report, write_report
from reports.render import write_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, ask, count. Returns an exit code: 1 if ``verdict`` called a clean pair a bug."""
    parser = argparse.ArgumentParser(prog="python -m harness.studies.scoreboard", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first clean model; those of a record are not fresh")
    parser.add_argument("--models", type=int, default=300, help="number of clean models")
    parser.add_argument("--single", action="store_true", help="of each model one pair, judged once by each form of verdict")
    parser.add_argument("--fitted", action="store_true", help="also the models that the bounds were fitted on, counted apart")
    parser.add_argument("--seeds", type=int, default=1, help="times that each fault is planted in each dtype")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so long; the same command goes on")
    parser.add_argument("--out", type=Path, default=Path("reports/out/scoreboard"))
    parser.add_argument("--save-baseline", action="store_true", help="write the record to reports/baselines too")
    options = parser.parse_args(arguments)
    argv = ["python", "-m", "harness.studies.scoreboard", *(sys.argv[1:] if arguments is None else arguments)]
    started_at, deadline = datetime.now(UTC), time.monotonic() + 60 * options.minutes
    path: Path = options.out / "said.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    done = {line["pair"] for line in lines}
    with path.open("a", encoding="utf-8") as file, closing(_drawn(options, done)) as source:
        while time.monotonic() < deadline and (line := next(source, None)) is not None:
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            sys.stderr.write(f"{line['pair']}\n")
    if not (rows := scores(lines)):
        sys.stderr.write("nothing is judged yet\n")
        return 3
    report = Report(run=run_info("scoreboard", started_at=started_at, seed=0, argv=argv), scores=rows)
    if options.save_baseline:
        sys.stdout.write(f"{write_report(BASELINES / report.run.machine.folder / 'scoreboard.json', report)}\n")
    sys.stdout.write(f"{write_all(report, options.out)['html']}\n")
    return int(any(row.bug for row in rows if not row.planted and row.rule.startswith("verdict")))


def _drawn(options: argparse.Namespace, done: set[str]) -> Generator[Line, None, None]:
    """What is not done yet. Each in its turn: a clean pair, then a fault."""
    numbers = range(options.first, options.first + options.models)
    clean = _clean(numbers, (JUDGED_SEED, FITTED_SEED) if options.fitted else (JUDGED_SEED,), done, single=options.single)
    faulty = _faulty(options.seeds, done)
    while True:
        several = [line for source in (clean, faulty) if (line := next(source, None)) is not None]
        if not several:
            return
        yield from several


def _clean(numbers: Sequence[int], seeds: Sequence[int], done: set[str], *, single: bool) -> Iterator[Line]:
    with Subjects() as subjects:
        for number in numbers:
            for seed in seeds:
                if len(done & {f"clean-{seed}-{number}-{tp_size}" for tp_size in TP_SIZES}) < (1 if single else len(TP_SIZES)):
                    yield from (line_of(pair, number, whole=single) for pair in clean_pairs(subjects, seed, number, single=single)
                                if pair.name not in done)


def _faulty(seeds: int, done: set[str]) -> Iterator[Line]:
    for seed in range(seeds):
        with FaultModels(seed=seed) as models:
            for fault in plantable():
                for dtype in DTYPES:
                    name = f"{fault.name}-{dtype}-{seed}"
                    if name not in done:
                        pair = faulty_pair(models, fault, dtype, seed, num_tokens=NUM_TOKENS)
                        nothing = {"pair": name, "planted": fault.name, "dtype": dtype, "said": {}, "values": {}}
                        yield line_of(pair) if pair else nothing


if __name__ == "__main__":
    try:
        exit_code = main()
    except (Exception, KeyboardInterrupt) as error:
        exit_code = exit_with(error)
    sys.exit(exit_code)

"""How often ``verdict`` is wrong, beside the rules that people use: ``python -m harness.studies.scoreboard``.

Draws pairs of streams whose answer is known, asks every rule, and counts. What is done stands in ``said.jsonl`` in the folder of
the report: ``--minutes`` ends a piece of the work, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.cli import exit_with
from harness.faults.models import FaultModels
from harness.machine import run_info
from harness.names import BASELINES
from harness.studies.score.pairs import DTYPES, TP_SIZES, Pair, Subjects, clean_pairs, faulty_pair, plantable
from harness.studies.score.rules import PEOPLES, VALUES, VERDICTS, called, values_of
from harness.verdict.rates import ON_FITTED
from reports.records import Report, ScoreRow, write_report
from reports.render import write_all
from reports.verdict_rows import ALL_FAULTS

FITTED_SEED, JUDGED_SEED = 0, 1
"""Of clean models: those that the bounds of ``verdict`` were fitted on, which are counted apart, and others."""
NUM_TOKENS = 300
"""Of a pair with a fault, at least."""

Line = dict[str, Any]
"""``pair``, ``planted``, ``dtype``, ``model``, ``tokens``; ``said``: rule -> [[tokens, answer], …]; ``values``: what people look
at. The last two are empty for a fault that changes nothing."""
SAME_ALARMS = "with no false alarm here"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, ask, count. Returns an exit code: 1 if ``verdict`` called a clean pair a bug."""
    parser = argparse.ArgumentParser(prog="python -m harness.studies.scoreboard", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=int, default=300, help="clean models")
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
    with path.open("a", encoding="utf-8") as file, closing(_drawn(options.models, options.seeds, done)) as source:
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


def _drawn(models: int, seeds: int, done: set[str]) -> Generator[Line, None, None]:
    """What is not done yet. Each in its turn: a fault, then a clean model."""
    clean, faulty = _clean(models, done), _faulty(seeds, done)
    while True:
        several = [line for source in (clean, faulty) if (line := next(source, None)) is not None]
        if not several:
            return
        yield from several


def _clean(models: int, done: set[str]) -> Iterator[Line]:
    with Subjects() as subjects:
        for number in range(models):
            for seed in (JUDGED_SEED, FITTED_SEED):
                if not {f"clean-{seed}-{number}-{tp_size}" for tp_size in TP_SIZES} <= done:
                    yield from (line_of(pair, number) for pair in clean_pairs(subjects, seed, number) if pair.name not in done)


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


def line_of(pair: Pair, model: int | None = None) -> Line:
    """What the rules say of a pair."""
    return {"pair": pair.name, "planted": pair.planted, "dtype": pair.dtype, "model": model, "tokens": pair.a.num_tokens,
            "said": called(pair), "values": values_of(pair)}


def scores(lines: Sequence[Mapping[str, Any]]) -> list[ScoreRow]:
    """One row a rule and dtype, of ``verdict`` one a fault too.

    Beside each rule as people use it stands the value that it looks at, with the bound that calls no clean pair of that dtype a
    bug: the best that anybody could do with it who knew these pairs.
    """
    worst: dict[tuple[str, str], float] = defaultdict(float)
    for line in lines:
        if not line["planted"]:
            for name, value in line["values"].items():
                worst[name, line["dtype"]] = max(worst[name, line["dtype"]], value)
    groups: dict[tuple[str, str, str], list[tuple[int, str]]] = defaultdict(list)
    models: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in lines:
        models[line["planted"], line["dtype"]] |= set() if line["planted"] else {line["pair"].rpartition("-")[0]}
        fitted = f" {ON_FITTED}" if line["pair"].startswith(f"clean-{FITTED_SEED}-") else ""
        said = {f"{rule}{fitted}": [(tokens, answer) for tokens, answer in answers] for rule, answers in line["said"].items()}
        bounds = {rule: (name, bound) for rule, (name, bound) in PEOPLES.items()} | {
            f"{name} {SAME_ALARMS}": (name, worst[name, line["dtype"]]) for name in VALUES}
        if line["values"]:
            said |= {rule: [(line["tokens"], "rounding" if line["values"][name] <= bound else "bug")]
                     for rule, (name, bound) in bounds.items()}
        for rule, answers in said.items():
            planted = line["planted"] if rule in VERDICTS else line["planted"] and ALL_FAULTS
            groups[rule, planted, line["dtype"]] += answers
    return [ScoreRow(rule=rule, planted=planted, dtype=dtype, runs=len(said), models=len(models[planted, dtype]),
                     tokens=[min(count for count, _ in said), max(count for count, _ in said)],
                     bug=sum(answer == "bug" for _, answer in said), cant_tell=sum(answer == "can't tell" for _, answer in said))
            for (rule, planted, dtype), said in groups.items()]


if __name__ == "__main__":
    try:
        exit_code = main()
    except (Exception, KeyboardInterrupt) as error:
        exit_code = exit_with(error)
    sys.exit(exit_code)

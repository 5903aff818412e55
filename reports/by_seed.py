"""At which seeds each planted fault was seen: several reports of ``shardproof faults`` as one Markdown table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import pandas as pd

from reports.records import Report, read_report
from reports.text_tables import to_markdown

CONTROL = "nothing: a control"


def faults_by_seed(reports: Iterable[Report]) -> pd.DataFrame:
    """One row a fault and number of ranks. Where two reports have it at the same seed, the later counts.

    A fault holds where all checks that must see it did, a control where none found anything. Older reports name it as a model.
    """
    rows = pd.DataFrame([
        {"part": row.extra["patched"], "fault": row.fault or row.model, "ranks": row.tp_size, "seed": report.run.seed,
         "seen by": ", ".join(row.extra["expected"]) or CONTROL, "holds": row.verdict == "pass"}
        for report in reports for row in report.checks if "patched" in row.extra])
    keys = ["part", "fault", "ranks", "seen by"]
    latest = rows.drop_duplicates([*keys, "seed"], keep="last").sort_index().groupby(keys, sort=False)
    return pd.DataFrame([(*key, _ranges(own.seed[own.holds]), _ranges(own.seed[~own.holds])) for key, own in latest],
                        columns=[*keys, "at seeds", "not at seeds"])


def _ranges(seeds: pd.Series[int]) -> str:
    """Numbers as ranges.

    >>> _ranges(pd.Series([5, 0, 1, 2]))
    '0–2, 5'
    """
    ordered = seeds.sort_values()
    runs = ordered.groupby((ordered.diff() != 1).cumsum())
    return ", ".join(f"{run.min()}–{run.max()}" if len(run) > 1 else str(run.min()) for _, run in runs)


def main() -> None:
    """The table of the reports that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="reports of shardproof faults, one a seed")
    sys.stdout.write(to_markdown(faults_by_seed(map(read_report, parser.parse_args().folders))))


if __name__ == "__main__":
    main()

"""How often an answer is wrong, as it was measured: from the committed record of ``python -m harness.studies.scoreboard``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import reports
from harness.verdict.statistics import Yardstick
from reports.records import ScoreRow, read_report
from reports.verdict_rows import at_most

RECORD = "scoreboard.json"
ON_FITTED = "on the models that its bounds were fitted on"
"""Behind the name of a form of ``verdict``: clean pairs that are counted apart."""
COUNTS = (64, 128)
"""Numbers of tokens of which pairs were cut to; whole pairs have twice as many and more."""


def rates(yardstick: Yardstick, dtype: str, num_tokens: int) -> list[str]:
    """In sentences: false alarms and faults seen, by this yardstick and dtype, of pairs of about so many tokens."""
    rule = f"verdict by {yardstick}"
    if num_tokens < 2 * COUNTS[-1]:
        rule += f", {max((count for count in COUNTS if count <= num_tokens), default=COUNTS[0])} tokens"
    rows = [row for row in _scores() if (row.rule, row.dtype) == (rule, dtype)]
    clean, faulty = [row for row in rows if not row.planted], [row for row in rows if row.planted]
    fitted = [row for row in _scores() if (row.rule, row.dtype) == (f"{rule} {ON_FITTED}", dtype)]
    said = []
    for where, own in (("", clean), (f" {ON_FITTED}", fitted)):
        if own:
            runs, bugs = sum(row.runs for row in own), sum(row.bug for row in own)
            said.append(f"false alarms: {bugs} of {runs} clean pairs in {dtype}{where} were called a bug, at most "
                        f"{100 * at_most(bugs, runs):.2g} % (95 % sure), {_tokens(own)}")
    if faulty:
        runs, bugs = sum(row.runs for row in faulty), sum(row.bug for row in faulty)
        said.append(f"power: {bugs} of {runs} planted faults that reach the logits in {dtype} were called a bug, "
                    f"{sum(row.cant_tell for row in faulty)} can't tell, {_tokens(faulty)}")
    return said or [f"nobody has measured how often such an answer is wrong ({yardstick}, {dtype or 'unknown dtype'})"]


def _tokens(rows: Sequence[ScoreRow]) -> str:
    return f"{min(row.tokens[0] for row in rows)} to {max(row.tokens[1] for row in rows)} tokens each"


@cache
def _scores() -> tuple[ScoreRow, ...]:
    """Of all committed records."""
    folder = Path(reports.__file__).parent / "baselines"
    return tuple(row for path in sorted(folder.glob(f"*/{RECORD}")) for row in read_report(path).scores)

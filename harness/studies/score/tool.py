"""Another tool on pairs of streams whose answer is known, shuffled and without a label: ``shardproof faults --score TOOL.py``."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from harness.errors import CouldNotRunError, UsageError
from harness.faults import FAULTS
from harness.faults.models import FaultModels
from harness.machine import run_info
from harness.studies.score.counts import Line, scores
from harness.studies.score.pairs import DTYPES, NUM_TOKENS, Pair, faulty_pair, plantable
from harness.verdict.statistics import judge
from harness.verdict.streams import Stream, StreamInfo, write_stream
from harness.verdict.tokens import align
from reports.records import Report

ANSWERS = ("bug", "rounding", "can't tell")
BESIDE = "verdict by dtype"
"""What is asked of the same pairs, for comparison: it sees no more of them than a tool does."""
TIMEOUT_S = 120.0

OnDone = Callable[[str, int, int], None]
"""Told what is done, how many of it, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePlan:
    """Which tool is asked about which faults.

    tool       a Python script: see ``ask``
    only       names of faults; empty: all that can change a logit
    dtypes     in which each is planted
    timeout_s  for one answer
    """

    tool: Path
    only: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    seed: int = 0
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        if not self.tool.is_file():
            raise UsageError(f"score={str(self.tool)!r}: there is no such file")
        known = [fault.name for fault in plantable()]
        if unknown := [name for name in self.only if name not in known]:
            raise UsageError(f"only={unknown} can't be planted for log-probabilities; there are: {', '.join(known)}")

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Each fault in each dtype."""
        names = self.only or tuple(fault.name for fault in plantable() if "logits" in fault.checks)
        return [(name, dtype) for name in names for dtype in self.dtypes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blind:
    """Two streams that say nothing of where they come from, and what is known of them."""

    planted: str
    dtype: str
    a: Stream
    b: Stream


def score_tool(plan: ScorePlan, on_done: OnDone = lambda what, done, total: None) -> Report:
    """Make the pairs, shuffle them, and ask the tool about each.

    Raises:
        CouldNotRunError: if the tool does not answer, or no fault changes a log-probability.
    """
    started_at = datetime.now(UTC)
    pairs = list(_drawn(plan, on_done))
    if not pairs:
        raise CouldNotRunError(f"only={list(plan.only)}: none of them changes a log-probability: there is nothing to ask about")
    random.Random(plan.seed).shuffle(pairs)
    lines: list[Line] = []
    for number, pair in enumerate(pairs, start=1):
        tokens = align(pair.a, pair.b)
        own = judge(tokens, dtype=pair.dtype, vocab_size=pair.a.info.vocab_size).answer
        said = {plan.tool.name: ask(plan.tool, pair, plan.timeout_s), BESIDE: own}
        lines.append({"pair": f"{number}-0", "planted": pair.planted, "dtype": pair.dtype, "values": {},
                      "said": {rule: [(len(tokens), answer)] for rule, answer in said.items()}})
        on_done("pairs judged", number, len(pairs))
    lines.sort(key=lambda line: (DTYPES.index(line["dtype"]), line["planted"]))
    rows = scores(lines, by_fault=(plan.tool.name, BESIDE))
    return Report(run=run_info("faults", started_at=started_at, seed=plan.seed), scores=rows)


def _drawn(plan: ScorePlan, on_done: OnDone) -> Iterator[Blind]:
    """Of each fault that changes a log-probability two pairs: with it, and the same model on as many ranks without it."""
    with FaultModels(seed=plan.seed) as models:
        for number, (name, dtype) in enumerate(plan.cases, start=1):
            pair = faulty_pair(models, FAULTS[name], dtype, plan.seed, num_tokens=NUM_TOKENS, with_reference=False)
            on_done("faults planted", number, len(plan.cases))
            if pair is not None and pair.b is not None:  # of NaN there is no stream, and nobody needs a tool
                yield from blinded(pair)


def blinded(pair: Pair) -> list[Blind]:
    """With the fault and without, nothing in the streams saying which is which."""
    assert pair.b is not None, "there is a stream"
    return [Blind(planted=planted, dtype=pair.dtype, a=_unnamed(pair.a, "A"), b=_unnamed(other, "B"))
            for planted, other in ((pair.planted, pair.b), ("", pair.noise))]


def _unnamed(stream: Stream, source: str) -> Stream:
    known = stream.info
    info = StreamInfo(source=source, dtype=known.dtype, block_size=known.block_size, vocab_size=known.vocab_size)
    return replace(stream, info=info)


def ask(tool: Path, pair: Blind, timeout_s: float = TIMEOUT_S) -> str:
    """The tool's answer: ``TOOL.py A.jsonl B.jsonl`` in an interpreter of its own ends with 0, and its last line is the answer.

    An exit code would not do for an answer: that of an exception that nobody caught is 1.

    Raises:
        CouldNotRunError: if it ends otherwise, or not in time.
    """
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        paths = [write_stream(Path(scratch) / name, stream) for name, stream in (("a.jsonl", pair.a), ("b.jsonl", pair.b))]
        try:
            done = subprocess.run([sys.executable, tool, *paths], capture_output=True, text=True, check=False,
                                  timeout=timeout_s, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise CouldNotRunError(f"{tool} did not answer within {timeout_s:g} s") from None
    answer = _last_line(done.stdout)
    if done.returncode or answer not in ANSWERS:
        problem = f"; it says: {said}" if (said := _last_line(done.stderr)) else ""
        raise CouldNotRunError(f"{tool} ended with exit code {done.returncode} and {answer!r} as its last line: it must end with "
                               f"0 and print {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}{problem}")
    return answer


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

"""What a verdict on two streams of log-probabilities is made of, and how often verdicts and people's rules are right."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from reports.rows import Record

ALL_FAULTS = "all faults"
"""In place of a fault's name: all of them together."""
SURE = 0.95
Answer = Literal["rounding", "bug", "can't tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictTest(Record):
    """One test: its statistic as a fraction of what is allowed (``value``, above 1 is a bug), and in words.

    statistic  in units of rounding
    group      which part of the tokens it is about
    tried      among so many parts the worst
    """

    name: str
    value: float
    statistic: float
    says: str
    group: str = ""
    tried: int = 1

    def _check(self) -> None:
        self._require(not self.value < 0, "value", "cannot be negative")
        self._require(self.tried >= 0, "tried", "cannot be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictPlaces(Record):
    """Some of the tokens that were compared, for plots: the same number of values in each.

    position    in the sequence
    difference  of the log-probabilities, A minus B, in nats
    ratio       the same in units of rounding
    logprob     A's, in nats
    """

    position: list[int] = field(default_factory=list)
    difference: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)

    def _check(self) -> None:
        lengths = {len(self.position), len(self.difference), len(self.ratio), len(self.logprob)}
        self._require(len(lengths) == 1, "ratio", "position, difference, ratio and logprob are of one length")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRow(Record):
    """Two streams, and one answer.

    a, b, noise  where the numbers came from, for people; a server without the user and query parts of its URL
    yardstick    by what rounding was measured: ``reference``, ``noise`` or ``dtype``
    comparison   what was held against what: prefill against prefill, decode against prefill, …
    compared     tokens
    why          in one sentence
    would_tell   what would tell, where nobody can
    looks_like   in the words of planted faults
    first        the first token that is off by more than rounding, in words
    rates        how often such an answer is wrong, as measured
    flips_near_ties, flips  places where the most probable tokens differ, with a margin that rounding may turn round, and with
                 a larger one; None where nobody gave the most probable tokens
    quantiles    [expected of a normal distribution, found] of the differences in units of rounding
    left_out     what was not compared, and why
    """

    a: str
    b: str
    noise: str | None
    answer: Answer
    yardstick: str
    dtype: str
    comparison: str
    compared: int
    sequences: int
    why: str
    would_tell: list[str] = field(default_factory=list)
    looks_like: str = ""
    first: str = ""
    rates: list[str] = field(default_factory=list)
    flips_near_ties: int | None = None
    flips: int | None = None
    tests: list[VerdictTest] = field(default_factory=list)
    places: VerdictPlaces = field(default_factory=VerdictPlaces)
    quantiles: list[list[float]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def _check(self) -> None:
        self._require(self.why.strip() != "", "why", "an answer has a reason")
        self._require(self.answer == "can't tell" or self.compared > 0, "compared", "an answer rests on tokens")
        over = any(not test.value <= 1 for test in self.tests)
        self._require(over == (self.answer == "bug"), "answer", "a bug is a test over what is allowed, and such a test is a bug")

    @property
    def exit_code(self) -> int:
        """0 rounding, 1 a bug, 3 can't tell."""
        return {"rounding": 0, "bug": 1, "can't tell": 3}[self.answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow(Record):
    """How often a rule called pairs of streams a bug whose answer is known.

    rule       ``verdict`` with its yardstick, or a rule that people use
    planted    the fault; empty for clean pairs
    tokens     in a pair: the fewest and the most
    runs       pairs
    bug        called a bug; ``cant_tell`` neither
    models     different ones among the pairs
    """

    KEY: ClassVar[tuple[str, ...]] = ("rule", "planted", "dtype")
    rule: str
    planted: str
    dtype: str
    tokens: list[int]
    runs: int
    bug: int
    cant_tell: int = 0
    models: int = 0

    def _check(self) -> None:
        self._require(self.runs > 0, "runs", "a share is one of runs")
        self._require(0 <= self.bug <= self.runs - self.cant_tell, "bug", "cannot be more than the runs")
        self._require(len(self.tokens) == 2, "tokens", "the fewest and the most")


def at_most(seen: int, runs: int) -> float:
    """Upper end of the one-sided exact interval for a rate (Clopper and Pearson 1934), ``SURE`` of the time, by bisection.

    >>> round(at_most(0, 3000), 6)
    0.000998
    """
    if seen >= runs:
        return 1.0
    low, high = seen / runs, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most_seen(seen, runs, middle) > 1 - SURE else (low, middle)
    return high


def _at_most_seen(seen: int, runs: int, rate: float) -> float:
    """Chance of no more than ``seen`` of ``runs``."""
    logs = [math.lgamma(runs + 1) - math.lgamma(i + 1) - math.lgamma(runs - i + 1) + i * math.log(rate)
            + (runs - i) * math.log1p(-rate) for i in range(seen + 1)]
    return min(1.0, math.fsum(map(math.exp, logs)))

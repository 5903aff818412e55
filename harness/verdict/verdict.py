"""``shardproof verdict``: open both sides, have them score the same tokens, judge, and write down the answer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist

import numpy as np

from harness.errors import UsageError
from harness.machine import run_info
from harness.names import DTYPES
from harness.verdict.sides import FileSide, Side, SideOptions, drawn_sequences, is_live, open_side, stream_of
from harness.verdict.statistics import Judgement, judge, looks_like
from harness.verdict.streams import Stream, StreamError
from harness.verdict.tokens import DECODE, Floats, Tokens, align
from harness.verification.budgets import VERDICT_BEYOND, VERDICT_LIMITS, precision
from reports.records import Report, VerdictPlaces, VerdictRow, VerdictTest

MOST_PLACES = 2000
"""Tokens that a record keeps for plots."""
NUM_QUANTILES = 41

OnDone = Callable[[str, int, int], None]
"""Told of a side, how many of its sequences are scored, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictPlan:
    """What to compare.

    a, b, noise  as they are written on the command line
    options      one for each that is live, in this order
    dtype        in which both compute; ``auto``: what they say
    prompts      file of sequences to score; None: those of a file, or drawn
    """

    a: str
    b: str
    noise: str | None = None
    options: dict[str, SideOptions] = field(default_factory=dict)
    dtype: str = "auto"
    prompts: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise UsageError(f"dtype={self.dtype!r} is unknown; supported: auto, {', '.join(DTYPES)}")


def run_verdict(plan: VerdictPlan, *, on_done: OnDone = lambda side, done, total: None) -> Report:
    """Compare, and answer.

    Raises:
        UsageError, StreamError, CheckpointError: if a side can't be opened, or both have nothing in common.
    """
    started_at = datetime.now(UTC)
    streams = _streams(plan, on_done)
    row = verdict_row(streams["A"], streams["B"], streams.get("noise"), dtype=plan.dtype)
    return Report(run=run_info("verdict", started_at=started_at, seed=plan.seed), verdict=row)


def _streams(plan: VerdictPlan, on_done: OnDone) -> dict[str, Stream]:
    """Of each side; sides that compute are opened one after the other: two models may not fit beside each other."""
    written = {"A": plan.a, "B": plan.b} | ({"noise": plan.noise} if plan.noise else {})
    streams: dict[str, Stream] = {}
    for name, text in written.items():
        if not is_live(text):
            side = open_side(text, SideOptions())
            assert isinstance(side, FileSide), "what is not live is a file"
            streams[name] = side.stream
    sequences: Sequence[tuple[int, ...]] | None = read_prompts(plan.prompts) if plan.prompts else None
    if sequences is None and streams:
        sequences = [sequence.token_ids for sequence in next(iter(streams.values())).sequences]
    for name, text in written.items():
        if name in streams:
            continue
        with closing(open_side(text, plan.options.get(name, SideOptions()))) as side:
            if sequences is None:
                sequences = _drawn(side, plan.seed)
            done = 0

            def count(name: str = name, total: int = len(sequences)) -> None:
                nonlocal done
                done += 1
                on_done(name, done, total)

            streams[name] = stream_of(side, sequences, count)
    return streams


def _drawn(side: Side, seed: int) -> list[tuple[int, ...]]:
    if side.vocab_size is None:
        raise UsageError("nobody says how large the vocabulary is: give --prompts, a file of token ids")
    return drawn_sequences(seed, side.vocab_size, longest=side.longest)


def read_prompts(path: Path) -> list[tuple[int, ...]]:
    """Sequences of token ids: a stream, or a line of JSON each, ``[1, 2, 3]``.

    Raises:
        StreamError: naming the line, for all else.
    """
    sequences = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise StreamError(f"{path}: line {number}: no JSON ({error}): a line is a list of token ids") from error
        if isinstance(values, dict):
            values = values.get("token_ids")
        if values is None:
            continue
        if not isinstance(values, list) or len(values) < 2 or any(type(value) is not int or value < 0 for value in values):
            raise StreamError(f"{path}: line {number}: must be a list of two token ids or more")
        sequences.append(tuple(values))
    if len(set(sequences)) != len(sequences):
        raise StreamError(f"{path}: some prompts are there twice: each must be there once")
    if not sequences:
        raise StreamError(f"{path}: no prompt in it")
    return sequences


def verdict_row(a: Stream, b: Stream, noise: Stream | None, *, dtype: str = "auto") -> VerdictRow:
    """The answer for two streams, as a record.

    Raises:
        StreamError: if they have no token in common.
    """
    tokens = align(a, b)
    against_noise = align(a, noise) if noise is not None else None
    known = dtype if dtype != "auto" else (b if a.is_reference else a).info.dtype or a.info.dtype or b.info.dtype
    vocab_size = a.info.vocab_size or b.info.vocab_size
    judgement = judge(tokens, dtype=known, noise=against_noise, vocab_size=vocab_size)
    row = VerdictRow(
        a=a.info.source, b=b.info.source, noise=None if noise is None else noise.info.source, answer=judgement.answer,
        yardstick=judgement.yardstick, dtype=judgement.dtype, comparison=_comparison(tokens), compared=len(tokens),
        sequences=len(np.unique(tokens.sequence)), why=judgement.why, would_tell=list(judgement.would_tell),
        looks_like=looks_like(judgement), left_out=list(tokens.left_out),
        tests=[VerdictTest(name=test.name, value=test.value, statistic=test.statistic, says=test.says, group=test.group,
                           tried=test.tried) for test in judgement.tests])
    if not len(judgement.ratio):
        return row
    beyond = _beyond(judgement)
    near = far = None
    if tokens.has_top:
        margin_N = tokens.flip
        turned = ~np.isnan(margin_N)
        # Both logits of a pair of tokens may be off.
        is_near = turned & (margin_N <= 2 * beyond * _unit(judgement, tokens))
        near, far = int(is_near.sum()), int((turned & ~is_near).sum())
    return replace(row, first=_first(judgement, tokens, beyond), flips_near_ties=near, flips=far,
                   places=_places(judgement, tokens), quantiles=_quantiles(judgement))


def _comparison(tokens: Tokens) -> str:
    decoded = int((tokens.phase == DECODE).sum())
    if not decoded:
        return "prefill against prefill"
    return f"{decoded} of them come of decode steps on one side or both, the others of the prefill"


def _beyond(judgement: Judgement) -> float:
    """How many units one token may be off."""
    limits = VERDICT_LIMITS[judgement.yardstick][precision(judgement.dtype)]
    return VERDICT_BEYOND * limits["size"]


def _unit(judgement: Judgement, tokens: Tokens) -> float:
    """What rounding does to a typical token, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.abs(tokens.difference / judgement.ratio)
    return float(np.nanmedian(units)) if np.isfinite(units).any() else 0.0


def _first(judgement: Judgement, tokens: Tokens, beyond: float) -> str:
    over = np.flatnonzero(np.abs(judgement.ratio) > beyond)
    if not len(over):
        return ""
    at = int(over[0])
    return (f"sequence {tokens.sequence[at]}, position {tokens.position[at]}, token id {tokens.token_id[at]}: "
            f"{tokens.a[at]:.6g} by A, {tokens.b[at]:.6g} by B, {judgement.ratio[at]:+.3g} units; {len(over)} of {len(tokens)} "
            "tokens are so far off")


def _places(judgement: Judgement, tokens: Tokens) -> VerdictPlaces:
    """Evenly spread over all tokens, and the ten worst."""
    spread = np.linspace(0, len(tokens) - 1, min(MOST_PLACES, len(tokens))).astype(int)
    worst = np.argsort(-np.abs(judgement.ratio))[:10]
    at = np.unique(np.concatenate((spread, worst)))
    return VerdictPlaces(position=tokens.position[at].tolist(), difference=_short(tokens.difference[at]),
                         ratio=_short(judgement.ratio[at]), logprob=_short(tokens.a[at]))


def _short(values: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _quantiles(judgement: Judgement) -> list[list[float]]:
    """[of a normal distribution, found], evenly over the former."""
    count = len(judgement.ratio)
    reach = NormalDist().inv_cdf(1 - 0.5 / max(2, count))
    expected = np.linspace(-reach, reach, NUM_QUANTILES)
    shares = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in expected]
    found = np.quantile(judgement.ratio, shares)
    return [[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in zip(expected, found, strict=True)]

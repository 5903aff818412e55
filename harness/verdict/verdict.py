"""``shardproof verdict``: open both sides, have them score the same tokens, judge, and write down the answer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import NormalDist

import numpy as np

from harness.errors import UsageError
from harness.machine import run_info
from harness.names import DTYPES
from harness.verdict.rates import rates
from harness.verdict.server import origin
from harness.verdict.sides import (
    LONGEST,
    SMALLEST_VOCABULARY,
    FileSide,
    ServerSide,
    Side,
    SideOptions,
    drawn_sequences,
    is_live,
    is_server,
    limits_of,
    open_side,
    read_prompts,
)
from harness.verdict.statistics import Judgement, judge, looks_like, sensitivity
from harness.verdict.streams import Scored, Stream, StreamError, StreamWriter
from harness.verdict.tokens import DECODE, Floats, Tokens, align
from harness.verification.budgets import UNIT_ROUNDOFF, VERDICT_LIMITS
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
    generate     tokens that a server generates after a third of the prompts
    keep         folder for what a live side answers, ``A.jsonl`` and the like, sequence by sequence; None: it is not kept
    """

    a: str
    b: str
    noise: str | None = None
    options: dict[str, SideOptions] = field(default_factory=dict)
    dtype: str = "auto"
    prompts: Path | None = None
    generate: int = 16
    seed: int = 0
    keep: Path | None = None

    def __post_init__(self) -> None:
        sides = {"A": self.a, "B": self.b, "noise": self.noise or ""}
        files = {Path(text).expanduser().resolve() for text in sides.values() if not is_live(text)}
        if self.keep is not None and any(is_live(text) and (self.keep / f"{name}.jsonl").resolve() in files
                                         for name, text in sides.items()):
            raise UsageError(f"out={str(self.keep)!r}: the answers would replace a file that is compared: name another folder")
        if self.dtype not in ("auto", *DTYPES):
            raise UsageError(f"dtype={self.dtype!r} is unknown; supported: auto, {', '.join(DTYPES)}")
        if self.generate < 0:
            raise UsageError(f"generate={self.generate} must be 0 or more")
        if self.dtype == "auto" and is_server(self.a) and is_server(self.b):
            raise UsageError(f"dtype='auto': no server says in which dtype it computes: give --dtype, one of {', '.join(DTYPES)}")


def run_verdict(plan: VerdictPlan, *, on_done: OnDone = lambda side, done, total: None) -> Report:
    """Compare, and answer.

    Raises:
        UsageError, StreamError, CheckpointError: if a side can't be opened, or both have nothing in common.
    """
    started_at = datetime.now(UTC)
    streams = _streams(plan, on_done)
    row = verdict_row(streams["A"], streams["B"], streams.get("noise"), dtype=plan.dtype)
    return Report(run=run_info("verdict", started_at=started_at, seed=plan.seed, argv=shown_argv()), verdict=row)


def shown_argv() -> list[str]:
    """The command line, without the user and query parts of addresses."""
    return ["shardproof", *(origin(word) if "://" in word else word for word in sys.argv[1:])]


def _streams(plan: VerdictPlan, on_done: OnDone) -> dict[str, Stream]:
    """Of each side. Models are opened one after the other: two may not fit beside each other."""
    written = {"A": plan.a, "B": plan.b} | ({"noise": plan.noise} if plan.noise else {})
    options = {name: plan.options.get(name, SideOptions()) for name in written}
    opened = {name: open_side(text, options[name]) for name, text in written.items() if not is_live(text) or is_server(text)}
    streams = {name: side.stream for name, side in opened.items() if isinstance(side, FileSide)}
    servers = {name: side for name, side in opened.items() if isinstance(side, ServerSide)}
    models = {name: text for name, text in written.items() if name not in opened}
    if plan.prompts is not None:
        sequences = read_prompts(plan.prompts)
    elif streams:
        sequences = [sequence.token_ids for sequence in next(iter(streams.values())).sequences]
    else:
        limits = [limits_of(text, options[name]) for name, text in models.items()]
        sequences = drawn_sequences(plan.seed, min((one.vocab_size for one in limits), default=SMALLEST_VOCABULARY),
                                    longest=min((one.longest for one in limits), default=LONGEST))
    generated = {} if {"A", "B"} & set(streams) or not plan.generate else _generated(servers, sequences, plan.generate)
    everything = [*sequences, *(one.token_ids for own in generated.values() for one in own)]
    for name in written:
        if name not in streams:
            with closing(servers.get(name) or open_side(models[name], options[name])) as side:
                streams[name] = _scored_by(name, side, everything, generated.get(name, []), plan.keep, on_done)
    return streams


def _generated(servers: Mapping[str, ServerSide], sequences: Sequence[tuple[int, ...]],
               num_tokens: int) -> dict[str, list[Scored]]:
    """What A and B generate, each after the first half of another third of the sequences."""
    found = {}
    for at, (name, side) in enumerate((name, side) for name, side in servers.items() if name != "noise"):
        prompts = list(dict.fromkeys(ids[: max(1, len(ids) // 2)] for ids in sequences[at::3]))
        found[name] = list(side.generate(prompts, num_tokens))
    return found


def _scored_by(name: str, side: Side, sequences: Sequence[tuple[int, ...]], generated: Sequence[Scored], keep: Path | None,
               on_done: OnDone) -> Stream:
    """What it generated itself, and all others as prompts."""
    own = {one.token_ids: one for one in generated}
    others = [ids for ids in dict.fromkeys(sequences) if ids not in own]
    found = []
    with nullcontext() if keep is None else StreamWriter(keep / f"{name}.jsonl", **asdict(side.info)) as writer:
        for number, scored in enumerate(chain(own.values(), side.score(others)), start=1):
            found.append(scored.check(f"{side.info.source}: sequence {number}"))
            if writer is not None:
                writer.put(scored)
            on_done(name, number, len(own) + len(others))
    return Stream(info=side.info, sequences=tuple(found))


def verdict_row(a: Stream, b: Stream, noise: Stream | None, *, dtype: str = "auto") -> VerdictRow:
    """The answer for two streams, as a record.

    Raises:
        StreamError: if they have no token in common.
    """
    tokens = align(a, b)
    against_noise = align(a, noise) if noise is not None else None
    known = _dtype_of(a, b, dtype)
    vocab_size = a.info.vocab_size or b.info.vocab_size
    judgement = judge(tokens, dtype=known, noise=against_noise, vocab_size=vocab_size)
    row = VerdictRow(
        a=a.info.source, b=b.info.source, noise=None if noise is None else noise.info.source, answer=judgement.answer,
        yardstick=judgement.yardstick, dtype=judgement.dtype, comparison=_comparison(tokens), compared=len(tokens),
        sequences=len(np.unique(tokens.sequence)), why=judgement.why, would_tell=list(judgement.would_tell),
        looks_like=looks_like(judgement), rates=rates(judgement.yardstick, judgement.dtype, len(tokens)),
        left_out=list(tokens.left_out),
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


def _dtype_of(a: Stream, b: Stream, dtype: str) -> str | None:
    """In which both sides compute; of two the coarser, which rounds more; None if nobody says.

    Raises:
        StreamError: for a dtype that nobody knows, or a reference that simulates the rounding of another one.
    """
    said = {} if dtype != "auto" else {
        name: side.info.dtype for name, side in (("A", a), ("B", b)) if side.info.dtype and not side.is_reference}
    if unknown := {name: own for name, own in said.items() if own not in UNIT_ROUNDOFF}:
        raise StreamError(f"dtype={unknown}: nobody knows how that rounds; give --dtype, one of {', '.join(UNIT_ROUNDOFF)}")
    known = dtype if dtype != "auto" else max(said.values(), key=UNIT_ROUNDOFF.__getitem__, default=None)
    for side in (a, b):
        if side.is_reference and side.info.dtype:
            if known not in (None, side.info.dtype):
                raise StreamError(f"the reference shows what rounding of {side.info.dtype} does, and the other side computes in "
                                  f"{known}: give --dtype {known}")
            known = side.info.dtype
    return known


def _comparison(tokens: Tokens) -> str:
    decoded = int((tokens.phase == DECODE).sum())
    if not decoded:
        return "prefill against prefill"
    return f"{decoded} of them come of decode steps on one side or both, the others of the prefill"


def _beyond(judgement: Judgement) -> float:
    """How many units one token of so many may be off."""
    return VERDICT_LIMITS[judgement.yardstick]["size"] * math.sqrt(2 * math.log(2 * len(judgement.ratio)))


def _unit(judgement: Judgement, tokens: Tokens) -> float:
    """What rounding does to a typical logit, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.abs(tokens.difference / judgement.ratio / sensitivity(tokens))
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

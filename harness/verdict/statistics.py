"""Is a difference of log-probabilities rounding? One number a token, a few tests, and one answer.

Both sides score the same tokens: ``d_t = a_t - b_t``. What rounding does to token t is its *unit* ``w_t``, by one of three
yardsticks, and ``r_t = d_t / w_t``::

    reference   w_t = root mean square of the simulated rounding of the dtype, token by token
    noise       w_t = s * q_t, s from another run that is right:  s = rms((a_t - noise_t) / q_t)
    dtype       w_t = u * rms(log-probabilities) * q_t

with u the unit roundoff and ``q_t = 1 - p_t``: a logit's error moves the log-probability of a token of probability p by 1 - p of
it, so a token that is almost certain hardly moves. To each is added what float32 itself rounds at the end, and the last decimal
where numbers were printed with few.

The tests: is it too large everywhere (size), at one token (peak), to one side (shift), or more in some part than in the others
(where)? Each gives its statistic as a fraction of what is allowed; above 1 is a bug. The constants stand in
``harness.verification.budgets``.

Shape suffixes: N = tokens compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.verdict.tokens import DECODE, UNKNOWN, Floats, Integers, Tokens
from harness.verification.budgets import UNIT_ROUNDOFF, VERDICT_CHANCE, VERDICT_LIMITS, VERDICT_TYPICAL, precision

Answer = Literal["rounding", "bug", "can't tell"]
Yardstick = Literal["reference", "noise", "dtype"]

FEWEST_TOKENS = 64
"""Of fewer nobody can tell how large the others' errors are."""
FEWEST_IN_GROUP = 8
FEWEST_NOISY = 16
"""Tokens that must differ in a noise run for it to show what rounding does."""
FLOAT32_LAST = 2.0**-23
"""What the log-softmax of float32 rounds, relatively, whatever the model computed in."""
DECIMALS = range(2, 7)
SHARDS = (2, 3, 4, 8)
"""Numbers of ranks by which a vocabulary may be cut."""
SHARING = 4
"""Tokens of one sequence that count as one value of their mean."""
MOST_TOKEN_IDS = 64
"""The most frequent token ids that are looked at by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """What one test says.

    name      ``size``, ``peak``, ``shift``, or ``where: …``
    value     the statistic as a fraction of what is allowed; above 1 is a bug
    statistic in units of rounding
    says      in words
    group     of ``where``: which part, for what it looks like
    tried     among how many parts it is the worst
    """

    name: str
    value: float
    statistic: float
    says: str
    group: str = ""
    tried: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One answer, and what it rests on."""

    answer: Answer
    yardstick: Yardstick
    dtype: str
    tests: tuple[Test, ...]
    why: str
    would_tell: tuple[str, ...] = ()
    ratio: Floats = field(default_factory=lambda: np.zeros(0))
    """``[N]`` differences in units of rounding."""

    @property
    def worst(self) -> Test:
        """The test that takes the largest part of what it is allowed."""
        return max(self.tests, key=lambda test: test.value)


def judge(tokens: Tokens, *, dtype: str | None, noise: Tokens | None = None, vocab_size: int | None = None) -> Judgement:
    """The answer for two streams.

    Args:
        tokens: of A against B; with what rounding does to each where one side is a reference.
        dtype: in which the sides computed; None: unknown.
        noise: of A against another run that is right, likewise.
        vocab_size: of the model; None: the largest token id is taken for the last.
    """
    yardstick: Yardstick = "reference" if tokens.rounding.any() else "noise" if noise is not None else "dtype"
    if len(tokens) < FEWEST_TOKENS:
        return Judgement(answer="can't tell", yardstick=yardstick, dtype=dtype or "", tests=(),
                         why=f"{len(tokens)} tokens were compared: fewer than {FEWEST_TOKENS} tell nothing",
                         would_tell=("more tokens",))
    if dtype is None and yardstick != "reference":
        return Judgement(answer="can't tell", yardstick=yardstick, dtype="", tests=(),
                         would_tell=("--dtype, in which both sides compute",),
                         why="nobody says in which dtype the sides compute, so nobody knows how large rounding is")
    dtype = dtype or "float32"
    if noise is not None and yardstick == "noise" and (
            len(noise) < FEWEST_TOKENS or np.count_nonzero(noise.difference) < FEWEST_NOISY):
        return _untold(judge(tokens, dtype=dtype, vocab_size=vocab_size), noise)
    unit_N = units(tokens, dtype, yardstick, noise)
    ratio_N = tokens.difference / unit_N
    limits = VERDICT_LIMITS[yardstick]
    size = _size(ratio_N, limits["size"])
    tests = (size, _peak(ratio_N, limits["peak"], tokens), _shift(ratio_N, tokens, limits["shift"]),
             _where(ratio_N, tokens, limits, vocab_size or int(tokens.token_id.max()) + 1,
                    _expected(tokens, dtype, yardstick, noise, is_bug=size.value > 1)))
    worst = max(tests, key=lambda test: test.value)
    if worst.value > 1:
        return Judgement(answer="bug", yardstick=yardstick, dtype=dtype, tests=tests, ratio=ratio_N,
                         why=f"{worst.says}: {worst.value:.3g} times what rounding may do")
    typical = VERDICT_TYPICAL[yardstick]
    if size.statistic > typical:
        return Judgement(answer="can't tell", yardstick=yardstick, dtype=dtype, tests=tests, ratio=ratio_N,
                         would_tell=_would_tell(yardstick, dtype),
                         why=f"{size.says}: more than rounding does in most models ({typical:.3g}), and less than it may do "
                             f"({limits['size']:.3g})")
    return Judgement(answer="rounding", yardstick=yardstick, dtype=dtype, tests=tests, ratio=ratio_N,
                     why=f"{size.says}, and no part, no side and no single token stands out")


def _would_tell(yardstick: Yardstick, dtype: str) -> tuple[str, ...]:
    """What narrows down how large rounding is."""
    better = {"dtype": ("a reference (reference:FOLDER) or a second run that is right (--noise)",),
              "noise": ("a reference (reference:FOLDER)",), "reference": ("more tokens",)}[yardstick]
    return better if precision(dtype) == precision("float32") else (*better, "both sides in float32")


def _untold(without: Judgement, noise: Tokens) -> Judgement:
    """The answer by the dtype alone, where the noise run shows no noise."""
    what = "has too few tokens in common with A" if len(noise) < FEWEST_TOKENS else (
        f"differs from A in {np.count_nonzero(noise.difference)} tokens alone, which does not show what rounding does")
    return Judgement(answer=without.answer, yardstick="dtype", dtype=without.dtype, tests=without.tests, ratio=without.ratio,
                     why=f"the noise run {what}; by the dtype alone: {without.why}", would_tell=without.would_tell)


# Units


def units(tokens: Tokens, dtype: str, yardstick: Yardstick, noise: Tokens | None = None) -> Floats:
    """``[N]``: how far off rounding puts each token."""
    if yardstick == "reference":
        return np.hypot(tokens.rounding, last_digits(tokens))
    unit_N = _by_dtype(tokens, dtype)
    if yardstick == "dtype":
        return unit_N
    assert noise is not None, "the noise yardstick needs a noise run"
    size = math.sqrt(float(np.mean((noise.difference / _by_dtype(noise, dtype)) ** 2)))
    return np.maximum(size * unit_N, last_digits(tokens))


def _by_dtype(tokens: Tokens, dtype: str) -> Floats:
    scale = max(1.0, math.sqrt(float(np.mean(np.minimum(tokens.a**2, tokens.b**2)))))
    return UNIT_ROUNDOFF[dtype] * scale * sensitivity(tokens) + last_digits(tokens)


def sensitivity(tokens: Tokens) -> Floats:
    """``[N]``: 1 minus the probability of each token, the mean of both sides in logarithms."""
    return -np.expm1(np.minimum(0.0, (tokens.a + tokens.b) / 2))


def last_digits(tokens: Tokens) -> Floats:
    """``[N]``: what the output itself rounds: float32, or few decimals."""
    return FLOAT32_LAST * (1 + np.maximum(np.abs(tokens.a), np.abs(tokens.b))) + decimal_step(tokens.a) + decimal_step(tokens.b)


def decimal_step(values: Floats) -> float:
    """Half a unit of the last decimal, where numbers were printed with so few that it shows; 0 where not."""
    for decimals in DECIMALS:
        scaled = values * 10.0**decimals
        if np.all(np.abs(scaled - np.round(scaled)) <= 1e-9 * np.maximum(1.0, np.abs(scaled))) and np.any(values):
            return 0.5 * 10.0**-decimals
    return 0.0


# Tests


def _size(ratio_N: Floats, limit: float) -> Test:
    size = math.sqrt(float(np.mean(ratio_N**2)))
    return Test(name="size", value=size / limit, statistic=size, says=f"differences are {size:.3g} units of rounding")


def _peak(ratio_N: Floats, limit: float, tokens: Tokens) -> Test:
    """The largest over the root mean square of the others, and over what a normal distribution reaches."""
    at = int(np.argmax(np.abs(ratio_N)))
    largest = float(abs(ratio_N[at]))
    rest = math.sqrt(float((np.sum(ratio_N**2) - largest**2) / (len(ratio_N) - 1)))
    reach = math.sqrt(2 * math.log(2 * len(ratio_N)))
    # Where the others are below one unit they are no measure: one unit is rounding, whatever they are.
    statistic = largest / max(rest, 1.0)
    where = f"sequence {tokens.sequence[at]}, position {tokens.position[at]}"
    return Test(name="peak", value=statistic / (limit * reach), statistic=statistic, group=where,
                says=f"{where} is {statistic:.3g} times as far off as the others")


def _shift(ratio_N: Floats, tokens: Tokens, limit: float) -> Test:
    """The mean over the root mean square: what chance does of so many sequences, and so much beside."""
    size = _size_of(ratio_N)
    mean = float(np.mean(ratio_N)) / size
    # Tokens of one sequence share a part of their error.
    context = np.unique(tokens.context, return_inverse=True)[1]
    independent = min(_independent(context), max(len(np.unique(tokens.sequence)), len(ratio_N) / SHARING))
    allowed = limit + _reach_of_chance(1) / math.sqrt(independent)
    side = "A" if mean > 0 else "B"
    return Test(name="shift", value=abs(mean) / allowed, statistic=abs(mean),
                says=f"{side} finds the tokens likelier on the whole: the mean is {abs(mean):.2g} of the root mean square")


def _expected(tokens: Tokens, dtype: str, yardstick: Yardstick, noise: Tokens | None, *, is_bug: bool) -> Floats | None:
    """``[N]``: logarithm of how large rounding is at each token, beside its unit; NaN where nobody knows; None: nowhere.

    Models magnify rounding more after some tokens than after others. A reference's units know it, and a noise run shows it. By
    the dtype alone no part is held against the others, but to say where a bug is.
    """
    if yardstick == "reference" or (is_bug and noise is None):
        return np.zeros(len(tokens))
    if noise is None:
        return None
    own = _logarithms(noise.difference / units(noise, dtype, "noise", noise))
    known = dict(zip(noise.key.tolist(), own.tolist(), strict=True))
    return np.array([known.get(key, np.nan) for key in tokens.key.tolist()])


def _where(ratio_N: Floats, tokens: Tokens, limits: Mapping[str, float], vocab_size: int, expected_N: Floats | None) -> Test:
    """Of all parts the one whose differences are most unlike the others': larger, or to one side."""
    found = [part for part in parts(tokens, vocab_size)
             if FEWEST_IN_GROUP <= part.inside.sum() <= len(tokens) - FEWEST_IN_GROUP]
    context = np.unique(tokens.context, return_inverse=True)[1]
    kinds = {"side": ratio_N / _size_of(ratio_N)}
    if expected_N is not None:
        kinds["where"] = _logarithms(ratio_N) - expected_N
    tried = len(found) * len(kinds)
    best = Test(name="where", value=0.0, statistic=0.0, says="no part stands out", tried=tried)
    for part in found:
        for kind, values in kinds.items():
            known = ~np.isnan(values)
            within, outside = part.inside & known, ~part.inside & known
            n_within, n_outside = (_independent(context[side]) for side in (within, outside))
            if min(n_within, n_outside) < FEWEST_IN_GROUP:
                continue
            difference = float(values[within].mean() - values[outside].mean())
            error = math.sqrt(float(values[within].var() / n_within + values[outside].var() / n_outside))
            value = (difference if kind == "where" else abs(difference)) / (limits[kind] + _reach_of_chance(tried) * error)
            if value > best.value:
                words = (f"{math.exp(difference):.3g} times as large in {part.name} as elsewhere" if kind == "where" else
                         f"shifted by {difference:+.3g} of their root mean square in {part.name}")
                best = Test(name="where", value=value, statistic=difference, says=f"differences are {words}", group=part.name,
                            tried=tried)
    return best


def _independent(context: Integers) -> float:
    """How many values tell as much as these, of which those of one context are the same: ``n² / sum of squared counts``.

    Contexts are numbered from 0.
    """
    return len(context) ** 2 / max(1, int(np.sum(np.bincount(context) ** 2)))


def _size_of(ratio_N: Floats) -> float:
    """Root mean square, at least 1: less than one unit is rounding, whatever the others are."""
    return max(1.0, math.sqrt(float(np.mean(ratio_N**2))))


def _logarithms(ratio_N: Floats) -> Floats:
    """Sizes in which a part is not called large for one token, nor for being above others that are all below one unit."""
    return np.log(np.abs(ratio_N) + 1.0)


def _reach_of_chance(tried: int) -> float:
    """Standard deviations that the largest of so many normal values exceeds with ``VERDICT_CHANCE``: by the tail's bound."""
    return math.sqrt(2 * math.log(2 * tried / VERDICT_CHANCE))


class Part(NamedTuple):
    """Some of the tokens, to which a bug may be confined."""

    name: str
    inside: NDArray[np.bool_]


def parts(tokens: Tokens, vocab_size: int) -> Iterator[Part]:
    """All parts that are looked at."""
    yield Part("decode steps", tokens.phase == DECODE)
    for batch_size in sorted(set(tokens.batch_size.tolist()) - {UNKNOWN, 1}):
        yield Part(f"batches of {batch_size} or more", tokens.batch_size >= batch_size)
    if (tokens.block != UNKNOWN).any():
        yield Part("the first token of a cache block", tokens.block == 0)
        yield Part("the last token of a cache block", tokens.block == int(tokens.block.max()))
    if (tokens.chunk != UNKNOWN).any():
        yield Part("the first token of a prefill chunk", tokens.chunk == 0)
        yield Part("tokens after the first prefill chunk", (tokens.chunk != UNKNOWN) & (tokens.position - 1 > tokens.chunk))
    yield Part("prefixes that were there before", tokens.repeated == 1)
    for start in _doublings(8, int(tokens.position.max())):
        yield Part(f"positions from {start} on", tokens.position >= start)
    yield Part("positions 1 to 3", tokens.position <= 3)
    for length in _doublings(16, int(tokens.length.max())):
        yield Part(f"sequences of {length} tokens or more", tokens.length >= length)
    for ranks in SHARDS:
        width = -(-vocab_size // ranks)
        for rank in range(ranks):
            last = min(vocab_size, (rank + 1) * width) - 1
            yield Part(f"token ids {rank * width} to {last} (part {rank + 1} of {ranks} of the vocabulary)",
                       tokens.token_id // width == rank)
    ids, counts = np.unique(tokens.token_id, return_counts=True)
    for token_id in ids[np.argsort(-counts, kind="stable")][:MOST_TOKEN_IDS]:
        yield Part(f"token id {token_id}", tokens.token_id == token_id)
    for sequence in np.unique(tokens.sequence):
        yield Part(f"sequence {sequence}", tokens.sequence == sequence)


def _doublings(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


LOOKS_LIKE: Sequence[tuple[str, str]] = (
    ("decode", "only decode steps: a stale slot or position of a captured graph, a cache written at the wrong place, a path for "
               "single rows without its bias"),
    ("vocabulary", "one part of the vocabulary: a shard of the LM head that is another rank's, padding that is not masked, "
                   "logits gathered in the wrong order"),
    ("token id ", "single token ids: a row at the border of two shards of the embedding or the LM head, looked up twice or not "
                  "at all"),
    ("batches", "only in batches: a row that takes its neighbour's value, gathered logits interleaved"),
    ("block", "borders of cache blocks: a block's last slot, a block table that is off by one"),
    ("chunk", "borders of prefill chunks: queries masked as if each chunk were the first"),
    ("prefix", "repeated prefixes: blocks of another prompt served from the prefix cache"),
    ("positions from", "only after so many tokens: rotary tables that end or are scaled, a window, attention over too few keys"),
    ("positions 1", "the first tokens: position or mask off by one"),
    ("sequences of", "long sequences: rotary scaling, a window, chunks"),
    ("sequence ", "single sequences: blocks or rows of another request"),
)
"""A word of a part -> faults that show there."""


def looks_like(judgement: Judgement) -> str:
    """In the words of planted faults what the differences look like; empty for rounding."""
    if judgement.answer != "bug":
        return ""
    where = next(test for test in judgement.tests if test.name == "where")
    if where.value > 1:
        return next((words for word, words in LOOKS_LIKE if word in where.group), "")
    if judgement.worst.name == "peak":
        return "a few tokens alone: a border row looked up twice, a race, a stale flag"
    if judgement.worst.name == "shift":
        return "one side finds everything likelier: logits scaled or a temperature applied, weights of another step"
    return ("scattered over all tokens: a lost or doubled all-reduce, a bias added once a rank, shards in the wrong order, "
            "another checkpoint")

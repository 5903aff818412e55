"""Rules that people use on log-probabilities and logits, as they stand in public repositories, and ``verdict``: bug or not?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from harness.studies.score.pairs import Pair
from harness.verdict.statistics import FEWEST_TOKENS, judge
from harness.verdict.tokens import Tokens, align, select

Called = Literal["bug", "rounding", "can't tell"]
MOST_SPLITS = 4
FEW_TOKENS = (64, 128)
"""The first so many tokens of each pair are judged by themselves too."""
SPLIT_TOKENS = 2 * FEWEST_TOKENS


VALUES: dict[str, Callable[[Pair, Tokens], float]] = {
    "largest difference": lambda pair, tokens: float(np.abs(tokens.difference).max()),
    "mean difference": lambda pair, tokens: float(np.abs(tokens.difference).mean()),
    "mean ratio of probabilities": lambda pair, tokens: float(np.exp(np.abs(tokens.difference)).mean()),
    "share of other most probable tokens": lambda pair, tokens: float((~np.isnan(tokens.flip)).mean()),
    "KL divergence": lambda pair, tokens: pair.whole.mean_kl if pair.whole else math.inf,
    "1 - cosine of logits": lambda pair, tokens: 1 - pair.whole.cosine if pair.whole else math.inf,
    "rtol=atol of logits": lambda pair, tokens: pair.whole.relative if pair.whole else math.inf,
}
"""What people look at: the larger, the worse."""
PEOPLES: dict[str, tuple[str, float]] = {
    "most probable tokens are equal": ("share of other most probable tokens", 0.0),
    "largest difference at most 0.05": ("largest difference", 0.05),
    "largest difference at most 0.5": ("largest difference", 0.5),
    "largest difference at most 1.5": ("largest difference", 1.5),
    "mean difference at most 0.05": ("mean difference", 0.05),
    "mean difference at most 0.5": ("mean difference", 0.5),
    "mean ratio of probabilities at most 1.05": ("mean ratio of probabilities", 1.05),
    "KL divergence at most 1e-3": ("KL divergence", 1e-3),
    "cosine of logits at least 0.99": ("1 - cosine of logits", 0.01),
    "logits allclose, rtol=atol=1e-3": ("rtol=atol of logits", 1e-3),
}
"""Rule -> what it looks at, and up to which value it calls a pair right."""
VERDICTS = ("verdict by dtype", "verdict by noise", "verdict by reference")


def values_of(pair: Pair) -> dict[str, float]:
    """What people look at, of a pair; infinite where one side gave no numbers."""
    if pair.b is None:
        return dict.fromkeys(VALUES, math.inf)
    tokens = align(pair.a, pair.b)
    return {name: value(pair, tokens) for name, value in VALUES.items()}


def called(pair: Pair, *, whole: bool = False) -> dict[str, list[tuple[int, Called]]]:
    """What each form of ``verdict`` says of a pair: (tokens, answer), on clean code once for each of several parts of it.

    ``whole``: once for all of it.
    """
    if pair.b is None:  # NaN: everybody sees that
        return {rule: [(pair.a.num_tokens, "bug")] for rule in VERDICTS}
    tokens, noise = align(pair.a, pair.b), align(pair.a, pair.noise)
    sides: dict[str, tuple[Tokens, Tokens | None]] = {"verdict by dtype": (tokens, None), "verdict by noise": (tokens, noise)}
    if pair.reference is not None:
        sides["verdict by reference"] = (align(pair.b, pair.reference), None)
    said: dict[str, list[tuple[int, Called]]] = {}
    for rule, (of_side, beside) in sides.items():
        parts = {rule: [of_side] if whole or pair.planted else splits(of_side)}
        parts |= {f"{rule}, {count} tokens": [select(of_side, np.arange(len(of_side)) < count)] for count in FEW_TOKENS}
        for name, of_name in parts.items():
            said[name] = [(len(part), judge(part, dtype=pair.dtype, noise=beside, vocab_size=pair.a.info.vocab_size).answer)
                          for part in of_name]
    return said


def splits(tokens: Tokens) -> list[Tokens]:
    """Disjoint parts of whole sequences, each of enough tokens for an answer of its own."""
    count = min(MOST_SPLITS, len(tokens) // SPLIT_TOKENS)
    if count < 2:
        return [tokens]
    numbers = np.unique(tokens.sequence)
    parts = [select(tokens, np.isin(tokens.sequence, numbers[at::count])) for at in range(count)]
    return parts if min(map(len, parts)) >= FEWEST_TOKENS else [tokens]

"""Does the sampler draw what its parameters ask for, and in the right proportions?

Part of the generation check. Rows of all kinds in one batch: greedy ones, temperatures, ``top_k`` and ``top_p`` alone and
together, tokens that may not be drawn yet. Each kind draws some hundred times from the same logits, at other positions and with
other seeds; how often each token comes must go with its probability, worked out in float64, and what is filtered out must never
come. A draw depends on its logits, seed and position alone, so the rows in another order must draw the same. Each
case runs on one rank: that all of them draw alike is seen where they generate.

Shape suffixes: R = rows, V = vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.checks.base import Answer, CheckContext
from harness.subjects.rank import DrawRow, Rank
from harness.verification.budgets import improbable_counts
from reference.hf import DTYPES

NUM_CASES = 2
NUM_DRAWS = 300
"""Of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawKind:
    """Sampling parameters of some rows."""

    temperature: float = 1.0
    top_k: int = 0
    num_in_nucleus: int = 0
    """``top_p`` lies half-way through the probability of the last one of so many tokens, where no rounding moves it to
    another; 0: no ``top_p``."""
    num_banned: int = 0
    """The so many most probable tokens may not be drawn."""

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items() if value) or "greedy"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawCase:
    """Logits and the kinds of rows that draw from them; values follow from the seed."""

    vocab_size: int
    spread: float
    kinds: tuple[DrawKind, ...]
    dtype: str
    only_rank: int
    seed: int

    kind: ClassVar[str] = "sampler"
    module: ClassVar[str] = "sampler"

    def __post_init__(self) -> None:
        # From a file they come as JSON values.
        kinds = tuple(kind if isinstance(kind, DrawKind) else DrawKind(**kind) for kind in self.kinds)
        object.__setattr__(self, "kinds", kinds)

    @property
    def size(self) -> int:
        return self.vocab_size

    def __str__(self) -> str:
        return f"draws from {self.vocab_size} {self.dtype} logits (seed={self.seed})"


def draw_sampler(context: CheckContext) -> list[DrawCase]:
    """The cases of a seed."""
    return draw_cases(random.Random(context.seed), context.dtype, context.tp_size)


def draw_cases(draw: random.Random, dtype: str, tp_size: int, num_cases: int = NUM_CASES) -> list[DrawCase]:
    """Every case has every filter, alone and with each other one."""
    cases = []
    for _ in range(num_cases):
        top_k, nucleus = draw.randint(4, 9), draw.randint(2, 8)
        kinds = [DrawKind(temperature=0.0), DrawKind(temperature=0.0, num_banned=2), DrawKind(), DrawKind(temperature=0.6),
                 DrawKind(temperature=2.0), DrawKind(top_k=top_k), DrawKind(top_k=1, temperature=1.5), DrawKind(top_k=10_000),
                 DrawKind(num_in_nucleus=nucleus), DrawKind(num_in_nucleus=1),
                 # Hot ones: with the probabilities of a temperature of 1 these nuclei would be smaller.
                 DrawKind(num_in_nucleus=8, temperature=2.5),
                 # A top_k that cuts half of the nucleus off changes what top_p is a share of.
                 DrawKind(top_k=top_k, num_in_nucleus=top_k // 2, temperature=1.3),
                 DrawKind(top_k=top_k, num_in_nucleus=2, num_banned=1)]
        draw.shuffle(kinds)
        cases.append(DrawCase(vocab_size=draw.randint(20, 150), spread=draw.choice((1.0, 2.0)), kinds=tuple(kinds), dtype=dtype,
                              only_rank=draw.randrange(tp_size), seed=draw.randrange(2**31)))
    return cases


@torch.inference_mode()
def run_sampler(rank: Rank, case: DrawCase) -> list[Answer]:
    """All kinds of rows in one batch."""
    if case.only_rank != rank.tp_rank:
        return []
    problem = _problem(rank, case)
    return [Answer(compared=0 if problem else len(case.kinds) * NUM_DRAWS, problem=problem)]


def _problem(rank: Rank, case: DrawCase) -> str | None:
    generator = torch.Generator().manual_seed(case.seed)
    logits_V = (case.spread * torch.randn(case.vocab_size, generator=generator, dtype=torch.float64)).to(DTYPES[case.dtype])
    targets = [_target(logits_V.double(), kind) for kind in case.kinds]
    # Kind after kind after kind: neighbours in the batch want different things.
    kind_R = torch.arange(len(case.kinds) * NUM_DRAWS) % len(case.kinds)
    order_R = torch.randperm(len(kind_R), generator=generator)
    token_R, shuffled_R = (
        _draw(rank, case, logits_V, [top_p for _, top_p in targets], number_R, kind_R[number_R])
        for number_R in (torch.arange(len(kind_R)), order_R))
    if (moved := (shuffled_R != token_R[order_R]).nonzero()).numel():
        row = int(order_R[moved[0, 0]])
        return f"row {row} ({case.kinds[kind_R[row]]}) draws another token at another place in the batch"
    if ((token_R < 0) | (token_R >= case.vocab_size)).any():
        return f"token {int(token_R.max())} or {int(token_R.min())} is outside the vocabulary"
    for number, (kind, (probability_V, top_p)) in enumerate(zip(case.kinds, targets, strict=True)):
        count_V = token_R[kind_R == number].bincount(minlength=case.vocab_size)
        unlikely = improbable_counts(count_V, probability_V)
        if unlikely > 1:
            wrong = ((count_V > 0) & (probability_V == 0)).nonzero().flatten().tolist()
            what = f"tokens {wrong} can't be drawn, and are" if wrong else f"frequencies {unlikely:.3g} of what can be believed"
            return f"{kind}, top_p={top_p:.4g}: {what}"
    return None


def _target(logits_V: Tensor, kind: DrawKind) -> tuple[Tensor, float]:
    """The probability of each token, float64, and the ``top_p`` that makes the nucleus so large."""
    order_V = logits_V.sort(descending=True, stable=True).indices
    open_V = logits_V.index_fill(0, order_V[: kind.num_banned], -torch.inf)
    order_V = open_V.sort(descending=True, stable=True).indices
    if kind.temperature == 0:
        return torch.zeros_like(logits_V).index_fill(0, order_V[:1], 1.0), 1.0
    kept = order_V[: kind.top_k or len(order_V)]
    top_p = 1.0
    if kind.num_in_nucleus:
        sorted_p = (open_V[kept] / kind.temperature).softmax(0)
        top_p = float(sorted_p[: kind.num_in_nucleus].sum() - sorted_p[kind.num_in_nucleus - 1] / 2)
        kept = kept[: kind.num_in_nucleus]
    probability_V = torch.zeros_like(logits_V)
    probability_V[kept] = (open_V[kept] / kind.temperature).softmax(0)
    return probability_V, top_p


def _draw(rank: Rank, case: DrawCase, logits_V: Tensor, top_ps: Sequence[float], number_R: Tensor,
          kind_R: Tensor) -> Tensor:
    """Rows ``number_R`` of kinds ``kind_R``, drawn in this order."""
    best = logits_V.sort(descending=True, stable=True).indices.tolist()
    rows = []
    for number, kind_number in zip(number_R.tolist(), kind_R.tolist(), strict=True):
        kind = case.kinds[kind_number]
        # Half of the rows differ by their seed alone, half by their position alone.
        seed, position = (case.seed, number) if number % 2 == 0 else (case.seed + number, 7)
        rows.append(DrawRow(temperature=kind.temperature, top_k=kind.top_k, top_p=top_ps[kind_number], seed=seed,
                            position=position, banned=tuple(best[: kind.num_banned])))
    return rank.draw(logits_V, rows)

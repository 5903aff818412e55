"""Does every attention backend read the paged cache as a dense formula in float64 reads keys and values laid out in a row?

Ragged prefill chunks and decode rows in one step, contexts that end on either side of a block's border, blocks in any order,
prefixes shared between sequences, and the GQA maps that uneven heads make. Slots that nobody wrote hold NaN: one that is read
shows in the result. One prompt is so long that a backend takes it in parts. Before all that, what precedes attention: the
rotation of queries and keys, and their way into the cache (``harness.checks.rotary``).

Shape suffixes: T = tokens of the step, Q / N = query / KV heads, H = head dim, L = tokens of one sequence, I = its queries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.checks.base import Answer, Cases, Check, CheckContext
from harness.checks.rotary import RotaryCase, draw_rotary, run_rotary
from harness.subjects.rank import AttentionStep, Rank
from harness.verification.budgets import rounding, sum_variance, underflow_variance
from reference.hf import DTYPES

NUM_CASES = 12
LONG_CHUNKS = ((100, 1500), (1200, 1))
"""For 8 query heads 19 million scores: more than a backend holds at once, and several tiles of any kernel."""
NUM_LONG_ROWS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """One step of several sequences; the values follow from the seed."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    chunks: tuple[tuple[int, int], ...]
    """(tokens in the cache before, tokens of this step) of each sequence"""
    shared: int
    """Leading tokens that all sequences have in common, as far as they reach."""
    sharpness: float
    """Queries are so many times larger: of a sharp softmax most keys do not count."""
    seed: int
    only_rank: int | None = None
    """Runs on this rank alone; None: on all."""
    num_rows: int | None = None
    """So many queries of a sequence are compared, the last one among them; None: all."""

    kind: ClassVar[str] = "scores"
    module: ClassVar[str] = "attention"

    @property
    def size(self) -> int:
        """Scores."""
        return self.num_q_heads * sum(new * (before + new) for before, new in self.chunks)

    def __str__(self) -> str:
        chunks = ", ".join(f"{before}+{new}" for before, new in self.chunks)
        return (f"attention of {self.num_q_heads} query and {self.num_kv_heads} KV heads of {self.head_dim} {self.dtype}, "
                f"blocks of {self.block_size}, tokens cached+new {chunks}, {self.shared} shared (seed={self.seed})")


def _draw(context: CheckContext) -> list[AttentionCase]:
    return draw_cases(random.Random(context.seed), context.results.config, context.dtype, context.tp_size)


def draw_cases(draw: random.Random, config: dict[str, Any], dtype: str, tp_size: int,
               num_cases: int = NUM_CASES) -> list[AttentionCase]:
    """The model's own heads, one KV head for all, one for each, and drawn ones; in the end the long prompt.

    That one runs on one rank: whether a backend puts its parts together is no matter of which heads they are.
    """
    num_q_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_q_heads
    maps = [(num_q_heads, config.get("num_key_value_heads") or num_q_heads), (tp_size + 1, 1), (tp_size + 1, tp_size + 1)]
    cases = []
    for number in range(num_cases):
        num_kv_heads = draw.randint(1, tp_size + 2)
        drawn = (num_kv_heads * draw.randint(-(-tp_size // num_kv_heads), 4 + tp_size // num_kv_heads), num_kv_heads)
        heads = maps[number] if number < len(maps) else drawn
        block_size = draw.choice((1, 2, 3, 16))
        cases.append(AttentionCase(
            num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim if number == 0 else draw.choice((8, 16)),
            block_size=block_size, dtype=dtype, chunks=_draw_chunks(draw, block_size), sharpness=draw.choice((1.0, 1.0, 8.0)),
            shared=draw.choice((0, block_size, 2 * block_size + 1)), seed=draw.randrange(2**31),
        ))
    cases.append(AttentionCase(num_q_heads=8 * tp_size, num_kv_heads=2 * tp_size, head_dim=8, block_size=16, dtype=dtype,
                               chunks=LONG_CHUNKS, sharpness=1.0, shared=100, seed=draw.randrange(2**31),
                               only_rank=draw.randrange(tp_size), num_rows=NUM_LONG_ROWS))
    return cases


def _draw_chunks(draw: random.Random, block_size: int) -> tuple[tuple[int, int], ...]:
    """Contexts at, before and behind the border of a block, and anywhere."""
    chunks = []
    for _ in range(draw.randint(1, 6)):
        total = max(1, draw.choice((block_size * draw.randint(1, 4) + draw.randint(-1, 1), draw.randint(1, 40))))
        new = draw.choice((1, 1, total, draw.randint(1, total)))
        chunks.append((total - new, new))
    return tuple(chunks)


@torch.inference_mode()
def run_case(rank: Rank, case: AttentionCase) -> list[Answer]:
    """One answer a backend that serves the layout."""
    if case.only_rank not in (None, rank.tp_rank):
        return []
    problem = _Problem(case)
    q_heads, _ = rank.attention.heads(case.num_q_heads, case.num_kv_heads)
    row_R, exact, variance = problem.dense(q_heads)
    answers = []
    for name, parts in rank.attention.attend(problem.step).items():
        whole = torch.cat(parts)
        shape = (sum(new for _, new in case.chunks), len(q_heads), case.head_dim)
        if whole.shape != shape or whole.dtype != problem.dtype:
            answers.append(Answer(compared=whole.numel(), module=f"attention ({name})", problem=(
                f"backend {name} gave {tuple(whole.shape)} {whole.dtype}, expected {shape} {problem.dtype}")))
            continue
        found = whole[row_R]
        # A row is a query head of a token: its elements share the scores and the sum that they are divided by.
        comparison = rounding(found.flatten(0, 1), exact.flatten(0, 1), variance.flatten(0, 1), shared=True)
        answers.append(Answer(
            module=f"attention ({name})", compared=found.numel(), error_over_budget=comparison.error_over_budget,
            problem=None if comparison.ok else (f"backend {name}: {comparison.where} of tokens times heads is off by "
                                                f"{comparison.error_over_budget:.3g} of the budget"),
            tensors={} if comparison.ok else {"found": found, "exact": exact}))
    return answers


class _Problem:
    """Queries, keys and values of all heads, the same on every rank."""

    def __init__(self, case: AttentionCase) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(case.seed)

        def draw(num_tokens: int, num_heads: int) -> Tensor:
            drawn = torch.randn((num_tokens, num_heads, case.head_dim), generator=generator, dtype=torch.float64)
            return drawn.to(self.dtype)

        longest = max(before + new for before, new in case.chunks)
        shared = draw(longest, case.num_kv_heads), draw(longest, case.num_kv_heads)
        self.queries = [(draw(new, case.num_q_heads) * case.sharpness).to(self.dtype) for _, new in case.chunks]
        self.keys_values: list[tuple[Tensor, Tensor]] = []
        for before, new in case.chunks:
            own = draw(before + new, case.num_kv_heads), draw(before + new, case.num_kv_heads)
            for tensor, common in zip(own, shared, strict=True):
                tensor[: case.shared] = common[: min(case.shared, before + new)]
            self.keys_values.append(own)

    @property
    def step(self) -> AttentionStep:
        case = self.case
        keys, values = zip(*self.keys_values, strict=True)
        return AttentionStep(num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim,
                             block_size=case.block_size, dtype=self.dtype, queries=self.queries, keys=keys, values=values,
                             shared=case.shared, seed=case.seed)

    def dense(self, q_heads: range) -> tuple[Tensor, Tensor, Tensor]:
        """Compared rows ``[R]``, sequence after sequence; of these heads the exact result and its rounding's variance."""
        parts: list[tuple[Tensor, ...]] = []
        group = self.case.num_q_heads // self.case.num_kv_heads
        kv_heads = torch.tensor([head // group for head in q_heads])
        first = 0
        for queries, keys_values, (before, new) in zip(self.queries, self.keys_values, self.case.chunks, strict=True):
            row_I = self._rows(new)
            q_QIH = queries[row_I, q_heads.start : q_heads.stop].transpose(0, 1)
            k_QLH, v_QLH = (x.transpose(0, 1)[kv_heads] for x in keys_values)
            visible_IL = torch.arange(k_QLH.shape[1]) <= (before + row_I)[:, None]
            exact, variance = self._exact(q_QIH.double(), k_QLH.double(), v_QLH.double(), visible_IL)
            parts.append((first + row_I, exact.transpose(0, 1), variance.transpose(0, 1)))
            first += new
        row_R, exact, variance = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return row_R, exact, variance

    def _exact(self, q_QIH: Tensor, k_QLH: Tensor, v_QLH: Tensor, visible_IL: Tensor) -> tuple[Tensor, Tensor]:
        """Exact result, and the variance that rounding gives it, to first order.

        A relative error e of key l's weight, ``exp(score - largest score)``, moves the result by ``p (v - result) e``. Scores are
        computed in float32 at least: a sum of H products, then the roundings of scaling, of the subtraction and of exp. The sums
        of weights times values and of weights have L addends; the first may take its weights rounded to the dtype, in which the
        small ones are subnormal.
        """
        dtype, factor = self.case.dtype, self.case.head_dim**-0.5
        wide = "float64" if dtype == "float64" else "float32"
        score_QIL = q_QIH @ k_QLH.transpose(1, 2) * factor
        p_QIL = score_QIL.masked_fill(~visible_IL, -torch.inf).softmax(-1)
        exact_QIH = p_QIL @ v_QLH
        squares_QIL = q_QIH.square() @ k_QLH.square().transpose(1, 2) * factor**2
        error_QIL = sum_variance(squares_QIL, score_QIL, wide, addends=self.case.head_dim)
        largest_QI1 = score_QIL.masked_fill(~visible_IL, 0.0).abs().amax(-1, keepdim=True)
        error_QIL = error_QIL + sum_variance(torch.zeros_like(score_QIL), score_QIL.abs() + largest_QI1 + 2, wide, addends=1)
        moved_QIL = p_QIL.square() * error_QIL
        # sum of moved * (v - exact)**2 over the keys, multiplied out
        scores_QIH = (moved_QIL @ v_QLH.square() - 2 * exact_QIH * (moved_QIL @ v_QLH)
                      + exact_QIH.square() * moved_QIL.sum(-1, keepdim=True)).clamp(min=0)
        num_keys, shares_QI1 = k_QLH.shape[1], p_QIL.square().sum(-1, keepdim=True)
        values_QIH = sum_variance(p_QIL.square() @ v_QLH.square(), exact_QIH, dtype, addends=num_keys)
        subnormal_QIL = (p_QIL > 0) & (p_QIL < torch.finfo(DTYPES[dtype]).smallest_normal)
        values_QIH = values_QIH + underflow_variance(dtype) * (subnormal_QIL.double() @ v_QLH.square())
        divisor_QI1 = sum_variance(shares_QI1, torch.ones_like(shares_QI1), wide, addends=num_keys)
        return exact_QIH, scores_QIH + values_QIH + divisor_QI1 * exact_QIH.square()

    def _rows(self, num_tokens: int) -> Tensor:
        """Which of a sequence's queries are compared."""
        if self.case.num_rows is None or self.case.num_rows >= num_tokens:
            return torch.arange(num_tokens)
        drawn = random.Random(self.case.seed).sample(range(num_tokens - 1), self.case.num_rows - 1)
        return torch.tensor(sorted([*drawn, num_tokens - 1]))


CHECK = Check(
    name="attention", question="Does attention over the paged cache, rotary embedding first, give what dense attention gives?",
    parts=(Cases(case=RotaryCase, draw=draw_rotary, run=run_rotary, kinds=(RotaryCase.kind,), needs="attention"),
           Cases(case=AttentionCase, draw=_draw, run=run_case, kinds=(AttentionCase.kind,), needs="attention")),
    needs_model=False)

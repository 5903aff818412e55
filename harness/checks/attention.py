"""Does every attention backend read the paged cache as a dense formula in float64 reads keys and values laid out in a row?

Ragged prefill chunks and decode rows in one step, contexts that end on either side of a block's border, blocks in any order,
prefixes shared between sequences, and the GQA maps that uneven heads make. Slots that nobody wrote hold NaN: one that is read
shows in the result. One prompt is so long that a backend takes it in parts. Before all that, what precedes attention: the
rotation of queries and keys, and their way into the cache (``harness.checks.rotary``).

Shape suffixes: T = tokens of the step, Q / N = query / KV heads, H = head dim, L = tokens of one sequence, I = its queries.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.frontend.sampling import SamplingParams
from engine.layers.attention_backends import BACKENDS
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.parallel.sharding import HeadShard, head_shard
from engine.ranks.ranks import RankContext
from engine.scheduling.batch import build_batch
from engine.scheduling.kv_cache import BlockManager
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request
from engine.scheduling.sequence import Sequence as EngineSequence
from harness.checks.base import CheckContext, Outcome
from harness.checks.rotary import check_rotary
from harness.verification.budgets import rounding, sum_variance
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

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> AttentionCase:
        """From JSON values."""
        return cls(**{**values, "chunks": tuple((before, new) for before, new in values["chunks"])})

    def __str__(self) -> str:
        chunks = ", ".join(f"{before}+{new}" for before, new in self.chunks)
        return (f"attention of {self.num_q_heads} query and {self.num_kv_heads} KV heads of {self.head_dim} {self.dtype}, "
                f"blocks of {self.block_size}, tokens cached+new {chunks}, {self.shared} shared (seed={self.seed})")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionAnswer:
    """What one backend of one rank gave."""

    backend: str
    compared: int
    error_over_budget: float
    problem: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def check_attention(context: CheckContext) -> Outcome:
    before = Outcome(cases=0, compared=0)
    if context.case is None or "positions" in context.case:
        before = check_rotary(context)
        if before.finding is not None or context.case is not None:
            return before
    if context.case is None:
        cases = draw_cases(random.Random(context.seed), context.truth.config, context.dtype, context.ranks.tp_size)
    else:
        cases = [AttentionCase.from_plain(context.case)]
    by_rank: list[list[list[AttentionAnswer]]] = context.ranks.run(run_cases, cases)
    everything = [answer for answers in by_rank for backends in answers for answer in backends]
    compared = before.compared + sum(answer.compared for answer in everything)
    extra = {"backends": sorted({answer.backend for answer in everything})}
    for number, case in enumerate(cases):
        for rank, answers in enumerate(by_rank):
            for answer in answers[number]:
                if answer.problem:
                    return Outcome(cases=len(cases), compared=compared, rank=rank, module=f"attention ({answer.backend})",
                                   error_over_budget=answer.error_over_budget, case=asdict(case), tensors=answer.tensors,
                                   extra=extra, finding=f"{case}: backend {answer.backend} on rank {rank}: {answer.problem}")
    return Outcome(cases=before.cases + len(cases), compared=compared, extra=extra,
                   error_over_budget=max(answer.error_over_budget for answer in everything))


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


def run_cases(rank: RankContext, cases: Sequence[AttentionCase]) -> list[list[AttentionAnswer]]:
    """Job: every case on every backend that serves its layout."""
    with torch.inference_mode():
        return [_run_case(rank, case) for case in cases]


def _run_case(rank: RankContext, case: AttentionCase) -> list[AttentionAnswer]:
    if case.only_rank not in (None, rank.tp.rank):
        return []
    heads = head_shard(case.num_q_heads, case.num_kv_heads, tp_rank=rank.tp.rank, tp_size=rank.tp.size)
    layout = AttentionLayout(heads=heads, head_dim=case.head_dim, block_size=case.block_size, dtype=DTYPES[case.dtype],
                             device=rank.device)
    problem = _Problem(case)
    chunks, num_blocks = problem.chunks()
    cache = problem.cache(heads, chunks, num_blocks, rank.device)
    batch = build_batch(chunks, case.block_size).to(rank.device)
    given = problem.given(heads, chunks)
    row_R, exact, variance = problem.dense(heads, chunks)
    answers = []
    for name, backend in BACKENDS.items():
        if backend.refusal(layout) is not None:
            continue
        whole = backend(layout)(given.to(rank.device), cache, batch).cpu()
        found = whole[row_R]
        # A row is a query head of a token: its elements share the scores and the sum that they are divided by.
        comparison = rounding(found.flatten(0, 1), exact.flatten(0, 1), variance.flatten(0, 1), shared=True)
        ok = comparison.ok and whole.shape == given.shape and found.dtype == given.dtype
        answers.append(AttentionAnswer(
            backend=name, compared=found.numel(), error_over_budget=comparison.error_over_budget,
            problem=None if ok else (f"{comparison.where} of tokens times heads is off by {comparison.error_over_budget:.3g} of "
                                     "the budget"),
            tensors={} if ok else {"given": given, "found": found, "exact": exact},
        ))
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

    def chunks(self) -> tuple[list[Chunk], int]:
        """The step, decodes first, its blocks handed out by the engine's own bookkeeping; and the number of blocks."""
        case = self.case
        num_blocks = 1 + sum(-(-(before + new) // case.block_size) for before, new in case.chunks)
        blocks = BlockManager(num_blocks, case.block_size)
        # Hand all blocks out and take them back in another order, so that no table counts up.
        fillers = [_sequence(-1 - number, [0]) for number in range(num_blocks)]
        for filler in fillers:
            blocks.grow(filler, 1)
        for filler in random.Random(case.seed).sample(fillers, num_blocks):
            blocks.release(filler)
        chunks = []
        for number, (before, new) in enumerate(case.chunks):
            ids = [token if token < case.shared else (number + 1) * 100_000 + token for token in range(before + new)]
            sequence = _sequence(number, ids)
            hits = blocks.cached_prefix(sequence)[: before // case.block_size]
            blocks.take_prefix(sequence, hits)
            blocks.grow(sequence, before + new)
            sequence.num_computed = before + new
            blocks.register(sequence)
            chunks.append(Chunk(sequence, before, new, samples=False, in_flight=False))
        return sorted(chunks, key=lambda chunk: chunk.num_tokens > 1), num_blocks

    def cache(self, heads: HeadShard, chunks: Sequence[Chunk], num_blocks: int, device: torch.device) -> LayerCache:
        """This rank's cache, NaN where no token stands. A shared block is written by each of its holders, alike."""
        shape = (num_blocks, heads.local_num_kv_heads, self.case.block_size, self.case.head_dim)
        caches = torch.full((2, *shape), float("nan"), dtype=self.dtype)
        for chunk in chunks:
            for cache, values in zip(caches, self.keys_values[chunk.sequence.request.request_id], strict=True):
                for position, row in enumerate(values[:, heads.kv_heads.start : heads.kv_heads.stop]):
                    block, slot = divmod(position, self.case.block_size)
                    cache[chunk.sequence.blocks[block], :, slot] = row
        return LayerCache(*caches.to(device))

    def given(self, heads: HeadShard, chunks: Sequence[Chunk]) -> Tensor:
        """This rank's queries in the step's order, ``[T, Q, H]``."""
        local = slice(heads.q_heads.start, heads.q_heads.stop)
        return torch.cat([self.queries[chunk.sequence.request.request_id][:, local] for chunk in chunks])

    def dense(self, heads: HeadShard, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the step that are compared, ``[R]``; of this rank's heads the exact result and the variance of its rounding."""
        parts: list[tuple[Tensor, ...]] = []
        group = self.case.num_q_heads // self.case.num_kv_heads
        kv_heads = torch.tensor([head // group for head in heads.q_heads])
        first = 0
        for chunk in chunks:
            number = chunk.sequence.request.request_id
            row_I = self._rows(chunk.num_tokens)
            q_QIH = self.queries[number][row_I, heads.q_heads.start : heads.q_heads.stop].transpose(0, 1)
            k_QLH, v_QLH = (x.transpose(0, 1)[kv_heads] for x in self.keys_values[number])
            visible_IL = torch.arange(k_QLH.shape[1]) <= (chunk.start + row_I)[:, None]
            exact, variance = self._exact(q_QIH.double(), k_QLH.double(), v_QLH.double(), visible_IL)
            parts.append((first + row_I, exact.transpose(0, 1), variance.transpose(0, 1)))
            first += chunk.num_tokens
        row_R, exact, variance = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return row_R, exact, variance

    def _exact(self, q_QIH: Tensor, k_QLH: Tensor, v_QLH: Tensor, visible_IL: Tensor) -> tuple[Tensor, Tensor]:
        """Exact result, and the variance that rounding gives it, to first order.

        A relative error e of key l's weight, ``exp(score - largest score)``, moves the result by ``p (v - result) e``. Scores are
        computed in float32 at least: a sum of H products, then the roundings of scaling, of the subtraction and of exp. The sums
        of weights times values and of weights have L addends; the first may take its weights rounded to the dtype.
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
        divisor_QI1 = sum_variance(shares_QI1, torch.ones_like(shares_QI1), wide, addends=num_keys)
        return exact_QIH, scores_QIH + values_QIH + divisor_QI1 * exact_QIH.square()

    def _rows(self, num_tokens: int) -> Tensor:
        """Which of a sequence's queries are compared."""
        if self.case.num_rows is None or self.case.num_rows >= num_tokens:
            return torch.arange(num_tokens)
        drawn = random.Random(self.case.seed).sample(range(num_tokens - 1), self.case.num_rows - 1)
        return torch.tensor(sorted([*drawn, num_tokens - 1]))


def _sequence(number: int, token_ids: list[int]) -> EngineSequence:
    return EngineSequence.from_request(Request(request_id=number, prompt_token_ids=tuple(token_ids), params=SamplingParams(),
                                               seed=0, max_tokens=1, stop_token_ids=frozenset()))

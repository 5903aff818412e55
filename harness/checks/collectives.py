"""Does each collective that the engine uses give the right numbers, and the same bits on every rank, every time?

Integers exactly, reals within the bound of rounding; odd sizes, zero rows, views that are not contiguous, and several
collectives back to back.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.parallel.ranks import RankContext
from harness.budgets import EXACT_INTEGER_LIMIT, reduction, same_bits
from harness.checks.base import CheckContext, Outcome
from harness.jobs import digest
from reference.hf import DTYPES

NUM_CASES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCase:
    """One collective on drawn values."""

    op: str
    """``all_reduce``, ``all_gather`` or ``all_reduce_min``"""
    shape: tuple[int, ...]
    dim: int
    dtype: str
    integers: bool
    contiguous: bool
    seed: int

    def __str__(self) -> str:
        kind = "integers" if self.integers else "reals"
        view = "" if self.contiguous else ", not contiguous"
        dim = f", dim={self.dim}" if self.op == "all_gather" else ""
        return f"{self.op} of {'×'.join(map(str, self.shape))} {self.dtype} {kind}{dim}{view} (seed={self.seed})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveAnswer:
    """What one rank saw."""

    error_over_budget: float
    compared: int
    digest: bytes
    repeats: bool
    """A second run gave the same bits."""


def check_collectives(context: CheckContext) -> Outcome:
    cases = draw_cases(random.Random(context.seed), context.dtype)
    by_rank = context.ranks.run(run_cases, cases)
    worst, compared = 0.0, 0
    for number, case in enumerate(cases):
        answers = [answers[number] for answers in by_rank]
        compared += sum(answer.compared for answer in answers)
        for rank, answer in enumerate(answers):
            problem = None
            if answer.error_over_budget > 1:
                problem = "wrong values" if case.integers else f"{answer.error_over_budget:.3g} of the rounding bound"
            elif answer.digest != answers[0].digest:
                problem = "other bits than rank 0"
            elif not answer.repeats:
                problem = "other bits when repeated"
            if problem:
                return Outcome(cases=len(cases), compared=compared, rank=rank, module=f"TPGroup.{case.op}",
                               error_over_budget=answer.error_over_budget, finding=f"{case}: {problem} on rank {rank}")
            worst = max(worst, answer.error_over_budget)
    return Outcome(cases=len(cases), compared=compared, error_over_budget=worst)


def draw_cases(draw: random.Random, dtype: str, num_cases: int = NUM_CASES) -> list[CollectiveCase]:
    """Cases for one dtype, shapes of zero and of one row always among them."""
    shapes = [(0, 7), (1, 1), (1, 576), (3,), (2, 3, 5), (4, 178)]
    cases = []
    for number in range(num_cases):
        rank = draw.randint(1, 3)
        shape = shapes[number] if number < len(shapes) else tuple(draw.randint(1, 33) for _ in range(rank))
        op = ("all_reduce", "all_gather", "all_reduce", "all_gather", "all_reduce_min")[number % 5]
        cases.append(CollectiveCase(op=op, shape=shape, dim=draw.randrange(len(shape)), dtype=dtype,
                                    integers=draw.random() < 0.5, contiguous=draw.random() < 0.7, seed=draw.randrange(2**31)))
    return cases


def run_cases(rank: RankContext, cases: Sequence[CollectiveCase]) -> list[CollectiveAnswer]:
    """Job: every rank draws the inputs of all ranks, so each can say by itself what is right."""
    return [_run_case(rank, case) for case in cases]


def _run_case(rank: RankContext, case: CollectiveCase) -> CollectiveAnswer:
    parts = [_draw_part(case, other, rank.tp.size) for other in range(rank.tp.size)]
    if case.op == "all_reduce_min":
        values = [int(part.double().sum()) for part in parts]
        smallest = [rank.tp.all_reduce_min(values[rank.tp.rank]) for _ in range(2)]
        wrong = 0.0 if smallest[0] == min(values) else float("inf")
        return CollectiveAnswer(error_over_budget=wrong, compared=1, digest=repr(smallest[0]).encode(),
                                repeats=smallest[0] == smallest[1])
    results = [_collect(rank, case, parts[rank.tp.rank].to(rank.device)).cpu() for _ in range(2)]
    if case.op == "all_gather":
        right, error = same_bits(results[0], torch.cat(parts, dim=case.dim)), 0.0
    elif case.integers:
        right, error = same_bits(results[0], torch.stack([part.double() for part in parts]).sum(0).to(parts[0].dtype)), 0.0
    else:
        comparison = reduction(results[0], parts, case.dtype)
        right, error = results[0].shape == parts[0].shape, comparison.error_over_budget
    return CollectiveAnswer(error_over_budget=error if right else float("inf"), compared=results[0].numel(),
                            digest=digest([results[0]]), repeats=same_bits(results[0], results[1]))


def _collect(rank: RankContext, case: CollectiveCase, part: Tensor) -> Tensor:
    if not case.contiguous:
        part = torch.stack((part, part), dim=-1)[..., 0]
    elif case.op == "all_reduce":
        part = part.clone()  # it may be overwritten, and the next run needs it
    return rank.tp.all_reduce(part) if case.op == "all_reduce" else rank.tp.all_gather(part, dim=case.dim)


def _draw_part(case: CollectiveCase, tp_rank: int, tp_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1_000_003 * tp_rank)
    if case.integers:
        # The sum over all ranks stays where the dtype counts exactly.
        limit = min(EXACT_INTEGER_LIMIT[case.dtype], 2**24) // tp_size
        return torch.randint(-limit, limit + 1, case.shape, generator=generator).to(DTYPES[case.dtype])
    return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(DTYPES[case.dtype])

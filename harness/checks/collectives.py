"""Does each collective that the engine uses give the right numbers, and the same bits on every rank, every time?

Integers exactly, reals within the bound of rounding; odd sizes, zero rows and views that are not contiguous. Each case runs
several times back to back on one buffer, which gets new values between the calls and is not waited for: some values, others,
the first again (what is left over from the call before would be right if the values were the same). All results are kept and
looked at in the end, when no later call may have changed them. A sum of integers is then summed once more as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from engine.ranks.ranks import RankContext
from harness.checks.base import ROUNDING_BOUND, CheckContext, Outcome
from harness.jobs import digest
from harness.verification.budgets import EXACT_INTEGER_LIMIT, reduction, same_bits
from reference.hf import DTYPES

NUM_CASES = 40
ORDER = (0, 1, 0, 1)
"""Which of a case's two draws each call gets."""


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
    """The same values gave the same bits again, others having come between."""


def check_collectives(context: CheckContext) -> Outcome:
    if context.case is None:
        cases = draw_cases(random.Random(context.seed), context.dtype)
    else:
        cases = [CollectiveCase(**{**context.case, "shape": tuple(context.case["shape"])})]
    by_rank = context.ranks.run(run_cases, cases)
    answers = [[answers[number] for answers in by_rank] for number in range(len(cases))]
    compared = sum(answer.compared for case_answers in answers for answer in case_answers)
    failing = [number for number in range(len(cases)) if _problem(cases[number], answers[number]) is not None]
    if not failing:
        worst = max(answer.error_over_budget for case_answers in answers for answer in case_answers)
        return Outcome(cases=len(cases), compared=compared, error_over_budget=worst, extra=ROUNDING_BOUND)
    smallest = min(failing, key=lambda number: math.prod(cases[number].shape))
    case, problem = cases[smallest], _problem(cases[smallest], answers[smallest])
    assert problem is not None, "only cases with a problem are failing"
    rank, what = problem
    return Outcome(cases=len(cases), compared=compared, rank=rank, module=f"TPGroup.{case.op}", case=asdict(case),
                   error_over_budget=answers[smallest][rank].error_over_budget, extra={"smallest_case": str(case)},
                   finding=f"{len(failing)} of {len(cases)} cases fail, the smallest {case}: {what} on rank {rank}")


def _problem(case: CollectiveCase, answers: Sequence[CollectiveAnswer]) -> tuple[int, str] | None:
    """The first rank with something wrong, and what."""
    for rank, answer in enumerate(answers):
        if answer.error_over_budget > 1:
            return rank, "wrong values" if case.integers else f"{answer.error_over_budget:.3g} of the rounding bound"
        if answer.digest != answers[0].digest:
            return rank, "other bits than rank 0"
        if not answer.repeats:
            return rank, "other bits when repeated"
    return None


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
    draws = [[_draw_part(each, other, rank.tp.size) for other in range(rank.tp.size)]
             for each in (case, replace(case, seed=case.seed ^ 1))]
    own = [parts[rank.tp.rank].to(rank.device) for parts in draws]
    if case.op == "all_reduce_min":
        values = [[int(part.double().sum()) for part in parts] for parts in draws]
        smallest = [rank.tp.all_reduce_min(values[number][rank.tp.rank]) for number in ORDER]
        wrong = 0.0 if smallest == [min(values[number]) for number in ORDER] else float("inf")
        return CollectiveAnswer(error_over_budget=wrong, compared=len(ORDER), digest=repr(smallest).encode(),
                                repeats=smallest[:2] == smallest[2:])
    found = _back_to_back(rank, case, own)
    error = max(_error(case, result, draws[number]) for result, number in zip(found, ORDER, strict=False))
    if case.op == "all_reduce" and case.integers:
        right = torch.stack([part.double() for part in draws[ORDER[-1]]]).sum(0) * rank.tp.size
        error = max(error, 0.0 if same_bits(found[-1], right.to(found[-1].dtype)) else float("inf"))
    return CollectiveAnswer(error_over_budget=error, compared=sum(map(torch.numel, found)), digest=digest(found),
                            repeats=same_bits(found[0], found[2]) and same_bits(found[1], found[3]))


def _back_to_back(rank: RankContext, case: CollectiveCase, own: Sequence[Tensor]) -> list[Tensor]:
    """The results of the calls in ``ORDER``, and of a sum of integers its sum, all of them copied to the host in the end."""
    shape = case.shape if case.contiguous else (*case.shape, 2)
    memory = torch.empty(shape, dtype=own[0].dtype, device=rank.device)
    buffer = memory if case.contiguous else memory[..., 0]
    found = []
    for number in ORDER:
        buffer.copy_(own[number])
        if case.op == "all_gather":
            found.append(rank.tp.all_gather(buffer, dim=case.dim))
        else:
            total = rank.tp.all_reduce(buffer)
            found.append(total.clone())  # it may be the buffer itself
    if case.op == "all_reduce" and case.integers:
        found.append(rank.tp.all_reduce(total))
    return [result.cpu() for result in found]


def _error(case: CollectiveCase, result: Tensor, parts: list[Tensor]) -> float:
    """As a fraction of what is allowed: of nothing for what must be exact."""
    if case.op == "all_gather":
        return 0.0 if same_bits(result, torch.cat(parts, dim=case.dim)) else float("inf")
    if result.shape != parts[0].shape:
        return float("inf")
    if case.integers:
        right = torch.stack([part.double() for part in parts]).sum(0).to(parts[0].dtype)
        return 0.0 if same_bits(result, right) else float("inf")
    return reduction(result, parts, case.dtype).error_over_budget


def _draw_part(case: CollectiveCase, tp_rank: int, tp_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1_000_003 * tp_rank)
    if case.integers:
        # The sum over all ranks, and its sum, stay where the dtype counts exactly.
        limit = min(EXACT_INTEGER_LIMIT[case.dtype], 2**24) // tp_size**2
        return torch.randint(-limit, limit + 1, case.shape, generator=generator).to(DTYPES[case.dtype])
    return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(DTYPES[case.dtype])

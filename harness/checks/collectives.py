"""Does each collective that the engine uses give the right numbers, and the same bits on every rank, every time?

Integers exactly, reals within the bound of rounding; odd sizes, zero rows and views that are not contiguous. Each case runs
several times back to back on one buffer, which gets new values between the calls and is not waited for: some values, others,
the first again (what is left over from the call before would be right if the values were the same). All results are kept and
looked at in the end, when no later call may have changed them. A sum of integers is then summed once more as it is.

A *storm* is many sums of many sizes back to back, turn after turn with other integers, and one rank late now and then; where
collectives can be captured, a turn is a CUDA graph that is replayed. Ranks that read each other's memory owe each of its sums
to what keeps them apart: a number that is the same in every replay, a buffer that is written again too early, a flag that is
not waited for.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.checks.base import ROUNDING_BOUND, Answer, Cases, Check, CheckContext
from harness.subjects.rank import Rank
from harness.verification.budgets import EXACT_INTEGER_LIMIT, digest, reduction, same_bits
from reference.hf import DTYPES

NUM_CASES = 40
NUM_STORMS = 2
NUM_TURNS = 8
"""Of a storm, and as many times ``_REPLAYED`` where they are replays."""
_REPLAYED = 25
_LATE_S, _LATE_CYCLES = 5e-4, 100_000
ORDER = (0, 1, 0, 1)
"""Which of a case's two draws each call gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCase:
    """One collective on drawn values."""

    op: str
    """``all_reduce``, ``all_gather``, ``all_reduce_min`` or ``storm``"""
    shape: tuple[int, ...]
    dim: int
    dtype: str
    integers: bool
    contiguous: bool
    seed: int

    kind: ClassVar[str] = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        return f"TPGroup.{'all_reduce' if self.op == 'storm' else self.op}"

    def __str__(self) -> str:
        kind = "integers" if self.integers else "reals"
        view = "" if self.contiguous else ", not contiguous"
        dim = f", dim={self.dim}" if self.op == "all_gather" else ""
        return f"{self.op} of {'×'.join(map(str, self.shape))} {self.dtype} {kind}{dim}{view} (seed={self.seed})"


def _draw(context: CheckContext) -> list[CollectiveCase]:
    draw = random.Random(context.seed)
    cases = draw_cases(draw, context.dtype)
    return cases + [CollectiveCase(op="storm", shape=(draw.randint(2000, 20_000),), dim=0, dtype=context.dtype, integers=True,
                                   contiguous=True, seed=draw.randrange(2**31)) for _ in range(NUM_STORMS)]


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


def run_case(rank: Rank, case: CollectiveCase) -> list[Answer]:
    """Every rank draws the inputs of all ranks, so each can say by itself what is right."""
    if case.op == "storm":
        return [_storm(rank, case)]
    draws = [[_draw_part(each, other, rank.tp_size) for other in range(rank.tp_size)]
             for each in (case, replace(case, seed=case.seed ^ 1))]
    if case.op == "all_reduce_min":
        values = [[int(part.double().sum()) for part in parts] for parts in draws]
        smallest = [rank.collectives.all_reduce_min(values[number][rank.tp_rank]) for number in ORDER]
        error = 0.0 if smallest == [min(values[number]) for number in ORDER] else float("inf")
        repeats, compared, bits_of = smallest[:2] == smallest[2:], len(ORDER), repr(smallest).encode()
    else:
        found = _back_to_back(rank, case, [parts[rank.tp_rank].to(rank.device) for parts in draws])
        error = max(_error(case, result, draws[number]) for result, number in zip(found, ORDER, strict=False))
        if case.op == "all_reduce" and case.integers:
            right = torch.stack([part.double() for part in draws[ORDER[-1]]]).sum(0) * rank.tp_size
            error = max(error, 0.0 if same_bits(found[-1], right.to(found[-1].dtype)) else float("inf"))
        repeats = same_bits(found[0], found[2]) and same_bits(found[1], found[3])
        compared, bits_of = max(1, sum(map(torch.numel, found))), digest(found)  # of zero rows the shape
    problem = None
    if error > 1:
        problem = "wrong values" if case.integers else f"{error:.3g} of the rounding bound"
    elif not repeats:
        problem = "other bits when repeated"
    return [Answer(error_over_budget=error, compared=compared, digests=(bits_of,), problem=problem)]


def _back_to_back(rank: Rank, case: CollectiveCase, own: Sequence[Tensor]) -> list[Tensor]:
    """The results of the calls in ``ORDER``, and of a sum of integers its sum, all of them copied to the host in the end."""
    shape = case.shape if case.contiguous else (*case.shape, 2)
    memory = torch.empty(shape, dtype=own[0].dtype, device=rank.device)
    buffer = memory if case.contiguous else memory[..., 0]
    found = []
    for number in ORDER:
        buffer.copy_(own[number])
        if case.op == "all_gather":
            found.append(rank.collectives.all_gather(buffer, dim=case.dim))
        else:
            total = rank.collectives.all_reduce(buffer)
            found.append(total.clone())  # it may be the buffer itself
    if case.op == "all_reduce" and case.integers:
        found.append(rank.collectives.all_reduce(total))
    return [result.cpu() for result in found]


@torch.inference_mode()
def _storm(rank: Rank, case: CollectiveCase) -> Answer:
    """Sums of every turn, held against what they must be without waiting for them."""
    device, dtype, draw = rank.device, DTYPES[case.dtype], random.Random(case.seed)
    largest = case.size * (64 if device.type == "cuda" else 1)
    sizes = [max(1, int(largest ** draw.random())) for _ in range(10)] + [1, largest]
    late = [draw.randrange(rank.tp_size) if draw.random() < 0.3 else None for _ in sizes]
    modulus = max(2, min(EXACT_INTEGER_LIMIT[case.dtype] // rank.tp_size, 61))
    index = torch.arange(largest, device=device)
    turn, num_wrong = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)

    def given(by: int, call: int) -> Tensor:
        """No two calls or turns have the same, and none of another rank's."""
        return (index[: sizes[call]] * 7 + case.seed % 97 + 5 * by + 3 * call + turn * (2 * by + 1)) % modulus

    def one_turn() -> list[Tensor]:
        buffers = [given(rank.tp_rank, call).to(dtype) for call in range(len(sizes))]
        found = []
        for buffer, late_rank in zip(buffers, late, strict=True):
            if late_rank == rank.tp_rank:
                _be_late(device)
            found.append(rank.collectives.all_reduce(buffer))
        for call, total in enumerate(found):
            right = torch.stack([given(by, call) for by in range(rank.tp_size)]).sum(0)
            num_wrong.add_((total.to(torch.int64) != right).any())
        turn.add_(1)
        return found

    found, num_turns = one_turn(), NUM_TURNS
    if device.type == "cuda" and getattr(rank.collectives, "capturable", False):
        num_turns *= _REPLAYED
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = one_turn()
        for _ in range(num_turns - 1):
            graph.replay()
    else:
        for _ in range(num_turns - 1):
            found = one_turn()
    wrong = int(num_wrong)
    return Answer(error_over_budget=float("inf") if wrong else 0.0, compared=num_turns * sum(sizes),
                  digests=(digest([total.cpu() for total in found]),),
                  problem=f"{wrong} of {num_turns * len(sizes)} sums back to back are wrong" if wrong else None)


def _be_late(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(_LATE_CYCLES)
    else:
        time.sleep(_LATE_S)


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


CHECK = Check(
    name="collectives",
    question="Do all-reduce, all-gather and the rest give the right numbers, and the same bits on every rank?",
    parts=(Cases(case=CollectiveCase, draw=_draw, run=run_case, needs="collectives", extra=ROUNDING_BOUND),), needs_model=False)

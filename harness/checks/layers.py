"""Does each parallel layer give what the unsharded one gives: to the bit on integers, within budget on real numbers?

With ``sum |x * w| + |b|`` within the dtype's exact integers no order of summation rounds, so a lost, doubled or misplaced
part shows as a wrong integer. Real numbers show what integers can't: a sum in a narrower type, a part rounded once too often.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from engine.parallel.sharding import scale_range
from engine.ranks.ranks import RankContext
from harness.checks.base import CheckContext, Outcome, together
from harness.checks.layer_cases import KINDS, NAMES, LayerCase, LayerProblem, RankPart
from harness.verification.budgets import rounding
from reference.hf import DTYPES

NUM_DRAWN = 6
"""Drawn shapes a kind of layer, beside the model's own; every other one with real numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAnswer:
    """What one rank saw of a case."""

    compared: int
    error_over_budget: float | None = None
    """None for integers."""
    problem: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of a problem: what was given, found and expected."""


def check_layers(context: CheckContext) -> Outcome:
    if context.case is None:
        cases, names = draw_cases(random.Random(context.seed), context.truth.config, context.dtype, context.ranks.tp_size), NAMES
    else:
        cases = [LayerCase(**context.case)]
        names = (cases[0].name,)
    by_rank = context.ranks.run(run_cases, cases)
    answers = list(zip(cases, zip(*by_rank, strict=True), strict=True))
    parts = [_judge(name, [(case, by_rank) for case, by_rank in answers if case.name == name]) for name in names]
    failing = [part for part in parts if part.finding is not None]
    return together(parts, told=min(failing, key=lambda part: LayerCase(**part.case).num_weights, default=None))


def _judge(name: str, answers: Sequence[tuple[LayerCase, Sequence[LayerAnswer]]]) -> Outcome:
    """One kind of layer: its cases, and what every rank saw of each."""
    everything = [answer for _, by_rank in answers for answer in by_rank]
    found = Outcome(kind=name, cases=sum(any(answer.compared for answer in by_rank) for _, by_rank in answers),
                    compared=sum(answer.compared for answer in everything))
    failing = [(case, by_rank) for case, by_rank in answers if any(answer.problem for answer in by_rank)]
    if not failing:
        return replace(found, error_over_budget=max((answer.error_over_budget or 0.0 for answer in everything), default=None))
    case, by_rank = min(failing, key=lambda pair: pair[0].num_weights)
    rank, answer = next((rank, answer) for rank, answer in enumerate(by_rank) if answer.problem)
    return replace(found, rank=rank, module=case.kind, case=asdict(case), tensors=answer.tensors,
                   error_over_budget=answer.error_over_budget, extra={"smallest_case": str(case)},
                   finding=f"{len(failing)} of {len(answers)} cases fail, the smallest {case}: rank {rank}: {answer.problem}")


def draw_cases(draw: random.Random, config: dict[str, Any], dtype: str, tp_size: int) -> list[LayerCase]:
    """For each kind of layer the model's own sizes (a long vocabulary cut) and drawn ones, with and without bias."""
    num_q_heads = config["num_attention_heads"]
    own = {"hidden_size": config["hidden_size"], "intermediate_size": config["intermediate_size"], "num_q_heads": num_q_heads,
           "num_kv_heads": config.get("num_key_value_heads") or num_q_heads,
           "head_dim": config.get("head_dim") or config["hidden_size"] // num_q_heads,
           "vocab_size": min(config["vocab_size"], 1009)}
    cases = []
    for kind in KINDS:
        for number in range(NUM_DRAWN + 2):
            sizes = own if number < 2 else draw_sizes(draw, tp_size)
            cases.append(LayerCase(kind=kind, bias=number % 4 > 1 and kind != "embedding", dtype=dtype,
                                   integers=number % 2 == 0, num_tokens=draw.randint(1, 16), outliers=draw.random() < 0.5,
                                   negative=kind == "lm_head" and number % 4 < 2, seed=draw.randrange(2**31), **sizes))
    return cases


def draw_sizes(draw: random.Random, tp_size: int) -> dict[str, int]:
    num_kv_heads = draw.randint(1, 4)
    group = draw.randint(-(-tp_size // num_kv_heads), max(4, tp_size))
    return {"hidden_size": draw.randint(1, 40), "intermediate_size": draw.randint(tp_size, 8 * tp_size),
            "num_q_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "head_dim": draw.choice((2, 4, 8)),
            "vocab_size": draw.randint(tp_size, 9 * tp_size)}


def run_cases(rank: RankContext, cases: Sequence[LayerCase]) -> list[LayerAnswer]:
    """Job: build each layer for this rank, load it through its loader, run it, compare."""
    return [_compare(case, *run_layer(rank, case)) for case in cases]


@torch.inference_mode()
def run_layer(rank: RankContext, case: LayerCase) -> tuple[Tensor, RankPart]:
    """What this rank's layer gives, and what it must give."""
    problem = LayerProblem(case)
    layer, weights = _build(rank, case, problem)
    for parameter, loaded, shard_id in weights:
        arguments = (parameter, loaded) if shard_id is None else (parameter, loaded, shard_id)
        parameter.weight_loader(*arguments)
    part = problem.part(rank.tp.rank, rank.tp.size)
    return layer(part.given.to(rank.device)).cpu(), part


def _compare(case: LayerCase, found: Tensor, part: RankPart) -> LayerAnswer:
    expected, size = part.exact.to(DTYPES[case.dtype]), found.numel()
    tensors = {"given": part.given, "found": found, "expected": expected, "exact": part.exact}
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return LayerAnswer(compared=size, tensors=tensors, problem=f"gave {tuple(found.shape)} {found.dtype}, expected "
                                                                   f"{tuple(expected.shape)} {expected.dtype}")
    if case.integers or case.kind == "embedding":
        wrong = (found != expected).nonzero()  # as integers: the sign of a zero is no finding
        if not len(wrong):
            return LayerAnswer(compared=size)
        place = tuple(wrong[0].tolist())
        return LayerAnswer(compared=size, tensors=tensors,
                           problem=f"{len(wrong)} of {size} values differ, the first at {place}: "
                                   f"got {found[place].item():g}, expected {expected[place].item():g}")
    comparison = rounding(found, part.exact, part.variance)
    if comparison.ok:
        return LayerAnswer(compared=size, error_over_budget=comparison.error_over_budget)
    return LayerAnswer(compared=size, error_over_budget=comparison.error_over_budget, tensors=tensors,
                       problem=f"{comparison.where} is off by {comparison.error_over_budget:.3g} of its budget")


def _build(rank: RankContext, case: LayerCase, problem: LayerProblem) -> tuple[nn.Module, list[tuple[Any, Tensor, Any]]]:
    """The layer, and (parameter, whole checkpoint tensor, shard_id) for each tensor to load."""
    tp, dtype, device, bias = rank.tp, DTYPES[case.dtype], rank.device, case.bias
    hidden, width, vocab = case.hidden_size, case.intermediate_size, case.vocab_size
    shard_ids: Sequence[Any] = (None,)
    layer: Any
    if case.kind == "replicated":
        layer = ReplicatedLinear(hidden, width, bias=bias, tp=tp, dtype=dtype, device=device)
    elif case.kind == "column":
        layer = ColumnParallelLinear(hidden, width, bias=bias, tp=tp, dtype=dtype, device=device)
    elif case.kind == "merged":
        layer = MergedColumnParallelLinear(hidden, (width, width), bias=bias, tp=tp, dtype=dtype, device=device)
        shard_ids = (0, 1)
    elif case.kind in ("qkv", "attention_output"):
        layer, shard_ids = QKVParallelLinear(hidden, case.head_dim, case.num_q_heads, case.num_kv_heads, bias=bias, tp=tp,
                                             dtype=dtype, device=device), ("q", "k", "v")
        if case.kind == "attention_output":
            layer, shard_ids = RowParallelLinear(
                case.num_q_heads * case.head_dim, hidden, bias=bias, tp=tp, dtype=dtype, device=device,
                input_range=scale_range(layer.heads.q_heads, case.head_dim)), (None,)
    elif case.kind == "row":
        layer = RowParallelLinear(width, hidden, bias=bias, tp=tp, dtype=dtype, device=device)
    elif case.kind == "embedding":
        layer = VocabParallelEmbedding(vocab, hidden, tp=tp, dtype=dtype, device=device)
    else:
        layer = ParallelLMHead(vocab, hidden, bias=bias, tp=tp, dtype=dtype, device=device)
    tensors = [(layer.weight, whole, shard_id) for whole, shard_id in zip(problem.weights, shard_ids, strict=True)]
    if bias:
        tensors += [(layer.bias, whole, shard_id) for whole, shard_id in zip(problem.biases, shard_ids, strict=True)]
    return layer, tensors

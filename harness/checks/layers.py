"""Does each parallel layer give what the unsharded one gives: to the bit on integers, within budget on real numbers?

With ``sum |x * w| + |b|`` within the dtype's exact integers no order of summation rounds, so a lost, doubled or misplaced
part shows as a wrong integer. Real numbers show what integers can't: a sum in a narrower type, a part rounded once too often.
"""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor

from harness.checks.base import Answer, Cases, Check, CheckContext
from harness.checks.layer_cases import LAYERS, NAMES, LayerCase, LayerProblem, RankPart
from harness.subjects.rank import LayerSpec, Rank
from harness.verification.budgets import rounding
from reference.hf import DTYPES

NUM_DRAWN = 6
"""Drawn shapes a kind of layer, beside the model's own; every other one with real numbers."""


def _draw(context: CheckContext) -> list[LayerCase]:
    return draw_cases(random.Random(context.seed), context.results.config, context.dtype, context.tp_size)


def draw_cases(draw: random.Random, config: dict[str, Any], dtype: str, tp_size: int) -> list[LayerCase]:
    """For each layer the model's own sizes (a long vocabulary cut) and drawn ones, with and without bias."""
    num_q_heads = config["num_attention_heads"]
    own = {"hidden_size": config["hidden_size"], "intermediate_size": config["intermediate_size"], "num_q_heads": num_q_heads,
           "num_kv_heads": config.get("num_key_value_heads") or num_q_heads,
           "head_dim": config.get("head_dim") or config["hidden_size"] // num_q_heads,
           "vocab_size": min(config["vocab_size"], 1009)}
    cases = []
    for layer in LAYERS:
        for number in range(NUM_DRAWN + 2):
            sizes = own if number < 2 else draw_sizes(draw, tp_size)
            cases.append(LayerCase(layer=layer, bias=number % 4 > 1 and layer != "embedding", dtype=dtype,
                                   integers=number % 2 == 0, num_tokens=draw.randint(1, 16), outliers=draw.random() < 0.5,
                                   negative=layer == "lm_head" and number % 4 < 2, seed=draw.randrange(2**31), **sizes))
    return cases


def draw_sizes(draw: random.Random, tp_size: int) -> dict[str, int]:
    """Sizes of one model, by their names in a layer's case, with something for every rank."""
    num_kv_heads = draw.randint(1, 4)
    group = draw.randint(-(-tp_size // num_kv_heads), max(4, tp_size))
    return {"hidden_size": draw.randint(1, 40), "intermediate_size": draw.randint(tp_size, 8 * tp_size),
            "num_q_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "head_dim": draw.choice((2, 4, 8)),
            "vocab_size": draw.randint(tp_size, 9 * tp_size)}


def run_case(rank: Rank, case: LayerCase) -> list[Answer]:
    """Build the layer for this rank, load it through its loader, run it, compare."""
    return [_compare(case, *run_layer(rank, case))]


def run_layer(rank: Rank, case: LayerCase) -> tuple[Tensor, RankPart]:
    """What this rank's layer gives, and what it must give."""
    problem = LayerProblem(case)
    layer = rank.layer(LayerSpec(kind=case.layer, config=case.config, dtype=problem.dtype, weights=problem.weights,
                                 biases=problem.biases if case.bias else None))
    part = problem.part(rank)
    return layer(part.given), part


def _compare(case: LayerCase, found: Tensor, part: RankPart) -> Answer:
    expected, size = part.exact.to(DTYPES[case.dtype]), found.numel()
    tensors = {"given": part.given, "found": found, "expected": expected, "exact": part.exact}
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return Answer(compared=size, tensors=tensors, problem=f"gave {tuple(found.shape)} {found.dtype}, expected "
                                                                   f"{tuple(expected.shape)} {expected.dtype}")
    if case.integers or case.layer == "embedding":
        wrong = (found != expected).nonzero()  # as integers: the sign of a zero is no finding
        if not len(wrong):
            return Answer(compared=size)
        place = tuple(wrong[0].tolist())
        return Answer(compared=size, tensors=tensors,
                           problem=f"{len(wrong)} of {size} values differ, the first at {place}: "
                                   f"got {found[place].item():g}, expected {expected[place].item():g}")
    comparison = rounding(found, part.exact, part.variance)
    if comparison.ok:
        return Answer(compared=size, error_over_budget=comparison.error_over_budget)
    return Answer(compared=size, error_over_budget=comparison.error_over_budget, tensors=tensors,
                       problem=f"{comparison.where} is off by {comparison.error_over_budget:.3g} of its budget")


CHECK = Check(
    name="layers", question="Does each parallel layer give what the unsharded one gives?",
    parts=(Cases(case=LayerCase, draw=_draw, run=run_case, kinds=NAMES, needs="layers"),), needs_model=False)

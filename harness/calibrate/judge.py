"""Runs the checks on clean code and counts false alarms: other seeds and shapes than the constants were fitted on.

Each case goes the way that it goes in ``verify``, one verdict a case. Collectives, layers and attention draw as they do there;
weights and logits see tiny models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from engine.parallel.ranks import RankFailure, Ranks
from harness.calibrate.collect import DTYPES, OPTIONS, Pools, orders_of
from harness.calibrate.draws import Shape, layer_shape, sizes_alone, value_seed
from harness.calibrate.jobs import load_model
from harness.checks import CHECKS, attention, collectives, layers
from harness.checks.base import CheckContext, Outcome
from harness.layer_cases import LayerCase
from harness.strategies import random_config
from harness.truth import Truth

TP_SIZES = (1, 2, 3, 4, 5, 8)
"""One of them is none that the constants were fitted on."""
DRAWN_CHECKS = ("collectives", "layers", "attention")
MODEL_CHECKS = ("weights", "logits")

Case = collectives.CollectiveCase | LayerCase | attention.AttentionCase


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check said of one clean case."""

    check: str
    dtype: str
    tp_size: int
    fabric: str
    compared: int
    error_over_budget: float | None
    alarm: str | None
    """What it found, where there is nothing to be found."""


def judge_drawn(check: str, pools: Pools, draw: random.Random, num_cases: int, seen: set[Shape]) -> Iterator[Verdict]:
    """One of ``DRAWN_CHECKS``, on cases as it draws them; what compares nothing does not count."""
    left = num_cases
    while left > 0:
        tp_size, dtype = draw.choice(TP_SIZES), draw.choice(DTYPES)
        ranks = pools(tp_size, draw.choice(orders_of(tp_size)))
        with sizes_alone(random_config(draw, tp_size), dtype, value_seed(draw, "judge")) as truth:
            for case in draw_cases(check, draw, truth, tp_size):
                if isinstance(case, LayerCase) and layer_shape(case, tp_size) in seen:
                    continue
                verdict = judged(check, context_of(ranks, truth, case))
                if left and (verdict.compared or verdict.alarm):
                    left -= 1
                    yield verdict


def draw_cases(check: str, draw: random.Random, truth: Truth, tp_size: int) -> list[Case]:
    """What one run of the check draws, with seeds to judge on."""
    cases: list[Case] = []
    if check == "collectives":
        cases += collectives.draw_cases(draw, truth.dtype)
    elif check == "layers":
        cases += layers.draw_cases(draw, truth.config, truth.dtype, tp_size)
    else:
        cases += attention.draw_cases(draw, truth.config, truth.dtype, tp_size)
    return [replace(case, seed=case.seed | 1) for case in cases]


def loaded(pools: Pools, draw: random.Random, truth: Truth, tp_size: int) -> Ranks:
    """Ranks with the model on them."""
    ranks = pools(tp_size, draw.choice(orders_of(tp_size)))
    ranks.run(load_model, truth.folder, truth.dtype, OPTIONS)
    return ranks


def judge_model(ranks: Ranks, truth: Truth) -> Iterator[Verdict]:
    """``MODEL_CHECKS`` on a loaded model."""
    for check in MODEL_CHECKS:
        yield judged(check, context_of(ranks, truth))


def context_of(ranks: Ranks, truth: Truth, case: Case | None = None) -> CheckContext:
    """For one case alone, or for a model."""
    return CheckContext(truth=truth, ranks=ranks, subject="engine", options=OPTIONS, seed=truth.seed,
                        case=None if case is None else asdict(case))


def judged(check: str, context: CheckContext) -> Verdict:
    """The check's own verdict; ranks that fail are a finding, as in ``verify``."""
    try:
        outcome = CHECKS[check](context)
    except RankFailure as failure:
        outcome = Outcome(cases=1, compared=0, finding=str(failure))
    return Verdict(check=check, dtype=context.dtype, tp_size=context.ranks.tp_size, fabric=context.ranks.fabric,
                   compared=outcome.compared, error_over_budget=outcome.error_over_budget, alarm=outcome.finding)

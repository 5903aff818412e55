"""What is the smallest relative error in one rank's part of a sum that a check sees?

The error is planted in the group that sums, before the sum, and the check is run as on clean code. Errors are powers of two
from the dtype's roundoff, below which hardly a value changes, to ``LARGEST``. What is seen is taken to be seen if it is larger.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import cast

import torch

from engine.ranks.ranks import Ranks
from harness.checks import collectives, layers
from harness.checks.base import CheckContext
from harness.checks.collectives import CollectiveCase
from harness.checks.layer_cases import LayerCase
from harness.strategies import random_config
from harness.studies.calibrate.draws import Pools, drawn_models, orders_of, sizes_alone, value_seed
from harness.studies.calibrate.jobs import Spoiled, arrange, run_logits
from harness.studies.calibrate.judge import context_of, judged, loaded
from harness.subjects.base import Schedule
from harness.subjects.engine import EngineSubject
from harness.verification.budgets import UNIT_ROUNDOFF, computation
from harness.verification.reference_results import ReferenceResults
from reports.records import PowerRow

TP_SIZES = (2, 4, 8)
LARGEST = 4.0
FIRST_TRIED = 6
SURE = 0.99
PLANTED_PER_MODEL = 4
SUMMING_LAYERS = ("row", "attention_output")

Case = CollectiveCase | LayerCase


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The smallest error that was seen in one case; infinite if none was."""

    check: str
    values: str
    dtype: str
    tp_size: int
    error: float
    per_run: int
    """How many such cases a run of the check draws."""


def ladder(dtype: str) -> list[float]:
    """The errors that are tried, ascending."""
    first = round(math.log2(UNIT_ROUNDOFF[dtype]))
    return [2.0**exponent for exponent in range(first, round(math.log2(LARGEST)) + 1)]


def smallest_seen(sees: Callable[[float], bool], errors: Sequence[float]) -> float:
    """The first of the ascending errors that is seen; infinite if the last one is not.

    By bisection, once one is seen: begun at ``FIRST_TRIED``, around which most are, with steps that double.
    """
    low, high = 0, len(errors)
    number, step = min(FIRST_TRIED, high - 1), 1
    while low < high:
        if sees(errors[number]):
            high = number
        else:
            low = number + 1
        step *= 2
        number = min(low + step - 1, high - 1) if high == len(errors) else (low + high) // 2
    return errors[low] if low < len(errors) else math.inf


def power_of_drawn(pools: Pools, draw: random.Random, check: str, dtype: str, tp_size: int,
                   num_cases: int) -> Iterator[Threshold]:
    """``collectives`` or ``layers`` on the sums among the cases that it draws, ``num_cases`` of integers and of reals each."""
    left = {"integers": num_cases, "reals": num_cases}
    while any(left.values()):
        order = draw.choice(orders_of(tp_size))
        ranks = pools(tp_size, order)
        with sizes_alone(random_config(draw, tp_size), dtype, value_seed(draw, "judge"), pools.device) as results:
            sums = sums_of(check, draw, results, tp_size)
            for case in sums:
                values = values_of(case)
                if not left[values]:
                    continue
                left[values] -= 1
                sees = partial(_check_sees, check, context_of(ranks, results, results.seed, asdict(case)), order,
                               draw.randrange(tp_size))
                yield Threshold(check=check, values=values, dtype=dtype, tp_size=tp_size,
                                error=smallest_seen(sees, ladder(dtype)), per_run=max(1, len(sums) // 2))


def _check_sees(check: str, context: CheckContext, order: str, tp_rank: int, error: float) -> bool:
    cast(EngineSubject, context.subject).ranks.run(arrange, order, Spoiled(tp_rank=tp_rank, error=error))
    return judged(check, context).alarm is not None


def sums_of(check: str, draw: random.Random, results: ReferenceResults, tp_size: int) -> list[Case]:
    """Those cases of one run of the check in which ranks add anything up, with seeds to judge on."""
    cases: Sequence[Case] = (collectives.draw_cases(draw, results.dtype) if check == "collectives" else
                             layers.draw_cases(draw, results.config, results.dtype, tp_size))
    return [replace(case, seed=case.seed | 1) for case in cases if is_sum(case)]


def is_sum(case: Case) -> bool:
    """Whether ranks add anything up in it."""
    if isinstance(case, CollectiveCase):
        return case.op == "all_reduce" and math.prod(case.shape) > 0
    return case.layer in SUMMING_LAYERS


def values_of(case: Case) -> str:
    """The kind of a case's values, as rows name it."""
    return "integers" if case.integers else "reals"


def power_of_logits(pools: Pools, draw: random.Random, dtype: str, num_cases: int) -> Iterator[Threshold]:
    """The check of logits on drawn models, one rank's part in the sum of one module being off; so many cases a tp_size."""
    for results in drawn_models(draw, "judge", -(-num_cases // PLANTED_PER_MODEL), (dtype,), pools.device):
        paths = sum_paths(results)
        for tp_size in pools.sizes(TP_SIZES):
            ranks = loaded(pools, draw, results, tp_size)
            for _ in range(PLANTED_PER_MODEL):
                sees = partial(_logits_show, ranks, results, draw.choice(paths), draw.randrange(tp_size))
                yield Threshold(check="logits", values="reals", dtype=dtype, tp_size=tp_size, per_run=1,
                                error=smallest_seen(sees, ladder(dtype)))


def _logits_show(ranks: Ranks, results: ReferenceResults, path: str, tp_rank: int, error: float) -> bool:
    """What ``check_logits`` sees; all tokens in one step, and no search for the module: both take many times as long."""
    sequences = results.schedule.sequences
    schedule = Schedule(sequences=sequences, steps=(tuple((number, len(ids)) for number, ids in enumerate(sequences)),))
    found = ranks.run(run_logits, schedule, path, Spoiled(tp_rank=tp_rank, error=error))[0][0]
    return not computation(found, torch.cat(results.baseline_logits), torch.cat(results.exact_logits), results.dtype,
                           list(torch.cat(results.simulated_logits, 1))).ok


def sum_paths(results: ReferenceResults) -> list[str]:
    """Modules of a decoder whose output is a sum over the ranks."""
    layers = range(results.config["num_hidden_layers"])
    return [f"model.layers.{number}.{name}" for number in layers for name in ("self_attn.o_proj", "mlp.down_proj")]


def power_rows(thresholds: Iterable[Threshold]) -> list[PowerRow]:
    """One row a check, kind of values, dtype and tp_size."""
    groups: dict[tuple[str, str, str, int], list[Threshold]] = defaultdict(list)
    for threshold in thresholds:
        groups[threshold.check, threshold.values, threshold.dtype, threshold.tp_size].append(threshold)
    return [_row(group) for _, group in sorted(groups.items())]


def _row(group: Sequence[Threshold]) -> PowerRow:
    errors = sorted(threshold.error for threshold in group)
    first, per_run = group[0], min(threshold.per_run for threshold in group)
    telling = [error for error in ladder(first.dtype) if errors[0] <= error <= errors[-1]]
    return PowerRow(
        check=first.check, values=first.values, dtype=first.dtype, tp_size=first.tp_size, cases=len(errors), per_run=per_run,
        seen=[[error, sum(each <= error for each in errors) / len(errors)] for error in telling],
        half=seen_in(errors, 0.5), most=seen_in(errors, SURE),
        # A run misses an error if all of its cases do.
        run=seen_in(errors, 1 - (1 - SURE) ** (1 / per_run)),
    )


def seen_in(errors: Sequence[float], share: float) -> float | None:
    """The smallest error that is seen in this share of the cases at least; ``errors`` are ascending."""
    error = errors[max(0, math.ceil(share * len(errors) - 1e-9) - 1)]
    return error if math.isfinite(error) else None

"""Are the logits of the whole model within budget: prefill in chunks, mixed with decode steps, several sequences at once?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from harness import jobs
from harness.budgets import computation
from harness.checks.base import CheckContext, Outcome
from harness.localise import localise


def check_logits(context: CheckContext) -> Outcome:
    truth, script = context.truth, context.truth.script
    answers = context.ranks.run(jobs.logits, script)
    cases = len(script.sequences)
    differing = [rank for rank, (digest, _) in enumerate(answers) if digest != answers[0][0]]
    if differing:
        outcome = Outcome(cases=cases, compared=0, rank=differing[0], module="lm_head", finding=(
            f"ranks {differing} have other logits than rank 0: the ranks of one run must agree to the bit"))
        return _located(outcome, context, range(cases))
    # All sequences together: rounding errors go together within a sequence, so that one alone has a lucky baseline at times.
    tensors = {"found": torch.cat(answers[0][1]), "baseline": torch.cat(truth.baseline_logits),
               "exact": torch.cat(truth.exact_logits)}
    found, baseline, exact = tensors.values()
    if found.shape != exact.shape:
        outcome = Outcome(cases=cases, compared=0, module="lm_head", tensors=tensors,
                          finding=f"the logits are {tuple(found.shape)}, they should be {tuple(exact.shape)}")
        return _located(outcome, context, range(cases))
    comparison = computation(found, baseline, exact, context.dtype, list(torch.cat(truth.simulated_logits, 1)))
    if comparison.ok:
        return Outcome(cases=cases, compared=comparison.compared, error_over_budget=comparison.error_over_budget)
    row = max(0, comparison.row)
    sequence = next(number for number in range(cases) if row < sum(map(len, script.sequences[: number + 1])))
    token = row - sum(map(len, script.sequences[:sequence]))
    where = f"sequence {sequence}, token {token}" if comparison.row >= 0 else "the median token"
    outcome = Outcome(cases=cases, compared=comparison.compared, error_over_budget=comparison.error_over_budget, module="lm_head",
                      tensors={name: tensor[row : row + 1] for name, tensor in tensors.items()},
                      finding=f"logits of {where}: {comparison.error_over_budget:.3g} of the budget")
    return _located(outcome, context, sorted(range(cases), key=lambda number: number != sequence))


def _located(outcome: Outcome, context: CheckContext, sequences: Iterable[int]) -> Outcome:
    """The same finding with the first module over its budget, in the first of these sequences in which one is."""
    places = (localise(context.ranks, context.truth, sequence) for sequence in sequences)
    place = next((place for place in places if place is not None), None)
    if place is None:
        return replace(outcome, finding=f"{outcome.finding}; no single module is over its budget: the error builds up over the "
                                        "layers")
    extra: dict[str, Any] = {"token": place.token}
    if place.effect is not None:
        extra |= {"effect": place.effect.kind, "effect_text": place.effect.text}
    return replace(outcome, finding=f"{outcome.finding}; {place}", rank=place.rank, module=place.module, extra=extra)

"""Are the logits of the whole model within budget: prefill in chunks, mixed with decode steps, several sequences at once?"""

from __future__ import annotations

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
        return Outcome(cases=cases, compared=0, rank=differing[0], module="lm_head",
                       finding=f"ranks {differing} have other logits than rank 0: the ranks of one run must agree to the bit")
    comparisons = [
        computation(candidate, baseline, exact, context.dtype)
        for candidate, baseline, exact in zip(answers[0][1], truth.baseline_logits, truth.exact_logits, strict=True)
    ]
    worst = max(range(cases), key=lambda number: comparisons[number].error_over_budget)
    comparison = comparisons[worst]
    compared = sum(each.compared for each in comparisons)
    if comparison.ok:
        return Outcome(cases=cases, compared=compared, error_over_budget=comparison.error_over_budget)
    place = localise(context.ranks, truth, worst)
    where = str(place) if place else "no single module is over its budget: the error builds up over the layers"
    return Outcome(cases=cases, compared=compared, error_over_budget=comparison.error_over_budget,
                   rank=place.rank if place else None, module=place.module if place else "lm_head",
                   finding=f"logits of sequence {worst}, token {comparison.row}: {comparison.error_over_budget:.3g} of the "
                           f"budget; {where}")

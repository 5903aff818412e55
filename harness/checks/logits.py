"""Are the logits of the whole model within budget: prefill in chunks, mixed with decode steps, several sequences at once?"""

from __future__ import annotations

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
        return Outcome(cases=cases, compared=0, rank=differing[0], module="lm_head",
                       finding=f"ranks {differing} have other logits than rank 0: the ranks of one run must agree to the bit")
    # All sequences together: rounding errors go together within a sequence, so that one alone has a lucky baseline at times.
    tensors = {"found": torch.cat(answers[0][1]), "baseline": torch.cat(truth.baseline_logits),
               "exact": torch.cat(truth.exact_logits)}
    found, baseline, exact = tensors.values()
    if found.shape != exact.shape:
        return Outcome(cases=cases, compared=0, module="lm_head", tensors=tensors,
                       finding=f"the logits are {tuple(found.shape)}, they should be {tuple(exact.shape)}")
    comparison = computation(found, baseline, exact, context.dtype)
    if comparison.ok:
        return Outcome(cases=cases, compared=comparison.compared, error_over_budget=comparison.error_over_budget)
    row = max(0, comparison.row)
    sequence = next(number for number in range(cases) if row < sum(map(len, script.sequences[: number + 1])))
    token = row - sum(map(len, script.sequences[:sequence]))
    where = f"sequence {sequence}, token {token}" if comparison.row >= 0 else "the median token"
    place = localise(context.ranks, truth, sequence)
    how = str(place) if place else "no single module is over its budget: the error builds up over the layers"
    return Outcome(cases=cases, compared=comparison.compared, error_over_budget=comparison.error_over_budget,
                   rank=place.rank if place else None, module=place.module if place else "lm_head",
                   tensors={name: tensor[row : row + 1] for name, tensor in tensors.items()},
                   finding=f"logits of {where}: {comparison.error_over_budget:.3g} of the budget; {how}")

"""Are greedy ids those of the exact reference, but for near-ties that rounding may turn round?

After a difference that is excused the comparison goes on, with the reference's id put in. Every rank must draw the same ids,
greedy and sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness import jobs
from harness.budgets import near_tie_margin, too_many_flips
from harness.checks.base import CheckContext, Outcome
from harness.truth import NUM_NEW_TOKENS, Truth


@dataclass(slots=True)
class _Prompt:
    """One prompt on its way along the reference's ids."""

    number: int
    token_ids: list[int]
    expected: list[int]
    margins: list[float]
    done: int = 0
    flips: int = 0

    @property
    def left(self) -> int:
        return len(self.expected) - self.done


def check_generation(context: CheckContext) -> Outcome:
    truth = context.truth
    tie = max(near_tie_margin(baseline, exact, context.dtype)
              for baseline, exact in zip(truth.greedy_baseline_logits, truth.greedy_exact_logits, strict=True))
    prompts = [
        _Prompt(number, list(ids), result.token_ids, result.margins)
        for number, (ids, result) in enumerate(zip(truth.prompts, truth.greedy, strict=True))
    ]
    compared = 0
    while unfinished := [prompt for prompt in prompts if prompt.left]:
        inputs = [prompt.token_ids + prompt.expected[: prompt.done] for prompt in unfinished]
        params = {"temperature": 0.0, "max_tokens": max(prompt.left for prompt in unfinished)}
        by_rank = context.ranks.run(jobs.generate, inputs, params)
        if finding := _disagreement(by_rank, "greedy"):
            return Outcome(cases=len(prompts), compared=compared, **finding)
        for prompt, drawn in zip(unfinished, by_rank[0], strict=True):
            if not drawn:
                return Outcome(cases=len(prompts), compared=compared, rank=0,
                               finding=f"prompt {prompt.number}, step {prompt.done}: no token was drawn")
            for token_id in drawn[: prompt.left]:
                compared += 1
                step = prompt.done
                prompt.done += 1
                if token_id == prompt.expected[step]:
                    continue
                if prompt.margins[step] > tie:
                    return Outcome(
                        cases=len(prompts), compared=compared, rank=0, module="lm_head",
                        error_over_budget=prompt.margins[step] / tie,
                        finding=f"prompt {prompt.number}, step {step}: expected token {prompt.expected[step]}, got {token_id} "
                                f"(reference top-2 margin {prompt.margins[step]:.3g}, ties end at {tie:.3g})",
                    )
                prompt.flips += 1
                break
    flips, total = sum(prompt.flips for prompt in prompts), sum(prompt.done for prompt in prompts)
    baseline_flips, baseline_total = _baseline_flips(truth)
    excused = flips / total
    extra = {"flips": flips, "tokens": total, "baseline_flips": baseline_flips, "baseline_tokens": baseline_total,
             "tie_margin": tie}
    if too_many_flips(flips, total, baseline_flips, baseline_total):
        return Outcome(cases=len(prompts), compared=compared, module="lm_head", rank=0, excused=excused, extra=extra,
                       finding=f"{flips} of {total} greedy tokens differ at near-ties, the baseline turns round "
                               f"{baseline_flips} of {baseline_total}: too often for rounding")
    sampled = context.ranks.run(jobs.generate, truth.prompts, {"temperature": 0.8, "top_p": 0.95, "seed": context.seed,
                                                               "max_tokens": 8})
    if finding := _disagreement(sampled, "sampled"):
        return Outcome(cases=len(prompts), compared=compared, **finding)
    return Outcome(cases=len(prompts), compared=compared, excused=excused, extra=extra)


def _disagreement(by_rank: list[list[list[int]]], what: str) -> dict[str, Any]:
    for rank, drawn in enumerate(by_rank):
        for number, (own, first) in enumerate(zip(drawn, by_rank[0], strict=True)):
            if own != first:
                step = next((i for i, (a, b) in enumerate(zip(own, first, strict=False)) if a != b), min(len(own), len(first)))
                return {"rank": rank, "module": "lm_head",
                        "finding": f"{what} ids differ between ranks: prompt {number}, step {step}: rank {rank} drew "
                                   f"{own[step : step + 1]}, rank 0 {first[step : step + 1]}"}
    return {}


def _baseline_flips(truth: Truth) -> tuple[int, int]:
    """How often the unsharded model of the same dtype draws another token than the exact one, teacher-forced."""
    flips = sum(int((logits.argmax(-1).cpu() != exact.argmax(-1).cpu()).sum()) for logits, exact in
                zip(truth.greedy_baseline_logits, truth.greedy_exact_logits, strict=True))
    return flips, NUM_NEW_TOKENS * len(truth.prompts)

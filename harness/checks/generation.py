"""Does generation bring what it must: from the sampler, from the model under test, from every parameter of a request?

Three kinds of case. *sampler*: the sampler by itself (``harness.checks.draws``). *model*: the model's own checkpoint behind the
subject's front door, greedy and sampled prompts in one batch, in a cache that does not hold them all. Greedy ids are those of the
exact reference, but for near-ties that rounding may turn round; after a difference that is excused the comparison goes on, with
the reference's id put in. Sampled ids must be such as the exact reference would draw, in probability. *requests*: every
parameter of a request, on a small model (``harness.checks.requests``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checks.base import Cases, Check, CheckContext, Outcome, Whole
from harness.checks.draws import DrawCase, draw_sampler, run_sampler
from harness.checks.requests import check_requests
from harness.checks.semantics import WrongAnswerError, answered, require
from harness.verification.budgets import improbability, near_tie_margins, too_many_flips
from harness.verification.reference_results import ReferenceResults

Draw = Callable[[Sequence[Sequence[int]], Sequence[Mapping[str, Any]]], list[list[int]]]
"""Prompts and sampling parameters of each -> the token ids after each prompt."""

SAMPLING = {"temperature": 0.8, "top_p": 0.95}
NUM_SAMPLED = 16


class _DifferentError(WrongAnswerError):
    """A greedy token that rounding does not explain."""

    def __init__(self, what: str, *, error_over_budget: float) -> None:
        super().__init__(what)
        self.error_over_budget = error_over_budget


@dataclass(slots=True)
class _Prompt:
    """One prompt on its way along the reference's ids."""

    number: int
    token_ids: list[int]
    expected: list[int]
    margins: list[float]
    ties: list[float]
    """The largest margin that rounding may turn round, of each token."""
    done: int = 0
    flips: int = 0

    @property
    def left(self) -> int:
        return len(self.expected) - self.done

    def take(self, drawn: Sequence[int]) -> int:
        """Go along with what was drawn, up to the first difference. Returns how many tokens were compared.

        Raises:
            _DifferentError: at a difference that rounding does not explain.
        """
        first = self.done
        for token_id in drawn:
            step = self.done
            self.done += 1
            if token_id == self.expected[step]:
                continue
            if self.margins[step] > self.ties[step]:
                raise _DifferentError(
                    f"prompt {self.number}, step {step}: expected token {self.expected[step]}, got {token_id} (reference top-2 "
                    f"margin {self.margins[step]:.3g}, ties end at {self.ties[step]:.3g})",
                    error_over_budget=self.margins[step] / self.ties[step] if self.ties[step] else math.inf)
            self.flips += 1
            break
        return self.done - first


def check_model(context: CheckContext) -> Outcome:
    """The model's own checkpoint."""
    results = context.results
    # All of one prompt and its answer, and half of the others'.
    lengths = [len(prompt) + results.num_new_tokens + 1 for prompt in results.prompts]
    num_kv_blocks = -(-(max(lengths) + sum(lengths) // 2) // context.options["block_size"])

    def draw(prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        with answered():
            return context.subject.generate(prompts, params, {**context.options, "num_kv_blocks": num_kv_blocks})

    return compare(results, context.seed, draw)


def compare(results: ReferenceResults, seed: int, draw: Draw) -> Outcome:
    """Greedy ids against the exact reference, sampled ones against what it would draw."""
    ties = _ties(results)
    prompts = [
        _Prompt(number, list(ids), result.token_ids, result.margins, ties[number])
        for number, (ids, result) in enumerate(zip(results.prompts, results.greedy, strict=True))
    ]
    compared = 0
    cases = 2 * len(prompts)
    sampled: list[list[int]] = []
    try:
        while unfinished := [prompt for prompt in prompts if prompt.left]:
            inputs = [prompt.token_ids + prompt.expected[: prompt.done] for prompt in unfinished]
            params = [{"temperature": 0.0, "max_tokens": prompt.left, "ignore_eos": True} for prompt in unfinished]
            if not sampled:  # beside the greedy ones
                inputs += map(list, results.prompts)
                params += [{**SAMPLING, "seed": seed, "max_tokens": min(NUM_SAMPLED, results.num_new_tokens),
                            "ignore_eos": True}] * len(prompts)
            drawn = draw(inputs, params)
            _require_whole(drawn, params, results.config["vocab_size"])
            sampled = sampled or drawn[len(unfinished) :]
            for prompt, ids in zip(unfinished, drawn, strict=False):
                compared += prompt.take(ids)
    except _DifferentError as wrong:
        return Outcome(cases=cases, compared=compared, rank=0, module="lm_head", error_over_budget=wrong.error_over_budget,
                       finding=str(wrong))
    except WrongAnswerError as wrong:
        return Outcome(cases=cases, compared=compared, module="lm_head", finding=str(wrong))
    flips, total = sum(prompt.flips for prompt in prompts), sum(prompt.done for prompt in prompts)
    baseline_flips, baseline_total = _baseline_flips(results)
    excused = flips / total
    extra = {"flips": flips, "tokens": total, "baseline_flips": baseline_flips, "baseline_tokens": baseline_total,
             "tie_margin": max(map(max, ties))}
    if too_many_flips(flips, total, baseline_flips, baseline_total):
        return Outcome(cases=cases, compared=compared, module="lm_head", rank=0, excused=excused, extra=extra,
                       finding=f"{flips} of {total} greedy tokens differ at near-ties, the baseline turns round "
                               f"{baseline_flips} of {baseline_total}: too often for rounding")
    for number, (prompt_ids, token_ids) in enumerate(zip(results.prompts, sampled, strict=True)):
        rows = slice(len(prompt_ids) - 1, -1)
        (exact,), (baseline,) = (reference.logits([[*prompt_ids, *token_ids]]) for reference in (results.exact, results.baseline))
        unlikely = improbability(baseline[rows], exact[rows], token_ids, **SAMPLING)
        compared += len(token_ids)
        if unlikely > 1:
            return Outcome(cases=cases, compared=compared, rank=0, module="lm_head", error_over_budget=unlikely,
                           finding=f"sampled ids of prompt {number}, {token_ids}, are not what the reference would draw at "
                                   f"{SAMPLING}: {unlikely:.3g} of what can be believed")
    return Outcome(cases=cases, compared=compared, excused=excused, extra=extra)


def _ties(results: ReferenceResults) -> list[list[float]]:
    """For each prompt and greedy token the largest top-2 margin that rounding may turn round."""
    by_prompt = zip(results.greedy_baseline_logits, results.greedy_exact_logits, results.greedy_simulated_logits, strict=True)
    return [near_tie_margins(baseline, exact, results.dtype, list(draws)).tolist() for baseline, exact, draws in by_prompt]


def _require_whole(drawn: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]], vocab_size: int) -> None:
    """Answers are as long as was asked, of tokens that exist: nothing ends them before."""
    require(len(drawn) == len(params), f"{len(drawn)} answers to {len(params)} prompts")
    for number, (ids, own) in enumerate(zip(drawn, params, strict=True)):
        require(len(ids) == own["max_tokens"], f"answer {number} has {len(ids)} tokens, max_tokens={own['max_tokens']} and "
                                               "nothing ends it before")
        if unknown := [token_id for token_id in ids if not 0 <= token_id < vocab_size]:
            raise WrongAnswerError(f"answer {number}: token {unknown[0]} is outside the vocabulary of {vocab_size}")


def _baseline_flips(results: ReferenceResults) -> tuple[int, int]:
    """How often the unsharded model of the same dtype draws another token than the exact one, teacher-forced."""
    flips = sum(int((logits.argmax(-1).cpu() != exact.argmax(-1).cpu()).sum()) for logits, exact in
                zip(results.greedy_baseline_logits, results.greedy_exact_logits, strict=True))
    return flips, results.num_new_tokens * len(results.prompts)


CHECK = Check(
    name="generation", question="Does generation bring what it must: from the sampler, the model, every parameter of a request?",
    parts=(Cases(case=DrawCase, draw=draw_sampler, run=run_sampler, kinds=(DrawCase.kind,), needs="sampler"),
           Whole(judge=check_model, kind="model"), Whole(judge=check_requests, kind="requests", needs="requests")))

"""Are greedy ids those of the exact reference, but for near-ties that rounding may turn round?

After a difference that is excused the comparison goes on, with the reference's id put in. Every rank must draw the same ids,
greedy and sampled, all of them must be in the vocabulary, and sampled ones must be such as the exact reference would draw, in
probability. Twice: with the model's own checkpoint, and with a small one of the same layout whose logits are all negative and
whose vocabulary is padded, so that padding would win if it were let in. Before that the sampler by itself
(``harness.checks.draws``).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from engine.parallel.ranks import RankContext
from harness import jobs
from harness.budgets import improbability, near_tie_margins, too_many_flips
from harness.checks.base import CheckContext, Outcome
from harness.checks.draws import check_draws
from harness.checks.weights import small_twin
from harness.subjects import SUBJECTS
from harness.truth import NUM_NEW_TOKENS, Truth
from reference.checkpoints import random_checkpoint

Draw = Callable[[Sequence[Sequence[int]], Mapping[str, Any]], list[list[list[int]]]]
"""Prompts and sampling parameters -> by rank, the token ids after each prompt."""

TWIN_PROMPT_LENGTHS = (3, 5)
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
NUM_SAMPLED = 16


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


def check_generation(context: CheckContext) -> Outcome:
    draws = check_draws(context)
    if draws.finding is not None or context.case is not None:
        return draws
    outcome = _compare(context, context.truth, lambda prompts, params: context.ranks.run(jobs.generate, prompts, params))
    if outcome.finding is not None:
        return outcome
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        folder = negative_logits_checkpoint(Path(scratch), small_twin(context.truth.config, context.ranks.tp_size),
                                            dtype=context.dtype, seed=context.seed)
        twin = Truth(folder, dtype=context.dtype, seed=context.seed, device=context.truth.device,
                     prompt_lengths=TWIN_PROMPT_LENGTHS)
        negative = _compare(context, twin, lambda prompts, params: context.ranks.run(
            load_and_generate, context.subject, folder, context.dtype, prompts, params))
    cases = draws.cases + outcome.cases + negative.cases
    compared = draws.compared + outcome.compared + negative.compared
    if negative.finding is not None:
        return Outcome(cases=cases, compared=compared, rank=negative.rank, module=negative.module,
                       error_over_budget=negative.error_over_budget, finding=f"where all logits are negative: {negative.finding}")
    return Outcome(cases=cases, compared=compared, excused=outcome.excused, extra=outcome.extra)


def negative_logits_checkpoint(folder: Path, config: dict[str, Any], *, dtype: str, seed: int) -> Path:
    """A random model whose logits are about -18, give or take 2: feature 0 is 4 in every hidden state, and the final norm
    turns its sign round before the LM head multiplies it by 4 again.
    """
    random_checkpoint(folder, config, dtype=dtype, seed=seed)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            tensor[0] = 0
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor[:, 0] = 4
    tensors["model.norm.weight"][0] = -2
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def load_and_generate(rank: RankContext, subject: str, folder: Path, dtype: str, prompts: Sequence[Sequence[int]],
                      params: Mapping[str, Any]) -> list[list[int]]:
    """Job: generate with another checkpoint, beside the one that the rank holds."""
    candidate = SUBJECTS[subject]()
    candidate.load(rank, folder, dtype=dtype, options={"num_kv_blocks": 16, "block_size": 16, "max_num_batched_tokens": 64,
                                                       "max_num_seqs": 8})
    return candidate.generate(prompts, params)


def _compare(context: CheckContext, truth: Truth, draw: Draw) -> Outcome:
    """Greedy ids against the exact reference, then sampled ones against each other."""
    ties = _ties(truth)
    prompts = [
        _Prompt(number, list(ids), result.token_ids, result.margins, ties[number])
        for number, (ids, result) in enumerate(zip(truth.prompts, truth.greedy, strict=True))
    ]
    compared = 0
    while unfinished := [prompt for prompt in prompts if prompt.left]:
        inputs = [prompt.token_ids + prompt.expected[: prompt.done] for prompt in unfinished]
        by_rank = draw(inputs, {"temperature": 0.0, "max_tokens": max(prompt.left for prompt in unfinished)})
        if finding := _malformed(by_rank, "greedy", truth):
            return Outcome(cases=len(prompts), compared=compared, **finding)
        for prompt, drawn in zip(unfinished, by_rank[0], strict=True):
            for token_id in drawn[: prompt.left]:
                compared += 1
                step = prompt.done
                prompt.done += 1
                if token_id == prompt.expected[step]:
                    continue
                if prompt.margins[step] > prompt.ties[step]:
                    return Outcome(
                        cases=len(prompts), compared=compared, rank=0, module="lm_head",
                        error_over_budget=prompt.margins[step] / prompt.ties[step] if prompt.ties[step] else math.inf,
                        finding=f"prompt {prompt.number}, step {step}: expected token {prompt.expected[step]}, got {token_id} "
                                f"(reference top-2 margin {prompt.margins[step]:.3g}, ties end at {prompt.ties[step]:.3g})",
                    )
                prompt.flips += 1
                break
    flips, total = sum(prompt.flips for prompt in prompts), sum(prompt.done for prompt in prompts)
    baseline_flips, baseline_total = _baseline_flips(truth)
    excused = flips / total
    extra = {"flips": flips, "tokens": total, "baseline_flips": baseline_flips, "baseline_tokens": baseline_total,
             "tie_margin": max(map(max, ties))}
    if too_many_flips(flips, total, baseline_flips, baseline_total):
        return Outcome(cases=len(prompts), compared=compared, module="lm_head", rank=0, excused=excused, extra=extra,
                       finding=f"{flips} of {total} greedy tokens differ at near-ties, the baseline turns round "
                               f"{baseline_flips} of {baseline_total}: too often for rounding")
    sampled = draw(truth.prompts, {**SAMPLING, "seed": context.seed, "max_tokens": NUM_SAMPLED})
    if finding := _malformed(sampled, "sampled", truth):
        return Outcome(cases=len(prompts), compared=compared, **finding)
    compared += sum(map(len, sampled[0]))
    for number, (prompt_ids, token_ids) in enumerate(zip(truth.prompts, sampled[0], strict=True)):
        rows = slice(len(prompt_ids) - 1, -1)
        (exact,), (baseline,) = (reference.logits([[*prompt_ids, *token_ids]]) for reference in (truth.exact, truth.baseline))
        unlikely = improbability(baseline[rows], exact[rows], token_ids, **SAMPLING)
        if unlikely > 1:
            return Outcome(cases=len(prompts), compared=compared, rank=0, module="lm_head", error_over_budget=unlikely,
                           finding=f"sampled ids of prompt {number}, {token_ids}, are not what the reference would draw at "
                                   f"{SAMPLING}: {unlikely:.3g} of what can be believed")
    return Outcome(cases=len(prompts), compared=compared, excused=excused, extra=extra)


def _ties(truth: Truth) -> list[list[float]]:
    """For each prompt and greedy token the largest top-2 margin that rounding may turn round."""
    by_prompt = zip(truth.greedy_baseline_logits, truth.greedy_exact_logits, truth.greedy_simulated_logits, strict=True)
    return [near_tie_margins(baseline, exact, truth.dtype, list(draws)).tolist() for baseline, exact, draws in by_prompt]


def _malformed(by_rank: list[list[list[int]]], what: str, truth: Truth) -> dict[str, Any]:
    """What is wrong with ids whatever they should be: none at all, none that exist, or others on another rank."""
    for rank, drawn in enumerate(by_rank):
        for number, (own, first) in enumerate(zip(drawn, by_rank[0], strict=True)):
            where: dict[str, Any] = {"rank": rank, "module": "lm_head"}
            if not own:
                return {**where, "finding": f"{what} ids: prompt {number}: rank {rank} drew none"}
            if own != first:
                step = next((i for i, (a, b) in enumerate(zip(own, first, strict=False)) if a != b), min(len(own), len(first)))
                return {**where, "finding": f"{what} ids differ between ranks: prompt {number}, step {step}: rank {rank} drew "
                                            f"{own[step : step + 1]}, rank 0 {first[step : step + 1]}"}
            if unknown := [token_id for token_id in own if not 0 <= token_id < truth.config["vocab_size"]]:
                return {**where, "finding": f"{what} ids: prompt {number}: token {unknown[0]} is outside the vocabulary of "
                                            f"{truth.config['vocab_size']}"}
    return {}


def _baseline_flips(truth: Truth) -> tuple[int, int]:
    """How often the unsharded model of the same dtype draws another token than the exact one, teacher-forced."""
    flips = sum(int((logits.argmax(-1).cpu() != exact.argmax(-1).cpu()).sum()) for logits, exact in
                zip(truth.greedy_baseline_logits, truth.greedy_exact_logits, strict=True))
    return flips, NUM_NEW_TOKENS * len(truth.prompts)

"""Are the logits of the whole model within budget: prefill in chunks, mixed with decode steps, several sequences at once?

Twice: the model's own; and those of a small model of the same layout in which the rows that a norm is given have mean squares
near the config's eps. Hidden states of most models have mean squares so far above it that no logits show a wrong eps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.checkpoint_files import one_line
from harness.checks.base import Check, CheckContext, NotApplicableError, Outcome, Whole
from harness.checks.weights import narrow_config
from harness.subjects.base import SubjectFailure
from harness.verification.budgets import computation, digest, row_errors
from harness.verification.localise import search
from harness.verification.reference_results import ReferenceResults
from harness.verification.routes import follow
from reference.checkpoints import random_checkpoint
from reference.hf import DTYPES
from reference.loaded import to_hub_format
from reference.writing import edited

MODEL, NEAR_EPS = "model", "near eps"
SMALL_SCHEDULE_LENGTHS = (17, 11, 5)
SMALL_OPTIONS = {"num_kv_blocks": 8, "block_size": 16, "max_num_batched_tokens": 64, "max_num_seqs": 8}
SMALL_SCALES = {"embed_tokens": 0.5, "o_proj": 1.0, "down_proj": 2.0}
"""Times the square root of eps; the MLP's are larger since its activations are smaller. What the layers add to the embeddings
then is about as large as these, and no row is far above eps."""
SHARPER = 2.0
"""Times the weights of norms of queries and keys: of an almost flat softmax nobody sees how large its scores are."""


def check_near_eps(context: CheckContext) -> Outcome:
    """The same of the small model."""
    with near_eps_model(context) as small:
        outcome = compare_logits(small)
    if outcome.finding is None:
        return outcome
    config = small.results.config
    what = f"a small model of {config['num_hidden_layers']} layers with mean squares near eps={config['rms_norm_eps']:g}"
    return replace(outcome, finding=f"{what}: {outcome.finding}", extra={**outcome.extra, "smallest_case": what})


@contextmanager
def near_eps_model(context: CheckContext) -> Iterator[CheckContext]:
    """The same for the small model, which takes the model's place as long as this lasts."""
    if not context.results.config.get("rms_norm_eps"):
        raise NotApplicableError(f"the config of model_type={context.results.config['model_type']!r} has no rms_norm_eps")
    config = narrow_config(context.results.config, context.tp_size, uneven=context.subject.has_uneven,
                           head_dim=context.subject.head_dim)
    config["vocab_size"] += 60  # of few logits the median row tells nothing
    config["intermediate_size"] = 8 * context.tp_size  # experts' grouped products want rows of multiples of 16 bytes
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        folder = near_eps_checkpoint(Path(scratch), config, dtype=context.dtype, seed=context.seed)
        to_hub_format(folder)
        results = ReferenceResults(folder, dtype=context.dtype, seed=context.seed, device=context.results.device,
                                   schedule_lengths=SMALL_SCHEDULE_LENGTHS)
        try:
            results.exact_logits  # noqa: B018
        except RuntimeError as error:  # of shapes: narrow widths are not what every architecture's code takes
            raise NotApplicableError(f"transformers can't run a small model of the same layout: {one_line(error)}") from error
        with context.subject.beside(folder, dtype=context.dtype, options=SMALL_OPTIONS):
            yield replace(context, results=results, options=SMALL_OPTIONS)


def near_eps_checkpoint(folder: Path, config: dict[str, Any], *, dtype: str, seed: int) -> Path:
    """A random model in which no row that is normed has a mean square far from eps, unless the dtype can't hold so small ones."""
    random_checkpoint(folder, config, dtype=dtype, seed=seed)
    # Some way above the smallest number that the dtype holds in full, or whose square float32 does.
    least = 16 * max(torch.finfo(DTYPES[dtype]).tiny, torch.finfo(torch.float32).tiny ** 0.5)
    size = max(config["rms_norm_eps"] ** 0.5, least)
    with edited(folder) as tensors:
        has_head_norms = any(name.endswith("q_norm.weight") for name in tensors)
        for name, tensor in tensors.items():
            module = name.split(".")[-2]
            if module == "embed_tokens":
                tensor *= size * SMALL_SCALES[module] / tensor.double().square().mean().sqrt()
            elif module in SMALL_SCALES:
                tensor *= size * SMALL_SCALES[module]
            elif module in ("q_norm", "k_norm"):
                tensor *= SHARPER
            elif has_head_norms and module in ("q_proj", "k_proj"):
                tensor *= size
    return folder


BUILT_UP = "; no single module is over its budget: the error builds up over the layers"


def compare_logits(context: CheckContext) -> Outcome:
    """What is loaded against ``context.results``. Where the ranks fail over it, that is the finding."""
    results = context.results
    try:
        by_rank = [] if results.wrongly_loaded else context.subject.logits(results.schedule)
    except SubjectFailure as failure:
        return _raised(failure, context, len(results.schedule.sequences))
    return compare_computed(context, by_rank)


def compare_computed(context: CheckContext, by_rank: Sequence[list[Tensor]]) -> Outcome:
    """The same of logits that are there, as ``Subject.logits`` gives them."""
    results, schedule = context.results, context.results.schedule
    cases = len(schedule.sequences)
    if wrong := results.wrongly_loaded:
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return Outcome(cases=cases, compared=0, finding=f"the reference itself: {wrong[0]}{more}")
    shapes = [tuple(torch.cat(own).shape) for own in by_rank]
    expected = tuple(torch.cat(results.exact_logits).shape)
    if (rank := next((rank for rank, shape in enumerate(shapes) if shape != expected), None)) is not None:
        outcome = Outcome(cases=cases, compared=0, rank=rank, module="lm_head", tensors={"found": torch.cat(by_rank[rank])},
                          finding=f"the logits are {shapes[rank]} on rank {rank}, they should be {expected}")
        return _located(outcome, context, range(cases), otherwise="")
    digests = list(map(digest, by_rank))
    differing = [rank for rank, own in enumerate(digests) if own != digests[0]]
    if differing:
        outcome = Outcome(cases=cases, compared=0, rank=differing[0], module="lm_head", finding=(
            f"ranks {differing} have other logits than rank 0: the ranks of one run must agree to the bit"))
        return _located(outcome, context, range(cases))
    followed = follow(context.subject, results)
    results = followed.results
    # All sequences together: rounding errors go together within a sequence, so that one alone has a lucky baseline at times.
    tensors = {"found": torch.cat(by_rank[0]), "baseline": torch.cat(results.baseline_logits),
               "exact": torch.cat(results.exact_logits)}
    found, baseline, exact = tensors.values()
    simulated = list(torch.cat(results.simulated_logits, 1))
    comparison = computation(found, baseline, exact, context.dtype, simulated)
    if comparison.ok:
        chosen = {"choices": followed.choices, "near_ties": followed.flips, "choices_not_shown": followed.unseen}
        return Outcome(
            cases=cases, compared=comparison.compared, error_over_budget=comparison.error_over_budget, finding=followed.finding,
            module=followed.unlikely.module if followed.unlikely else None,
            excused=followed.excused if followed.choices else None,
            extra={name: number for name, number in chosen.items() if number})
    row = max(0, comparison.row)
    sequence = next(number for number in range(cases) if row < sum(map(len, schedule.sequences[: number + 1])))
    token = row - sum(map(len, schedule.sequences[:sequence]))
    where = f"sequence {sequence}, token {token}" if comparison.row >= 0 else "the median token"
    over_T = row_errors(found, baseline, exact, context.dtype, simulated) > 1
    if followed.unseen and context.subject.shown_as and not over_T.all():  # near-ties turn round for some tokens alone
        raise NotApplicableError(
            f"logits of {where} are {comparison.error_over_budget:.3g} of the budget, but of the run that was judged "
            f"choices_not_shown={followed.unseen}: it may have chosen otherwise where two were near-equal, and "
            f"{context.subject.shown_as}")
    finding, module = f"logits of {where}: {comparison.error_over_budget:.3g} of the budget", "lm_head"
    if context.subject.shown_as:  # the run whose modules are shown may choose rightly, and has choices of its own
        finding = "; ".join(filter(None, (finding, followed.finding)))
        module = followed.unlikely.module if followed.unlikely else module
        results = follow(context.subject, context.results, shown_run=True).results
    outcome = Outcome(cases=cases, compared=comparison.compared, error_over_budget=comparison.error_over_budget, module=module,
                      tensors={name: tensor[row : row + 1] for name, tensor in tensors.items()}, finding=finding)
    return _located(outcome, replace(context, results=results), sorted(range(cases), key=lambda number: number != sequence))


def _raised(failure: SubjectFailure, context: CheckContext, cases: int) -> Outcome:
    """The model raised: a module before that one may be wrong, of subjects that show how far they came."""
    outcome = Outcome(cases=cases, compared=0, finding=str(failure), rank=min(failure.failures, default=None),
                      module=failure.module)
    if failure.module is None or not context.subject.is_healthy:
        return outcome
    place = search(context.subject, context.results, 0).place
    if place is None:
        return outcome
    return replace(outcome, finding=f"{place}; behind it {failure}", rank=place.rank, module=place.module)


def _located(outcome: Outcome, context: CheckContext, sequences: Iterable[int], otherwise: str = BUILT_UP) -> Outcome:
    """The same finding with the first module over its budget, in the first of these sequences in which one is."""
    searches = []
    for sequence in sequences:
        searches.append(search(context.subject, context.results, sequence))
        if searches[-1].place is not None:
            break
    place = searches[-1].place
    notes = "; ".join(filter(None, (searches[-1].left_out, context.subject.shown_as)))
    left_out = f" ({notes})" if notes else ""
    if place is None:
        # Modules that all are right where they can be shown say nothing of the run that is wrong.
        how = "; no single module is over its budget" if otherwise and context.subject.shown_as else otherwise
        return replace(outcome, finding=f"{outcome.finding}{how}{left_out}")
    extra: dict[str, Any] = {"token": place.token}
    if place.effect is not None:
        extra |= {"effect": place.effect.kind, "effect_text": place.effect.text}
    own = context.subject.own_name(place.module)
    named = f"; in {context.subject.name} that is {own}" if own != place.module else ""
    return replace(outcome, finding=f"{outcome.finding}; {place}{named}{left_out}", rank=place.rank, module=place.module,
                   extra=extra)


CHECK = Check(
    name="logits", question="Are the logits of the whole model within budget, and if not, where does it go wrong first?",
    parts=(Whole(judge=compare_logits, kind=MODEL), Whole(judge=check_near_eps, kind=NEAR_EPS)))

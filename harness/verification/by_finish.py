"""Where a wrong model goes wrong first, of a family that nobody has written a table for.

Modules are walked in the order in which they finish in the reference, whatever they are called: a module before those that take
its output, and before the one that holds it. To blame is the first one whose output is well over budget and whose input is not.

A tensor that is a partial sum on every rank, right once the ranks' are added, is no error by itself: a module around it may add
them. It is to blame if something behind it is wrong before one of the modules that hold it comes out right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from harness.subjects.base import Subject
from harness.verification.classify import Effect, Evidence, classify
from harness.verification.matching import Part, match
from harness.verification.places import Excess, Place, Search
from harness.verification.reference_results import ReferenceResults
from reference.checkpoints import checkpoint_shapes
from reference.hf import Activations
from reference.shards import Ownership

CALL = re.compile(r" \(call \d+ of \d+\)$")
WHOLE_MODEL = "the model itself, behind its last module"
PARTIAL = Effect(kind="lost", text="each rank has a partial sum, and all of them together are right: they were never added up")


def search_by_finish(subject: Subject, results: ReferenceResults, sequence: int) -> Search:
    """Look for the first wrong module of one sequence of the schedule.

    Args:
        subject: Its activations go by the names of the reference's modules.
        results: The reference's side of the model that it has loaded.
        sequence: Its number in the schedule.
    """
    seen = _Seen(results, sequence, subject.activations(results.schedule, sequence), partial(subject.layout, results.config))
    walk = _Walk()
    for name in seen.exact.outputs:
        if seen.exact.outputs[name].is_floating_point() and walk.is_over(name, seen):
            break
    if walk.found is None:
        place = seen.other_rows()
    else:
        name, excess = walk.found
        effect = PARTIAL if name in walk.partial else classify(seen.evidence(name, excess.rank))
        place = Place(module=_label(name, walk.before), rank=excess.rank, token=excess.token,
                      error_over_budget=excess.error_over_budget, effect=effect)
    return Search(place=place, compared=walk.compared, not_comparable={**walk.not_comparable, **seen.exact.left_out})


class _Walk:
    """What is known so far of the modules that have finished.

    Attributes:
        found: Whom to blame, as far as the walk has come: who is well over budget is better than who is by a little.
        before: A module in ``found`` whose input was wrong already, so that what comes before it in there is to blame.
        partial: Modules whose outputs are partial sums that no module has added yet.
    """

    def __init__(self) -> None:
        self.found: tuple[str, Excess] | None = None
        self.before = ""
        self.partial: dict[str, Excess] = {}
        self.compared = 0
        self.not_comparable: dict[str, str] = {}
        self._passed_on = ""

    def is_over(self, name: str, seen: _Seen) -> bool:
        """Take in one module's output. Whether the search is over."""
        output = seen.excess("outputs", name)
        if isinstance(output, str):
            self.not_comparable[name] = output
            return False
        self.compared += 1
        if output is None:
            self.partial = {other: excess for other, excess in self.partial.items() if not _is_within(other, name)}
            return False
        if output.is_clear and seen.is_partial("outputs", name):
            self.partial[name] = output
            return False
        if not output.is_clear:
            self.found = self.found or (name, output)
            return False
        given = seen.excess("inputs", name)
        if isinstance(given, Excess) and given.is_clear:
            if self.found is None or not self.found[1].is_clear:
                self.found = name, output  # unless a module around it has a right input
            self._passed_on = self._passed_on or name
            return False
        inside = [(other, excess) for other, excess in self.partial.items() if _is_within(other, name)]
        self.found = inside[0] if inside else (name, output)
        if not inside and _is_within(self._passed_on, name):
            self.before = self._passed_on
        return True


@dataclass(frozen=True, slots=True)
class _Seen:
    """Both sides' activations of one sequence."""

    results: ReferenceResults
    sequence: int
    by_rank: Sequence[Activations]
    layout: Callable[[str, tuple[int, ...]], Ownership]

    @property
    def exact(self) -> Activations:
        return self.results.exact_activations(self.sequence)

    def excess(self, side: str, name: str) -> Excess | str | None:
        """What the ranks show there; None if it is within budget on all of them, and why not if it can't be compared."""
        by_rank = self.by_part(side, name)
        if isinstance(by_rank, str):
            return by_rank
        worst: Excess | None = None
        for rank, (part, evidence) in enumerate(by_rank):
            if not evidence.candidate.numel():  # more ranks than there are parts
                continue
            error = evidence.comparison().error_over_budget
            if error > (worst.error_over_budget if worst else 1):
                worst = Excess(error, rank, part.token(evidence.first_wrong_row()))
        return worst

    def is_partial(self, side: str, name: str) -> bool:
        """Whether every rank's tensor is as large as the whole one, and their sum is right."""
        by_rank = self.by_part(side, name)
        if isinstance(by_rank, str) or len(by_rank) < 2 or any(part.indices is not None for part, _ in by_rank):
            return False
        total = torch.stack([evidence.candidate.double() for _, evidence in by_rank]).sum(0)
        return replace(by_rank[0][1], candidate=total).comparison().ok

    def by_part(self, side: str, name: str) -> list[tuple[Part, Evidence]] | str:
        """By rank which part of the reference's tensor it has, and both, as [T, F]; or why they can't be compared."""
        exact = getattr(self.exact, side).get(name)
        by_rank = [getattr(activations, side).get(name) for activations in self.by_rank]
        rounded = [getattr(activations, side).get(name) for activations in (
            self.results.baseline_activations(self.sequence), *self.results.simulated_activations(self.sequence))]
        if exact is None or not exact.is_floating_point():
            return "the reference has no values there"
        if missing := [rank for rank, x in enumerate(by_rank) if x is None]:
            return f"ranks {missing} show none" if len(missing) < len(by_rank) else "no rank shows any"
        if any(x is None or x.shape != exact.shape for x in rounded):
            return "the reference itself has other rows there once it is rounded"
        parts = match(exact.shape, [x.shape for x in by_rank], self._owned(name))
        if isinstance(parts, str):
            return parts
        return [(part, Evidence(
            candidate=_flat(x), exact=_flat(part.of(exact)), baseline=_flat(part.of(rounded[0])),
            simulated=[_flat(part.of(draw)) for draw in rounded[1:]], dtype=self.results.dtype, tp_size=len(by_rank)))
            for x, part in zip(by_rank, parts, strict=True)]

    def _owned(self, name: str) -> Ownership | None:
        """Who holds what of a module's weight; None if no tensor of the checkpoint is called as it is."""
        weight = f"{CALL.sub('', name)}.weight"
        shape = checkpoint_shapes(self.results.folder).get(weight)
        return None if shape is None else self.layout(weight, shape)

    def other_rows(self) -> Place | None:
        """The first module whose output is of other tokens than the reference's, on all ranks; None if there is none."""
        for name in self.exact.outputs:
            said = [activations.left_out.get(name) for activations in self.by_rank]
            if all(why is not None and "of shape" in why for why in said):
                return Place(module=_label(name, ""), rank=0, token=0, error_over_budget=math.inf, effect=Effect(
                    kind="shape", text=f"{said[0]}; the reference's is {tuple(self.exact.outputs[name].shape)}"))
        return None

    def evidence(self, name: str, rank: int) -> Evidence:
        """One rank's output with all that is known of how it comes about."""
        by_rank = self.by_part("outputs", name)
        assert not isinstance(by_rank, str), "it was found to be over budget"
        part, evidence = by_rank[rank]
        whole, last = self.exact.outputs[name], name.rpartition(".")[2]
        evidence = replace(evidence, parts=self._parts(name, part), rows={name: evidence.exact})
        if whole.ndim != 2:
            return evidence
        shards = [indices for other, _ in by_rank if (indices := other.features) is not None]
        own = torch.arange(whole.shape[1]) if part.features is None else part.features
        columns = whole if part.dim else part.of(whole)
        return replace(evidence, columns={last: columns}, own=(last, own), shards=shards)

    def _parts(self, name: str, part: Part) -> Mapping[str, Tensor]:
        """The addends of an exact output: each rank's product where the input is cut, and the bias."""
        module = self.results.exact.model.get_submodule(CALL.sub("", name))
        whole = self.exact.outputs[name]
        bias = getattr(module, "bias", None)
        addends: dict[str, Tensor] = {}
        if parts := self._summed_up(name):
            return {key: _flat(part.of(value)) for key, value in parts.items()}
        if isinstance(bias, Tensor) and bias.shape == whole.shape[-1:]:
            addends["bias"] = bias.detach().cpu().expand_as(whole)
        given = self.by_part("inputs", name)
        cut = [] if isinstance(given, str) else [indices for one, _ in given if (indices := one.features) is not None]
        if isinstance(module, nn.Linear) and cut:
            x, weight = self.exact.inputs[name], module.weight.detach().cpu()
            products = {f"rank {rank}": x[..., own] @ weight[:, own].T for rank, own in enumerate(cut)}
        else:
            products = {"product": whole - addends["bias"] if addends else whole}
        return {key: _flat(part.of(value)) for key, value in (products | addends).items()}

    def _summed_up(self, name: str) -> dict[str, Tensor]:
        """The outputs of a module's own parts, where it does no more than add them up: each by the innermost that gives it."""
        outputs = self.exact.outputs
        inside = {other.removeprefix(f"{name}."): x for other, x in outputs.items() if name and other.startswith(f"{name}.")}
        direct = {other: x for other, x in inside.items() if "." not in other and x.shape == outputs[name].shape}
        if len(direct) < 2 or not torch.equal(torch.stack(list(direct.values())).sum(0), outputs[name]):
            return {}
        return {next((inner for inner, y in inside.items() if inner.startswith(f"{other}.") and y.shape == x.shape
                      and torch.equal(y, x)), other): x for other, x in direct.items()}


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _is_within(name: str, around: str) -> bool:
    """Whether one module is the other, or in it. The whole model's name is empty."""
    return bool(name) and (not around or name == around or name.startswith(f"{CALL.sub('', around)}."))


def _label(name: str, before: str) -> str:
    label = name or WHOLE_MODEL
    return f"{label} (before {before.removeprefix(f'{name}.')})" if before and before != name else label

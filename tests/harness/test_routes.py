"""Near-equal experts may change places; others may not, and not too often; what follows is compared on the same route."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.checks.base import CheckContext, NotApplicableError, Outcome
from harness.checks.logits import compare_logits
from harness.subjects.base import Schedule
from harness.verification.reference_results import ReferenceResults
from harness.verification.routes import follow
from reference.choices import Routes, choosing
from reference.hf import Activations, Reference
from reference.shrink import shrink
from reference.writing import edited

PAIRS = tuple((expert, expert + 5) for expert in range(2, 7))
"""Experts of the first layer whose scores are near-equal: the others are 0 and 1."""
LENGTHS = (41, 23)
Reroute = Callable[[int, Mapping[str, Tensor]], Routes]
"""(sequence, what a model chooses) -> what it is to choose."""


class Routed:
    """One rank that computes as transformers does, with other choices."""

    shown_as = ""

    def __init__(self, results: ReferenceResults, reroute: Reroute = lambda sequence, choices: {}) -> None:
        self.reference = Reference.load(results.folder, results.dtype)
        self.reroute = reroute
        self.tp_size = 1

    def routes(self, schedule: Schedule, sequence: int) -> Routes:
        return self.reroute(sequence, self.reference.activations(schedule.sequences[sequence]).choices)

    def logits(self, schedule: Schedule) -> list[list[Tensor]]:
        routes = [self.routes(schedule, sequence) for sequence in range(len(schedule.sequences))]
        return [self.reference.logits(schedule.sequences, routes)]

    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        routes = self.routes(schedule, sequence)
        seen = self.reference.activations(schedule.sequences[sequence], routes=routes)
        seen.choices.update(routes)
        return [seen]

    def choices(self, schedule: Schedule, sequence: int) -> Routes:
        return self.activations(schedule, sequence)[0].choices

    def modules(self, config: Any) -> tuple[()]:
        return ()

    def own_name(self, module: str) -> str:
        return module

    def layout(self, config: Any, name: str, shape: tuple[int, ...]) -> None:
        return None


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> ReferenceResults:
    """The second of each pair scores as the first one does but for what float32 hardly tells; they compute something else."""
    folder = shrink({"model_type": "mixtral"}, tmp_path_factory.mktemp("routes") / "mixtral")
    with edited(folder) as tensors:
        (gate,) = (tensor for name, tensor in tensors.items() if name.endswith("layers.0.block_sparse_moe.gate.weight"))
        for first, second in PAIRS:
            gate[second] = gate[first] * (1 + 2**-20)
    return ReferenceResults(folder, dtype="float32", schedule_lengths=LENGTHS)


def gate_of(choices: Mapping[str, Tensor], layer: int) -> str:
    return next(name for name in choices if f".layers.{layer}." in name)


def pair_of(row: list[int]) -> tuple[int, int] | None:
    """(chosen, not chosen) of the first pair of which only one is."""
    return next(((first, second) if first in row else (second, first)
                 for first, second in PAIRS if (first in row) != (second in row)), None)


def swapped_at(tokens: int | None, layer: int = 0, *, near: bool = True) -> Reroute:
    """An expert gives way to its near-equal, or to any other that was not chosen.

    In the first tokens of the first sequence where it can; None: in every token of both.
    """

    def reroute(sequence: int, choices: Mapping[str, Tensor]) -> Routes:
        name = gate_of(choices, layer)
        route = choices[name].clone()
        left = len(route) if tokens is None else 0 if sequence else tokens
        for row in route:
            members = row.tolist()
            pair = pair_of(members) if near else (members[-1], next(expert for expert in (0, 1, 2, 3) if expert not in members))
            if left and pair is not None:
                row[members.index(pair[0])] = pair[1]
                left -= 1
        assert tokens is None or not left
        return {name: route}

    return reroute


def judged(results: ReferenceResults, reroute: Reroute) -> Outcome:
    subject: Any = Routed(results, reroute)
    return compare_logits(CheckContext(results=results, subject=subject, options={}, seed=0))


def test_a_right_model_is_green_whatever_rounding_turns_round(results: ReferenceResults) -> None:
    outcome = judged(results, lambda sequence, choices: {})
    assert outcome.finding is None
    assert outcome.extra["choices"] == 2 * sum(LENGTHS)
    assert outcome.excused is not None
    assert outcome.excused < 0.1


def test_a_near_tie_is_excused_and_what_follows_compared_on_its_route(results: ReferenceResults) -> None:
    subject: Any = Routed(results, swapped_at(1))
    followed = follow(subject, results)
    assert (followed.finding, followed.flips >= 1) == (None, True)
    found = subject.logits(results.schedule)[0]

    followed_error, free_error = ((found[0].double() - on.exact_logits[0]).abs().max() for on in (followed.results, results))
    assert free_error > 1000 * followed_error  # another route is another computation
    outcome = judged(results, swapped_at(1))
    assert outcome.finding is None
    assert outcome.excused == followed.flips / followed.choices


def test_a_choice_that_is_no_near_tie_is_a_finding_at_its_router(results: ReferenceResults) -> None:
    outcome = judged(results, swapped_at(1, layer=1, near=False))
    assert outcome.finding is not None
    assert "chooses otherwise for token 0 of sequence 0" in outcome.finding
    assert outcome.module is not None
    assert outcome.module.startswith("model.layers.1.")
    assert outcome.module.endswith(".gate")


def test_near_ties_that_turn_round_too_often_are_a_finding(results: ReferenceResults) -> None:
    outcome = judged(results, swapped_at(None))
    assert outcome.finding is not None
    assert "more than twice as many as rounding explains" in outcome.finding


class ShownByAnother(Routed):
    """Its modules are shown by another run, which chooses as the reference does; the choices of the judged one are read."""

    shown_as = "modules are those of another run"

    def __init__(self, results: ReferenceResults, reroute: Reroute = lambda sequence, choices: {}) -> None:
        super().__init__(results, reroute)
        self.shown = self.reference

    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        return [self.shown.activations(schedule.sequences[sequence])]

    def choices(self, schedule: Schedule, sequence: int) -> Routes:
        return super().activations(schedule, sequence)[0].choices


class Unread(ShownByAnother):
    """The same with routers that nobody can read."""

    def choices(self, schedule: Schedule, sequence: int) -> Routes:
        return {}


def outcome_of(subject: Any, results: ReferenceResults) -> Outcome:
    return compare_logits(CheckContext(results=results, subject=subject, options={}, seed=0))


def test_a_near_tie_of_the_judged_run_is_excused_though_the_shown_run_chose_otherwise(results: ReferenceResults) -> None:
    subject = ShownByAnother(results, swapped_at(1))
    outcome = outcome_of(subject, results)
    assert outcome.finding is None
    assert outcome.extra["near_ties"] >= 1
    as_shown: Any = subject
    assert follow(as_shown, results, shown_run=True).flips < outcome.extra["near_ties"]


def test_a_choice_of_the_judged_run_alone_that_is_no_near_tie_is_a_finding(results: ReferenceResults) -> None:
    outcome = outcome_of(ShownByAnother(results, swapped_at(1, layer=1, near=False)), results)
    assert "chooses otherwise for token 0 of sequence 0" in (outcome.finding or "")
    assert (outcome.module or "").endswith("layers.1.mlp.gate")


def test_a_wrong_router_of_the_judged_run_alone_is_named_beside_the_logits(results: ReferenceResults) -> None:
    """Its weights of experts are wrong too, so that no choice of the reference's makes the logits right."""
    subject = ShownByAnother(results)
    subject.reference = Reference.load(results.folder, results.dtype)
    with torch.no_grad():
        subject.reference.model.model.layers[1].mlp.gate.weight[3] *= 1.5
    outcome = outcome_of(subject, results)
    assert "of the budget; model.layers.1.mlp.gate: top-k 0 chooses otherwise" in (outcome.finding or "")
    assert "no single module is over its budget" in (outcome.finding or "")
    assert (outcome.module or "").endswith("layers.1.mlp.gate")


def test_modules_of_the_shown_run_are_held_against_the_reference_on_its_own_choices(results: ReferenceResults) -> None:
    """On those of the judged run the experts of layer 0 would be blamed, where these chose otherwise."""
    subject = ShownByAnother(results, swapped_at(1))
    with torch.no_grad():
        subject.reference.model.model.layers[1].mlp.experts.down_proj *= 1.5
    outcome = outcome_of(subject, results)
    assert (outcome.module or "").startswith("model.layers.1.mlp"), outcome.finding


def test_choices_that_are_not_read_make_no_finding_of_a_few_tokens(results: ReferenceResults) -> None:
    with pytest.raises(NotApplicableError, match="choices_not_shown=128: it may have chosen otherwise where two were near-equal, "
                                                 "and modules are those of another run"):
        outcome_of(Unread(results, swapped_at(1)), results)
    assert outcome_of(Unread(results, swapped_at(None, near=False)), results).finding


def test_a_wrong_router_is_named_itself(results: ReferenceResults) -> None:
    subject: Any = Routed(results)
    with torch.no_grad():
        subject.reference.model.model.layers[1].mlp.gate.weight[3] *= 1.5
    outcome = compare_logits(CheckContext(results=results, subject=subject, options={}, seed=0))
    assert outcome.finding is not None
    assert outcome.module is not None
    assert outcome.module.endswith("layers.1.mlp.gate")


@pytest.fixture(scope="module")
def by_maximum(tmp_path_factory: pytest.TempPathFactory) -> ReferenceResults:
    """Routers of phimoe take a maximum, and leave out what is below 0.98 of it: both are near-ties for some experts here."""
    folder = shrink("phimoe", tmp_path_factory.mktemp("routes") / "phimoe")
    with edited(folder) as tensors:
        (gate,) = (tensor for name, tensor in tensors.items() if re.search(r"layers\.0\..*(gate|router)\.weight", name))
        for expert in range(6):
            gate[expert + 6] = gate[expert] * (1 + 2**-20 if expert < 3 else 0.98)
    return ReferenceResults(folder, dtype="float32", schedule_lengths=(19, 11))


def second_best(results: ReferenceResults, what: str, *, near: bool) -> Reroute:
    """The first layer's choice of this kind is another one in one row of the first sequence: the closest, or the clearest."""

    def reroute(sequence: int, choices: Mapping[str, Tensor]) -> Routes:
        if sequence:
            return {}
        name = next(name for name in choices if ".layers.0." in name and name.endswith(what))
        best = results.exact_activations(0).scores[name].flatten(0, -2).topk(2)
        margins = best.values[:, 0] - best.values[:, 1]
        row = margins.argmin() if near else margins.argmax()
        route = choices[name].clone()
        route.view(-1, 1)[row] = best.indices[row, 1]
        return {name: route}

    return reroute


@pytest.mark.parametrize("what", ["maximum 0", pytest.param("threshold 0", marks=pytest.mark.endurance)])
def test_what_is_chosen_by_a_maximum_or_a_threshold_is_judged_alike(by_maximum: ReferenceResults, what: str) -> None:
    near, far = (second_best(by_maximum, what, near=near) for near in (True, False))
    subject: Any = Routed(by_maximum, near)
    followed = follow(subject, by_maximum)
    assert (followed.finding, followed.flips >= 1) == (None, True)
    found = subject.logits(by_maximum.schedule)[0]
    followed_error, free_error = ((found[0].double() - on.exact_logits[0]).abs().max() for on in (followed.results, by_maximum))
    assert free_error > 1000 * followed_error
    assert judged(by_maximum, near).finding is None

    clearly_other = judged(by_maximum, far)
    assert clearly_other.finding is not None
    assert "chooses otherwise" in clearly_other.finding
    assert clearly_other.module == "model.layers.0.mlp.router"


def test_a_maximum_of_which_the_value_alone_is_used_is_no_choice() -> None:
    class Softmax(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.max(-1, keepdim=True).values).exp() * (x > 0)

    with choosing(Softmax()) as seen:
        Softmax()(torch.randn(5, 7))
    assert seen.made == []


def test_forced_choices_are_taken_in_every_copy_of_a_batch_and_end_with_the_call(results: ReferenceResults) -> None:
    reference = results.exact
    ids = results.schedule.sequences[0]
    free = reference.logits([ids])[0]
    own = reference.activations(ids).choices
    routes = swapped_at(1)(0, own)
    forced = reference.logits([ids], [routes])[0]
    assert (forced - free).abs().max() > 1e-3
    for copy in reference.copies_of_logits(ids, 3, routes):
        torch.testing.assert_close(copy, forced, rtol=1e-12, atol=1e-12)
    assert torch.equal(reference.logits([ids])[0], free)
    seen = reference.activations(ids, routes=routes)
    assert torch.equal(seen.choices[gate_of(own, 0)], own[gate_of(own, 0)])  # what it would have chosen

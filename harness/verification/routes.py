"""Routers choose: what a candidate chose otherwise than the exact model, and whether rounding explains it.

Experts whose scores are closer than rounding may change places. Such a near-tie is no error; what follows from it is another
computation. So the candidate's choices are forced upon the reference, and each is judged by the scores that the exact model has
where all earlier choices were the candidate's: the margin that was passed over is at most twice the budget of a score, as of
greedy ids (``budgets.near_tie_margins``), and there are no more such tokens than the baseline's own rounding makes likely; those
whose exact scores are equal apart, which any order of computation may settle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.subjects.base import Subject
from harness.verification.budgets import near_tie_margins, too_many_flips
from harness.verification.reference_results import ReferenceResults

TIE = torch.finfo(torch.float64).tiny
"""The margin between equals: whoever chooses the other one has chosen otherwise, and no rounding was needed for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlikely:
    """A choice that rounding does not explain.

    Attributes:
        margin_over_budget: How much better what was passed over is, as a fraction of what rounding may turn round.
    """

    name: str
    sequence: int
    token: int
    margin_over_budget: float

    @property
    def module(self) -> str:
        """Which makes the choice."""
        return self.name.partition(":")[0]

    def __str__(self) -> str:
        return (f"{self.name} chooses otherwise for token {self.token} of sequence {self.sequence}: what it passed over is "
                f"better by {self.margin_over_budget:.3g} of what rounding may turn round")


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """The reference on the candidate's routes.

    Attributes:
        results: With the candidate's choices forced.
        choices: How many were compared, a token's at a router each.
        unseen: How many the candidate did not show: of those the exact model's own are taken for its.
        flips: How many of them are others than the exact model's.
        too_many: Whether these are more than rounding explains, though each is a near-tie.
        unlikely: The worst choice that is no near-tie; None if there is none.
    """

    results: ReferenceResults
    choices: int = 0
    unseen: int = 0
    flips: int = 0
    too_many: bool = False
    unlikely: Unlikely | None = None

    @property
    def excused(self) -> float:
        """The share of choices that were excused."""
        return self.flips / max(1, self.choices)

    @property
    def finding(self) -> str | None:
        """What is wrong with the choices themselves; None if nothing is."""
        if self.unlikely is not None:
            return str(self.unlikely)
        if self.too_many:
            return f"{self.flips} of {self.choices} choices are others, more than twice as many as rounding explains"
        return None


def follow(subject: Subject, results: ReferenceResults, *, shown_run: bool = False) -> Followed:
    """Force what the subject chose upon the reference, and judge it. A model that chooses nothing is left as it is.

    Args:
        subject: Its choices are those of the run that its logits are of.
        results: The reference on its own choices.
        shown_run: Take those of the run that its activations are of, where that is another one (``Subject.shown_as``).
    """
    sequences = range(len(results.schedule.sequences))
    if not results.exact_activations(0).choices:
        return Followed(results=results)
    shown: list[dict[str, Tensor]] = []
    for sequence in sequences:
        own = results.exact_activations(sequence).choices
        found = (subject.activations(results.schedule, sequence)[0].choices if shown_run
                 else subject.choices(results.schedule, sequence))
        shown.append({name: _filled(route, own[name]) for name, route in found.items()
                      if name in own and route.shape == own[name].shape})
    routes = [results.exact_activations(sequence).choices | shown[sequence] for sequence in sequences]
    followed = results.following(routes)
    flips, uneven, own_flips, choices, unseen = 0, 0, 0, 0, 0
    unlikely: Unlikely | None = None
    for sequence in sequences:
        exact = followed.exact_activations(sequence)
        for name, route in routes[sequence].items():
            margin_R = _passed_over(exact.scores[name], exact.choices[name], route)
            is_other = margin_R > 0
            if name not in shown[sequence]:
                unseen += len(is_other)
                continue
            choices += len(is_other)
            flips += int(is_other.sum())
            uneven += int((margin_R > TIE).sum())
            if not is_other.any():
                continue
            over_R = torch.where(is_other, margin_R / _allowed(followed, sequence, name), 0.0)
            row = int(over_R.argmax())
            if over_R[row] > max(1.0, unlikely.margin_over_budget if unlikely else 0.0):
                rows = len(over_R) // len(route)  # of a token
                unlikely = Unlikely(name=name, sequence=sequence, token=row // rows, margin_over_budget=over_R[row].item())
    if uneven:
        own_flips = sum(_flips_of_baseline(followed, sequence) for sequence in sequences)
    return Followed(results=followed, choices=choices, unseen=unseen, flips=flips, unlikely=unlikely,
                    too_many=too_many_flips(uneven, choices, own_flips, choices))


def _flips_of_baseline(followed: ReferenceResults, sequence: int) -> int:
    """How many choices the baseline makes otherwise than the exact model, both on the candidate's routes before each."""
    exact, baseline = followed.exact_activations(sequence), followed.baseline_activations(sequence)
    return sum(int((_passed_over(exact.scores[name], own, baseline.choices[name]) > TIE).sum())
               for name, own in exact.choices.items())


def _allowed(followed: ReferenceResults, sequence: int, name: str) -> Tensor:
    """[R]: the margin between two scores of a row that rounding may turn round."""
    whole = followed.exact_activations(sequence), followed.baseline_activations(sequence)
    scores = [seen.scores[name].double().flatten(0, -2) for seen in (*whole, *followed.simulated_activations(sequence))]
    # What a model has ruled out, such as experts of groups that it did not choose, is no score.
    ruled_out = ~torch.stack(scores).isfinite().all(0)
    exact, baseline, *simulated = (score.masked_fill(ruled_out, 0.0) for score in scores)
    return near_tie_margins(baseline, exact, followed.dtype, simulated)


def _filled(route: Tensor, own: Tensor) -> Tensor:
    """A route [..., k] that has fewer choices in some rows, -1 behind them, filled up with what the exact model chose there."""
    if (route >= 0).all():
        return route
    filled = route.clone()
    for row, other in zip(filled.flatten(0, -2), own.flatten(0, -2).tolist(), strict=True):
        chosen = row[row >= 0].tolist()
        row.copy_(torch.tensor([*chosen, *(index for index in other if index not in chosen)][: len(row)]))
    return filled


def _passed_over(scores: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """[R]: how much better the best that another choice passed over is than the worst it took instead; 0 where both are alike.

    Rows R are tokens, or groups of experts within tokens. What is ruled out by a score of minus infinity is no choice, and taken
    instead of another it is infinitely worse. Of equals neither is better, but it is another choice all the same.
    """
    scores, own, other = scores.double().flatten(0, -2), own.flatten(0, -2), other.flatten(0, -2)
    is_own, is_other = (torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, x.long(), True) for x in (own, other))
    is_own &= scores > -torch.inf
    best = scores.masked_fill(~is_own | is_other, -torch.inf).amax(-1)
    worst = scores.masked_fill(~is_other | is_own, torch.inf).amin(-1)
    differs = (is_own & ~is_other).any(-1)
    return torch.where(differs, (best - worst).clamp(min=TIE), 0.0)

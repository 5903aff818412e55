"""What went wrong, as far as arithmetic tells: from a module's wrong output and from what it should have been.

Each hypothesis predicts the output under one kind of bug, fitted to the rows that are over budget. It stands if the candidate
is within budget of that prediction: the same budget that the candidate broke against the right output, larger where the
prediction is: what comes out doubled has its rounding errors doubled, those of its input among them.

Shape suffixes: T = tokens, F = features of this rank, W = wrong rows, K = parts, P = columns or rows to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from harness.verification.budgets import Comparison, computation, row_errors

Kind = Literal["multiplied", "bias", "lost", "repeated", "permuted", "stale", "zeros", "nan", "shape"]

FEWEST_ROWS = 3
"""Columns are told apart by their values on wrong rows: on fewer than this, different ones look alike."""
MOST_COLUMNS = 1024
"""Of a wider tensor evenly spaced columns are looked at: each is held against all that might stand in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a module's output is, in place of what it should be.

    kind   ``multiplied`` by a factor; a ``bias`` counted some other number of times than once; ``lost``: some rank's part is
           missing; ``repeated``: another rank's shard stands where this one's belongs; ``permuted`` columns; ``stale``: rows
           that belong to another token, or to an earlier tensor; ``zeros``; ``nan``: never written; ``shape``
    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A wrong output and what is known of how it comes about. All ``[T, F]`` unless said otherwise.

    parts     addends whose sum is ``exact``, by name: ``rank 0``, ``rank 1``, …, ``bias``; or ``product``
    foreign   what a rank would add if it used another rank's shard, by ``(rank, the other rank)``
    columns   columns ``[T, P]`` that might stand in the wrong place, by the name of the module they belong to; zeros might too
    own       for each of the F columns, the module and the index in ``columns`` that belongs there
    shards    by rank: the indices that it owns of its own module's ``columns``; () if not cut
    rows      rows ``[P, F]`` that might stand in the wrong place, by a name
    simulated ``exact`` but for simulated rounding, a draw each: see ``budgets.measure``
    """

    candidate: Tensor
    baseline: Tensor
    exact: Tensor
    dtype: str
    tp_size: int
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    foreign: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    own: tuple[str, Tensor] | None = None
    shards: Sequence[Tensor] = ()
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    simulated: Sequence[Tensor] = ()

    def wrong_rows(self) -> Tensor:
        """``[W]``: the rows over budget; all of them if no single one is, but their median."""
        over_W = (self.row_errors() > 1).nonzero().squeeze(1)
        if len(over_W) or self.comparison().ok:
            return over_W
        return torch.arange(len(self.exact))

    def comparison(self) -> Comparison:
        """The candidate against its budget."""
        return computation(self.candidate, self.baseline, self.exact, self.dtype, self.simulated)

    def row_errors(self) -> Tensor:
        """``[T]``: how far each row is off, as a fraction of its budget."""
        return row_errors(self.candidate, self.baseline, self.exact, self.dtype, self.simulated)

    def first_wrong_row(self) -> int:
        """The first row over budget, or the worst if none is by itself, but their median."""
        ratio_T = self.row_errors()
        return int((ratio_T >= ratio_T.max().clamp(max=1)).nonzero()[0])

    def explains(self, prediction_WF: Tensor, wrong_W: Tensor) -> bool:
        """Whether the candidate is within budget of the prediction, on the wrong rows, and of what is right elsewhere."""
        exact = self.exact.double()
        prediction = exact.index_copy(0, wrong_W, prediction_WF.double())
        growth_T1, norm = torch.ones(len(exact), 1, dtype=torch.float64), exact[wrong_W].norm()
        if norm:
            growth_T1[wrong_W] = (prediction[wrong_W].norm() / norm).clamp(min=1)

        def in_place_of_exact(values: Tensor) -> Tensor:
            return prediction + (values.double() - exact) * growth_T1

        return replace(self, baseline=in_place_of_exact(self.baseline), exact=prediction,
                       simulated=list(map(in_place_of_exact, self.simulated))).comparison().ok


def classify(evidence: Evidence) -> Effect | None:
    """The first effect that explains the candidate; None if nothing is wrong or no hypothesis holds."""
    if evidence.candidate.shape != evidence.exact.shape:
        return Effect(kind="shape", text=f"it is {tuple(evidence.candidate.shape)}, it should be {tuple(evidence.exact.shape)}")
    wrong_W = evidence.wrong_rows()
    if not len(wrong_W):
        return None
    for hypothesis in (_nan, _zeros, _parts, _constant, _columns, _rows):
        effect = hypothesis(evidence, wrong_W)
        if effect is not None:
            return effect
    return None


def _nan(evidence: Evidence, wrong_W: Tensor) -> Effect | None:
    is_nan_TF = evidence.candidate.isnan()
    if not is_nan_TF.any():
        return None
    columns = is_nan_TF.any(0).nonzero().squeeze(1).tolist()
    return Effect(kind="nan", text=f"NaN in columns {spans(columns)}: something was never written")


def _zeros(evidence: Evidence, wrong_W: Tensor) -> Effect | None:
    if evidence.candidate[wrong_W].any() or len(evidence.parts) > 1:  # of several parts one can say which are missing
        return None
    return Effect(kind="zeros", text=f"zeros in {_share(wrong_W, evidence)}")


def _parts(evidence: Evidence, wrong_W: Tensor) -> Effect | None:
    """Fit the candidate as a weighted sum of the parts; the weights are whole numbers, 1/tp_size or 0 if a bug made them."""
    terms: list[tuple[str | tuple[int, int], Tensor]] = [*evidence.parts.items(), *evidence.foreign.items()]
    columns = {name: term[wrong_W].double().flatten() for name, term in terms}
    # A part that is zero on all wrong rows tells nothing: rank 1's of tokens that are rank 0's.
    columns = {name: column for name, column in columns.items() if column.any()}
    if not columns:
        return None
    terms_NK = torch.stack(list(columns.values()), dim=1)
    target_N = evidence.candidate[wrong_W].double().flatten()
    scale_K = terms_NK.norm(dim=0)
    unit_NK = terms_NK / scale_K
    fitted_K = torch.linalg.pinv(unit_NK.T @ unit_NK) @ (unit_NK.T @ target_N) / scale_K
    allowed = torch.tensor([0.0, 1 / evidence.tp_size, 1.0, 2.0, float(evidence.tp_size)], dtype=torch.float64)
    weight_K = allowed[(fitted_K[:, None] - allowed).abs().argmin(1)]
    if not evidence.explains((terms_NK @ weight_K).view(len(wrong_W), -1), wrong_W):
        return None
    weights = dict(zip(columns, weight_K.tolist(), strict=True))
    return _name_weights(weights, evidence, wrong_W)


def _name_weights(weights: dict[str | tuple[int, int], float], evidence: Evidence, wrong_W: Tensor) -> Effect | None:
    where = f" in {_share(wrong_W, evidence)}"
    own = {name: weight for name, weight in weights.items() if isinstance(name, str)}
    foreign = [name for name, weight in weights.items() if isinstance(name, tuple) and weight]
    if foreign:
        names = "; ".join(f"rank {rank} computes with rank {other}'s shard" for rank, other in foreign)
        return Effect(kind="repeated", text=names + where)
    values = set(own.values())
    if values == {1.0}:
        return None
    if values == {0.0} and len(own) == 1 and len(evidence.parts) == 1:
        return Effect(kind="zeros", text=f"zeros{where}")
    if len(values) == 1 and 0.0 not in values:
        return Effect(kind="multiplied", text=f"exactly {_times(values.pop(), evidence.tp_size)} what it should be{where}")
    products = {weight for name, weight in own.items() if name != "bias"}
    if products == {1.0}:
        return Effect(kind="bias", text=f"its bias counted {_times(own['bias'], evidence.tp_size)}{where}")
    if lost := [name for name, weight in own.items() if not weight]:
        return Effect(kind="lost", text=f"the part of {' and '.join(lost)} is missing{where}")
    if len(products) == 1:
        return Effect(kind="multiplied", text=f"exactly {_times(products.pop(), evidence.tp_size)} what it should be, "
                                              f"but for its bias{where}")
    parts = ", ".join(f"{name} counted {weight:g} times" for name, weight in own.items() if weight != 1)
    return Effect(kind="multiplied", text=parts + where)


def _times(factor: float, tp_size: int) -> str:
    if factor == tp_size:
        return f"{factor:g} = tp_size times"
    if factor * tp_size == 1:
        return f"1/{tp_size} = 1/tp_size times"
    return f"{factor:g} times"


def _constant(evidence: Evidence, wrong_W: Tensor) -> Effect | None:
    """Off by the same vector at every token: no product of inputs does that."""
    if "bias" not in evidence.parts or len(wrong_W) < FEWEST_ROWS:
        return None
    offset_F = (evidence.candidate[wrong_W].double() - evidence.exact[wrong_W].double()).mean(0)
    if not evidence.explains(evidence.exact[wrong_W].double() + offset_F, wrong_W):
        return None
    return Effect(kind="bias", text=f"off by the same vector at every token: another bias in {_share(wrong_W, evidence)}")


def _columns(evidence: Evidence, wrong_W: Tensor) -> Effect | None:
    """Columns that belong elsewhere, in this module or in one that is loaded and computed with it."""
    if evidence.own is None or len(wrong_W) < FEWEST_ROWS:
        return None
    evidence = _spaced(evidence)
    assert evidence.own is not None, "it was there, and is there in fewer columns"
    module, own_F = evidence.own
    pools = {name: whole[wrong_W].T for name, whole in evidence.columns.items()} | {"zeros": torch.zeros(1, len(wrong_W))}
    found_FW, sources = _nearest(evidence.candidate[wrong_W].T, pools)
    if not evidence.explains(found_FW.T, wrong_W):
        return None
    moved = [place for place, source in enumerate(sources) if source != (module, int(own_F[place]))]
    if not moved:
        return None
    runs = [f"{name} {spans([index for _, index in run])}"
            for name, run in groupby((sources[place] for place in moved), key=lambda source: source[0])]
    text = f"columns {spans([int(own_F[place]) for place in moved])} hold {_some(runs)}"
    if all(sources[place] == ("zeros", 0) for place in moved):
        return Effect(kind="zeros", text=text)
    other = _repeated_shard(evidence, [(int(own_F[place]), sources[place]) for place in moved], module)
    if other is not None:
        return Effect(kind="repeated", text=f"rank {other}'s shard again: {text}")
    return Effect(kind="permuted", text=text)


def _spaced(evidence: Evidence) -> Evidence:
    """The same in at most ``MOST_COLUMNS`` columns."""
    step = -(-evidence.exact.shape[1] // MOST_COLUMNS)
    assert evidence.own is not None, "columns are moved from where they belong"
    return replace(evidence, candidate=evidence.candidate[:, ::step], baseline=evidence.baseline[:, ::step],
                   simulated=[draw[:, ::step] for draw in evidence.simulated],
                   exact=evidence.exact[:, ::step], own=(evidence.own[0], evidence.own[1][::step]))


def _repeated_shard(evidence: Evidence, moved: list[tuple[int, tuple[str, int]]], module: str) -> int | None:
    """The rank whose columns stand, in its order, in the place of another rank's. None if it is not as simple as that."""
    shards = [shard.tolist() for shard in evidence.shards]
    place_of = {index: place for shard in shards for place, index in enumerate(shard)}
    # Parts that changed places are in another order; a shard that stands twice has pushed one out.
    if not {source for _, (_, source) in moved}.isdisjoint(index for index, _ in moved):
        return None
    for rank, shard in enumerate(shards):
        in_order = dict(enumerate(shard))
        if all(index in place_of and (module, in_order.get(place_of[index])) == source for index, source in moved):
            return rank
    return None


def _nearest(values_NK: Tensor, pools: Mapping[str, Tensor]) -> tuple[Tensor, list[tuple[str, int]]]:
    """For each row of ``values_NK`` the nearest one among all rows of the pools, and the name and index of where it stands."""
    places = [(name, index) for name, pool in pools.items() for index in range(len(pool))]
    pool_PK = torch.cat([pool.double() for pool in pools.values()])
    # A plain distance: expanded into products it would lose what tells near rows apart.
    nearest_N = torch.cdist(values_NK.double(), pool_PK, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return pool_PK[nearest_N], [places[index] for index in nearest_N.tolist()]


def _rows(evidence: Evidence, wrong_W: Tensor) -> Effect | None:
    """Rows of another token, or of another tensor of that width."""
    if not evidence.rows:
        return None
    found_WF, [(name, index), *_] = _nearest(evidence.candidate[wrong_W], evidence.rows)
    if not evidence.explains(found_WF, wrong_W):
        return None
    return Effect(kind="stale", text=f"the values of other rows in {_share(wrong_W, evidence)}: "
                                     f"token {int(wrong_W[0])} has those of {name}, token {index}")


def _share(wrong_W: Tensor, evidence: Evidence) -> str:
    return f"{len(wrong_W)} of {len(evidence.exact)} tokens"


def spans(numbers: Sequence[int]) -> str:
    """Numbers as runs.

    >>> spans([0, 1, 2, 7, 9, 8])
    '0-2, 7, 9, 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return _some([f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs])


def _some(texts: Sequence[str], most: int = 6) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")

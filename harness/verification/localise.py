"""Where a wrong model goes wrong first: the module whose input is within budget and whose output is well over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.subjects.base import ModuleRow, Subject
from harness.verification.by_finish import search_by_finish
from harness.verification.classify import Evidence, classify
from harness.verification.places import Excess, Place, Search
from harness.verification.reference_results import ReferenceResults
from reference.hf import Activations
from reference.shards import Ownership


def search(subject: Subject, results: ReferenceResults, sequence: int) -> Search:
    """Re-run the schedule on both sides, and walk the activations of one sequence in the order of computation.

    Named is the first one well over budget; if there is none, the first one that is over budget at all. A subject without a
    table of modules (``Subject.modules``) is searched in the order in which modules finish (``by_finish``).
    """
    rows = tuple(subject.modules(results.config))
    if not rows:
        return search_by_finish(subject, results, sequence)
    shown = Shown(by_rank=subject.activations(results.schedule, sequence), layout=partial(subject.layout, results.config),
                  rows=rows)
    found: list[tuple[Point, Excess]] = []
    compared = 0
    for point in points(shown.rows):
        excess = worst_excess(results, point, sequence, shown)
        compared += 1
        if excess is not None:
            found.append((point, excess))
            if excess.is_clear:
                break
    if not found:
        return Search(place=None, compared=compared)
    point, excess = found[-1] if found[-1][1].is_clear else found[0]
    evidence = gather_evidence(results, point, sequence, shown, excess.rank)
    return Search(compared=compared, place=Place(
        module=point.label, rank=excess.rank, token=excess.token, error_over_budget=excess.error_over_budget,
        effect=classify(evidence)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What the subject shows of one sequence.

    Attributes:
        layout: Name and shape of a checkpoint tensor -> which of its elements each rank holds.
        rows: The model's modules, in the order of computation.
    """

    by_rank: Sequence[Activations]
    layout: Callable[[str, tuple[int, ...]], Ownership]
    rows: Sequence[ModuleRow]

    @property
    def tp_size(self) -> int:
        return len(self.by_rank)

    def owned(self, name: str, shape: tuple[int, ...]) -> list[Tensor]:
        """By rank: the indices that it holds along the tensor's sharded dimension."""
        return [torch.from_numpy(np.asarray(indices)) for indices in self.layout(name, shape).indices]


def worst_excess(results: ReferenceResults, point: Point, sequence: int, shown: Shown) -> Excess | None:
    """What all ranks show at one point; None if it is within budget on all of them."""
    worst: Excess | None = None
    for rank in range(shown.tp_size):
        seen = sides(results, point, sequence, shown, rank)
        if seen.candidate.shape != seen.exact.shape:
            return Excess(float("inf"), rank, 0)
        error_over_budget = seen.comparison().error_over_budget
        if error_over_budget > (worst.error_over_budget if worst else 1):
            worst = Excess(error_over_budget, rank, seen.first_wrong_row())
    return worst


@dataclass(frozen=True, slots=True)
class Point:
    """A tensor between modules that both sides can show."""

    row: ModuleRow
    is_input: bool

    @property
    def module(self) -> str:
        return self.row.path

    @property
    def is_sharded(self) -> bool:
        """Whether its features follow the sharded dimension of the module's weight; if not, it is whole on every rank."""
        return self.is_input or self.row.kind == "column"

    @property
    def side(self) -> str:
        return "inputs" if self.is_input else "outputs"

    @property
    def label(self) -> str:
        """The module that makes this tensor: what feeds a row-parallel projection has no module of its own."""
        if not self.is_input:
            return self.module
        parent, _, last = self.module.rpartition(".")
        return f"{parent} ({self.row.fed_by}, before {last})"

    def of(self, activations: Activations) -> Any:
        """This tensor, or None if it was not recorded."""
        return getattr(activations, self.side).get(self.module)

    def indices(self, shown: Shown, rank: int, width: int) -> Tensor:
        """The features that a rank has of it."""
        if not self.is_sharded:
            return torch.arange(width)
        name = f"{self.module}.weight"
        shape = (width, 1) if not self.is_input else (1, width)
        return shown.owned(name, shape)[rank]


def points(rows: Iterable[ModuleRow]) -> Iterator[Point]:
    """Every point of a model in the order of computation."""
    for row in rows:
        if row.kind == "row":
            yield Point(row, is_input=True)
        if row.has_output:
            yield Point(row, is_input=False)


def sides(results: ReferenceResults, point: Point, sequence: int, shown: Shown, rank: int) -> Evidence:
    """A rank's tensor and what the reference has in its place, all ``[T, F]``."""
    candidate, exact = point.of(shown.by_rank[rank]), point.of(results.exact_activations(sequence))
    if candidate is None:
        raise ValueError(f"rank={rank} gave no {point.side} of module={point.module}: the subject must show every module")
    index = point.indices(shown, rank, exact.shape[-1])
    baseline = point.of(results.baseline_activations(sequence))[:, index]
    return Evidence(candidate=candidate, baseline=baseline, exact=exact[:, index],
                    simulated=[point.of(draw)[:, index] for draw in results.simulated_activations(sequence)],
                    dtype=results.dtype, tp_size=shown.tp_size)


def gather_evidence(results: ReferenceResults, point: Point, sequence: int, shown: Shown, rank: int) -> Evidence:
    """The same with all that the reference knows of how this tensor comes about."""
    exact = results.exact_activations(sequence)
    whole = point.of(exact)
    index = point.indices(shown, rank, whole.shape[-1])
    last = point.module.rpartition(".")[2]
    columns = {last: whole}
    if point.row.fused:  # their rows may end up in each other's place
        columns = {row.path.rpartition(".")[2]: exact.outputs[row.path]
                   for row in shown.rows if row.fused == point.row.fused}
    shards = [point.indices(shown, other, whole.shape[-1]) for other in range(shown.tp_size)] if point.is_sharded else []
    if last == "lm_head":  # gathered, each rank's columns in one block
        shards = shown.owned("lm_head.weight", (whole.shape[-1], 1))
    parts, foreign = _parts_of(results, point, sequence, exact, shown)
    return replace(sides(results, point, sequence, shown, rank), parts={name: part[:, index] for name, part in parts.items()},
                   foreign=foreign, columns=columns, own=(last, index), shards=shards,
                   rows=_rows_like(results, point, index, shown))


def _parts_of(results: ReferenceResults, point: Point, sequence: int, exact: Activations,
              shown: Shown) -> tuple[dict[str, Tensor], dict[tuple[int, int], Tensor]]:
    """The addends of a whole exact output; and what they would be if a rank used another one's shard."""
    whole = point.of(exact)
    module = results.exact.model.get_submodule(point.module)
    weight = module.weight.detach().cpu()
    if point.row.fed_by == "token ids":
        ids_T = torch.tensor(results.schedule.sequences[sequence])
        owned = shown.owned(f"{point.module}.weight", tuple(weight.shape))
        return {f"rank {rank}": whole * torch.isin(ids_T, ids)[:, None] for rank, ids in enumerate(owned)}, {}
    bias = None if point.is_input or getattr(module, "bias", None) is None else module.bias.detach().cpu().expand_as(whole)
    with_bias = {} if bias is None else {"bias": bias}
    if point.is_input or point.row.kind != "row":
        return {"product": whole if bias is None else whole - bias, **with_bias}, {}
    x_TI, owned = exact.inputs[point.module], shown.owned(f"{point.module}.weight", tuple(weight.shape))
    products = {(rank, other): x_TI[:, mine] @ weight[:, theirs].T for rank, mine in enumerate(owned)
                for other, theirs in enumerate(owned) if len(mine) == len(theirs)}
    own = {f"rank {rank}": products.pop((rank, rank)) for rank in range(shown.tp_size)}
    return own | with_bias, products


def _rows_like(results: ReferenceResults, point: Point, index: Tensor, shown: Shown) -> dict[str, Tensor]:
    """What a stale row might be: this tensor at any token; if it is whole, also any other whole one of its width."""
    rows: dict[str, Tensor] = {}
    for sequence in range(len(results.schedule.sequences)):
        exact = results.exact_activations(sequence)
        width = point.of(exact).shape[-1]
        for other in [point] if point.is_sharded else points(shown.rows):
            if other.is_sharded == point.is_sharded and point.of(exact) is not None and other.of(exact).shape[-1] == width:
                rows[f"{other.label} in sequence {sequence}"] = other.of(exact)[:, index]
    return rows

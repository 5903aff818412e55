"""Which part of a whole tensor each rank's is: told by shapes, and by who holds which rows or columns of a module's weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.shards import Ownership


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of a tensor.

    Attributes:
        dim: The dimension that is cut; None: nothing is, it is whole.
        indices: Along it, in the rank's order.
    """

    dim: int | None = None
    indices: Tensor | None = None

    def of(self, whole: Tensor) -> Tensor:
        """This part of a tensor of the same kind: of the baseline's, or of one of simulated rounding."""
        return whole if self.dim is None or self.indices is None else whole.index_select(self.dim, self.indices)

    @property
    def features(self) -> Tensor | None:
        """The indices along a dimension behind the first; None if it has all features, of whichever rows."""
        return self.indices if self.dim else None

    def token(self, row: int) -> int:
        """The token of one of its rows."""
        return int(self.indices[row]) if self.dim == 0 and self.indices is not None else row


def match(whole: Sequence[int], by_rank: Sequence[Sequence[int]], owned: Ownership | None = None) -> list[Part] | str:
    """Each rank's part of a tensor [T, ...] of which every rank has whole rows, a cut of them, or some of the rows.

    It is whole; or its features are those whose weights the rank holds; or along one dimension the ranks have consecutive parts,
    which may differ in size; or, behind the first dimension, several ranks in a row have the same one.

    Args:
        whole: The shape of the whole tensor.
        by_rank: The shapes of the ranks' tensors.
        owned: Which elements of the module's weight they hold, where that is known.

    Returns:
        The parts by rank; or why there is no telling.

    >>> [part.indices.tolist() for part in match((5, 16), [(5, 6), (5, 6), (5, 4)])]
    [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15]]
    """
    if all(tuple(shape) == tuple(whole) for shape in by_rank):
        return [Part()] * len(by_rank)
    said = f"the ranks have {', '.join(sorted({str(tuple(shape)) for shape in by_rank}))} of {tuple(whole)}"
    if any(len(shape) != len(whole) for shape in by_rank):
        return said
    cut = sorted({dim for shape in by_rank for dim in range(len(whole)) if shape[dim] != whole[dim]})
    if len(cut) != 1:
        return said
    (dim,) = cut
    size, sizes = whole[dim], [shape[dim] for shape in by_rank]
    if owned is not None and owned.dim is not None and dim == len(whole) - 1 and owned.shape[owned.dim] == size and (
            [len(indices) for indices in owned.indices] == sizes):
        return [Part(dim, torch.as_tensor(indices, dtype=torch.int64)) for indices in owned.indices]
    if sum(sizes) == size:
        return [Part(dim, indices) for indices in torch.arange(size).split(sizes)]
    if dim and len(set(sizes)) == 1 and size % sizes[0] == 0 and sum(sizes) % size == 0:
        chunks, share = torch.arange(size).split(sizes[0]), sum(sizes) // size
        return [Part(dim, chunks[rank // share]) for rank in range(len(sizes))]
    return said

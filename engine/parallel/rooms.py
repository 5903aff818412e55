"""Where a product is written that the ranks are to sum: where they read it, so that it is not copied first.

Few rows are written into this rank's *room* (:mod:`engine.kernels.peer_all_reduce`), of which all ranks read them. A prefill's
product goes in pieces of rows instead: a copy engine of the GPU sends each to the other rank's room while the next one is
multiplied. The sum then reads memory of its own GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.common import cdiv
from engine.kernels.peer_all_reduce import PeerMemory, row_pieces

ProductOfRows = Callable[[slice, Tensor | None], Tensor]
"""(rows, where to write) -> the product of these rows, there; None: in a tensor of its own."""

SENT_BYTES = 3 * 2**25
"""From here on a product is sent in pieces, between two ranks. A piece costs a host 0.2 ms: of less, it would be waited for."""
SENT_PIECES = 4


class PlacedRows(NamedTuple):
    """Rows of a sum over the ranks, and where this rank reads each rank's part once all have met."""

    rows: slice
    parts: tuple[Tensor, ...]
    sent: torch.cuda.Event | None = None
    """When it has come, this rank's part has reached the other."""


class Rooms:
    """The two rooms of every rank, 0 and 1. All ranks place one product in rooms of one number, and the next in the others."""

    def __init__(self, memory: PeerMemory, device: torch.device) -> None:
        self._memory = memory
        self._device = device
        self._sends: torch.cuda.Stream | None = None

    def hold(self, shape: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether a product ``[T, E]`` fits."""
        return shape[0] * shape[1] * dtype.itemsize <= self._memory.room_bytes

    def place(self, number: int, shape: tuple[int, int], dtype: torch.dtype,
              product: ProductOfRows) -> tuple[Tensor, tuple[PlacedRows, ...]]:
        """The product, and where its rows are. One that :meth:`hold` refuses is an AssertionError."""
        memory = self._memory
        rooms = tuple(memory.room(rank, number, shape, dtype) for rank in range(memory.size))
        row_bytes = shape[1] * dtype.itemsize
        # The kernels read 16 bytes at a time, from the first row of a piece on.
        if memory.size != 2 or shape[0] * row_bytes < SENT_BYTES or row_bytes % 16:
            return product(slice(None), rooms[memory.rank]), (PlacedRows(slice(None), rooms),)
        x_TE = torch.empty(shape, dtype=dtype, device=self._device)
        return x_TE, tuple(self._send(x_TE, rows, rooms, product) for rows in row_pieces(shape[0], cdiv(shape[0], SENT_PIECES)))

    def _send(self, x_TE: Tensor, rows: slice, rooms: tuple[Tensor, ...], product: ProductOfRows) -> PlacedRows:
        rank = self._memory.rank
        product(rows, x_TE[rows])
        self._sends = self._sends or torch.cuda.Stream(self._device)
        self._sends.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._sends):
            rooms[1 - rank][rows].copy_(x_TE[rows])
        own, received = x_TE[rows], rooms[rank][rows]
        return PlacedRows(rows, (own, received) if rank == 0 else (received, own), self._sends.record_event())

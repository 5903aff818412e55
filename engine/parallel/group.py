"""One rank's place in its tensor-parallel group, and its collectives, behind one interface.

Ranks are one process alone (``SoloGroup``), threads of one process (``ThreadGroup``) or processes of their
own (``ProcessTPGroup``, gloo or NCCL). A layer is handed its group and cannot tell them apart.

All collectives work on plain values: no gradient flows through them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.kernels.peer_all_reduce import (
    PeerMemory,
    fuses_norm,
    peer_add_rms_norm,
    peer_add_rms_norm_into,
    peer_all_reduce,
    peer_argmax,
    way_of,
)
from engine.parallel.collective_log import OWN_FILES, Collective, CollectiveLog, name_ranks
from engine.parallel.peer_memory import share_memory
from engine.parallel.rooms import PlacedRows, ProductOfRows, Rooms
from engine.parallel.turns import Turns

OWN_FILES.add(__file__)


class CollectiveAborted(RuntimeError):  # noqa: N818
    """A collective was given up: another rank failed, or did not arrive before the deadline."""


class CollectiveMismatch(RuntimeError):  # noqa: N818
    """Ranks met in one collective with different operations, shapes or dtypes."""


class TPGroup:
    """One rank's place in its tensor-parallel group. Handed to each layer, never looked up.

    rank, size   this rank, from 0, and the number of ranks
    fabric       ``solo``, ``threads``, ``gloo`` or ``nccl``
    log          this rank's collectives, numbered, for reports on ranks that hang
    """

    def __init__(self, rank: int, size: int, fabric: str) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} must be in 0 to size-1 (size={size})")
        self.rank = rank
        self.size = size
        self.fabric = fabric
        self.log = CollectiveLog()

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs may hold the collectives: ranks that are threads meet on the host, which no graph can record."""
        return self.fabric in ("solo", "nccl")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size}, fabric={self.fabric!r})"

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the ranks; every rank gets the same bits. Use the returned tensor only.

        Any shape (0-dim and zero rows too), floating-point or integer dtype, equal on all ranks. A contiguous
        ``x`` is overwritten on every fabric, so that code which keeps using it fails everywhere alike.
        """
        if x.dtype is torch.bool or x.is_complex():
            raise ValueError(f"all_reduce sums numbers, got dtype={x.dtype}: convert it to integers or floats")
        self.log.enter("all_reduce", x.shape, x.dtype)
        x = self._all_reduce(x.contiguous())
        self.log.finish()
        return x

    def fuses_norm(self, shape: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether :meth:`all_reduce_add_norm` takes such an ``x`` and is faster than one after the other, on every rank."""
        return False

    def partial_sum(self, shape: tuple[int, int], dtype: torch.dtype, product: ProductOfRows) -> PartialSum:
        """What ``product`` gives for all rows, where all ranks can read it if they can. Only where :meth:`fuses_norm` says so."""
        return PartialSum(product(slice(None), None), self)

    def all_reduce_add_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float,
                            placed: Sequence[PlacedRows] = ()) -> tuple[Tensor, Tensor]:
        """``add_rms_norm(all_reduce(x), residual, weight, eps)`` in one launch: the same new residual, bit by bit.

        Only where :meth:`fuses_norm` says so. ``x`` may be overwritten. ``placed``: all its rows, or none (:meth:`partial_sum`).
        """
        self.log.enter("all_reduce", x_TE.shape, x_TE.dtype)
        results = self._all_reduce_add_norm(x_TE, residual_TE, weight_E, eps, placed)
        self.log.finish()
        return results

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The largest of the ranks' elements, on every rank. ``x`` holds integers, equally many on all; it may be overwritten."""
        self.log.enter("all_reduce_max", x.shape, x.dtype)
        x = self._all_reduce_max(x.contiguous())
        self.log.finish()
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's ``x``, concatenated along ``dim`` in rank order. All have one shape and dtype."""
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"dim={dim} is not a dimension of a tensor of shape {tuple(x.shape)}")
        dim %= x.ndim
        self.log.enter(f"all_gather(dim={dim})", x.shape, x.dtype)
        x = self._all_gather(x, dim)
        self.log.finish()
        return x

    def all_reduce_min(self, value: int) -> int:
        """The smallest ``value`` of all ranks, on every rank. On CUDA it waits for the device."""
        self.log.enter("all_reduce_min", (), torch.int64)
        value = self._all_reduce_min(value)
        self.log.finish()
        return value

    def argmax(self, value_R: Tensor, index_R: Tensor) -> Tensor:
        """For each row the index ``[R]`` of the rank whose value is largest, of equals the lowest rank's, on every rank.

        -1 where the largest value is infinite. ``value_R`` is floating-point without NaN, ``index_R`` int64.
        """
        self.log.enter("argmax", value_R.shape, value_R.dtype)
        index_R = self._argmax(value_R, index_R)
        self.log.finish()
        return index_R

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.log.enter("barrier")
        self._barrier()
        self.log.finish()

    def _all_reduce(self, x: Tensor) -> Tensor:
        """``x`` is contiguous and may be overwritten."""
        raise NotImplementedError

    def _all_reduce_add_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float,
                             placed: Sequence[PlacedRows]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _all_reduce_max(self, x: Tensor) -> Tensor:
        """``x`` is contiguous and may be overwritten."""
        return self._all_gather(x[None], 0).amax(0)

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        """``dim`` is in 0 to x.ndim-1."""
        raise NotImplementedError

    def _argmax(self, value_R: Tensor, index_R: Tensor) -> Tensor:
        value_NR, index_NR = self._all_gather(value_R[None], 0), self._all_gather(index_R[None], 0)
        best_1R = value_NR.argmax(dim=0, keepdim=True)  # of equals the first
        index_R = index_NR.gather(0, best_1R).squeeze(0)
        return torch.where(value_NR.gather(0, best_1R).squeeze(0).isfinite(), index_R, -1)

    def _all_reduce_min(self, value: int) -> int:
        raise NotImplementedError

    def _barrier(self) -> None:
        raise NotImplementedError


class PartialSum(NamedTuple):
    """This rank's part of a sum over the ranks, for an RMSNorm to add up while it norms."""

    x_TE: Tensor
    tp: TPGroup
    placed: tuple[PlacedRows, ...] = ()

    def add_norm(self, residual_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The norm of the sum and ``residual``, and that sum."""
        return self.tp.all_reduce_add_norm(self.x_TE, residual_TE, weight_E, eps, self.placed)


class SoloGroup(TPGroup):
    """A group of one rank: collectives change nothing and are logged as everywhere else."""

    def __init__(self) -> None:
        super().__init__(0, 1, "solo")

    def _all_reduce(self, x: Tensor) -> Tensor:
        return x

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        # A copy, as on every other fabric: the caller may write into the result.
        return x.clone()

    def _all_reduce_min(self, value: int) -> int:
        return value

    def _barrier(self) -> None:
        pass


class _Meeting:
    """Where the threads of one group meet: the last to arrive works for all, then everyone goes on."""

    def __init__(self, size: int, timeout_s: float | None) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self.condition = threading.Condition()
        self.round = 0
        self.arrived: dict[int, tuple[Collective, Any]] = {}
        self.answer: Any = None
        self.failure: Exception | None = None
        self.left: dict[int, str] = {}

    def leave(self, rank: int, reason: str) -> None:
        with self.condition:
            self.left[rank] = reason
            self.condition.notify_all()

    def rejoin(self) -> None:
        with self.condition:
            self.left.clear()

    def abort(self, reason: str) -> None:
        with self.condition:
            self._fail(CollectiveAborted(reason))

    def _fail(self, failure: Exception) -> None:
        """Give up for good: ranks that missed a collective cannot be brought back into step."""
        if self.failure is None:
            self.failure = failure
        self.condition.notify_all()

    def meet(self, rank: int, record: Collective, deposit: Any, work: Callable[[list[Any]], Any]) -> Any:
        """Wait for all ranks; ``work`` gets the deposits in rank order once, its answer goes to every rank.

        Raises CollectiveAborted when another rank gave up or did not arrive within ``timeout_s``, and
        CollectiveMismatch when the ranks' records differ.
        """
        with self.condition:
            if self.failure is not None:
                raise self._own_copy(record)
            round_ = self.round
            self.arrived[rank] = (record, deposit)
            if len(self.arrived) == self.size:
                try:
                    self._check_agreement()
                    self.answer = work([self.arrived[r][1] for r in range(self.size)])
                except Exception as failure:
                    self._fail(failure)
                    raise
                self.arrived = {}
                self.round += 1
                self.condition.notify_all()
                return self.answer
            deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
            while self.round == round_ and self.failure is None:
                gone = {r: why for r, why in self.left.items() if r not in self.arrived}
                if gone:
                    reasons = "; ".join(f"rank {r} left: {why}" for r, why in sorted(gone.items()))
                    self._fail(CollectiveAborted(f"{record}: {reasons}"))
                    break
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    missing = [r for r in range(self.size) if r not in self.arrived]
                    reason = f"{name_ranks(missing)} never arrived within timeout_s={self.timeout_s:g}"
                    self._fail(CollectiveAborted(f"{record}: {reason}"))
                    break
                self.condition.wait(left)
            if self.round == round_:
                raise self._own_copy(record)
            # No rank can start the next round's work before this one has arrived there, so the answer stands.
            return self.answer

    def _check_agreement(self) -> None:
        first = self.arrived[0][0]
        for rank in range(1, self.size):
            record = self.arrived[rank][0]
            if not record.agrees_with(first):
                raise CollectiveMismatch(f"ranks met in different collectives: rank 0 in {first}, rank {rank} in {record}")

    def _own_copy(self, record: Collective) -> Exception:
        """The group's failure for this thread: one exception raised in two threads mixes its tracebacks."""
        failure = self.failure
        if isinstance(failure, CollectiveMismatch):
            return CollectiveMismatch(str(failure))
        if isinstance(failure, CollectiveAborted):
            return CollectiveAborted(f"gave up {record}: {failure}")
        return CollectiveAborted(f"gave up {record}: another rank's collective raised {failure!r}")


class ThreadGroup(TPGroup):
    """Ranks as threads of one process, made by ``ThreadGroup.create``.

    Sums are taken in rank order in float32 (float64 for float64, int64 for integers) and rounded once.

    Threads that share one GPU need no synchronisation with the device: no rank changes its current stream, so
    all launch on the same default stream, and meeting on the host orders the launches.
    """

    def __init__(self, rank: int, meeting: _Meeting, turns: Turns | None) -> None:
        super().__init__(rank, meeting.size, "threads")
        self._meeting = meeting
        self._turns = turns

    @classmethod
    def create(cls, size: int, *, timeout_s: float | None = None, turns: Turns | None = None) -> list[ThreadGroup]:
        """One group object a rank.

        Args:
            size: ranks in the group.
            timeout_s: a collective waits that long for the last rank; None: for ever.
            turns: the ranks compute in turns; None: side by side.
        """
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        meeting = _Meeting(size, timeout_s)
        return [cls(rank, meeting, turns) for rank in range(size)]

    def abort(self, reason: str = "the group was aborted") -> None:
        """Make every collective of the group, waiting or to come, raise CollectiveAborted. For good."""
        self._meeting.abort(reason)

    def leave(self, reason: str) -> None:
        """This rank failed: collectives that it has not entered abort at once on the others."""
        self._meeting.leave(self.rank, reason)

    def take_turn(self) -> None:
        """Called when this rank begins to compute."""
        if self._turns is not None:
            self._turns.take(self.rank)

    def give_turn(self) -> None:
        """Called when it waits for others, or is done."""
        if self._turns is not None:
            self._turns.give(self.rank)

    def rejoin(self) -> None:
        """All ranks that left are back. Only for when every rank has entered the same collectives."""
        self._meeting.rejoin()

    def _meet(self, deposit: Any, work: Callable[[list[Any]], Any]) -> Any:
        record = self.log.last
        assert record is not None, "a collective is logged before the ranks meet"
        self.give_turn()
        try:
            return self._meeting.meet(self.rank, record, deposit, work)
        finally:
            self.take_turn()

    def _all_reduce(self, x: Tensor) -> Tensor:
        self._meet(x, _sum_in_place)
        return x

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] *= self.size
        gathered = x.new_empty(shape)
        self._meet((x, gathered), lambda pairs: _gather_into(pairs, dim))
        return gathered

    def _all_reduce_min(self, value: int) -> int:
        return int(self._meet(value, min))

    def _barrier(self) -> None:
        self._meet(None, lambda _: None)


# Both run in whichever rank arrives last. Inference mode lets them write into tensors of ranks that are in
# inference mode and of ranks that are not; neither makes a tensor that outlives the call.


@torch.inference_mode()
def _sum_in_place(deposits: Sequence[Tensor]) -> None:
    first = deposits[0]
    if first.is_floating_point():
        wide = torch.float64 if first.dtype is torch.float64 else torch.float32
    else:
        wide = torch.int64
    total = first.to(wide, copy=True)
    for x in deposits[1:]:
        total += x
    for x in deposits:
        x.copy_(total)


@torch.inference_mode()
def _gather_into(pairs: Sequence[tuple[Tensor, Tensor]], dim: int) -> None:
    size = len(pairs)
    for _, gathered in pairs:
        for (x, _), part in zip(pairs, gathered.chunk(size, dim), strict=True):
            part.copy_(x)


class ProcessTPGroup(TPGroup):
    """Ranks as processes: a ``torch.distributed`` process group of backend gloo or nccl.

    gloo sums along a ring and NCCL by its own algorithms, both rounding to the tensor's dtype at each step;
    each part is summed once and then copied, so all ranks get the same bits.

    peers  memory that the ranks' GPUs read of each other, for messages that our own kernels are faster with; None: there is none
    rooms  where of it products are written that are to be summed
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(process_group.rank(), process_group.size(), process_group.name())
        self.process_group = process_group
        self.device = device
        self.peers: PeerMemory | None = None
        self.rooms: Rooms | None = None

    def connect_peers(self) -> None:
        """Share memory between the ranks' GPUs, where all of them can. Every rank must call it."""
        self.peers = share_memory(self.process_group, self.device, agree=self._all_reduce_min)
        self.rooms = None if self.peers is None else Rooms(self.peers, self.device)

    def _all_reduce(self, x: Tensor) -> Tensor:
        if self.peers is not None and (way := way_of(x, self.peers)) is not None:
            return peer_all_reduce(x, self.peers, way)
        dist.all_reduce(x, group=self.process_group)
        return x

    def fuses_norm(self, shape: tuple[int, int], dtype: torch.dtype) -> bool:
        return self.peers is not None and fuses_norm(shape, dtype, self.peers)

    def partial_sum(self, shape: tuple[int, int], dtype: torch.dtype, product: ProductOfRows) -> PartialSum:
        if self.rooms is None or not self.rooms.hold(shape, dtype):
            return super().partial_sum(shape, dtype, product)
        # By how many collectives there were: what ranks agree on, also after a job that failed on all of them.
        x_TE, placed = self.rooms.place(self.log.entered % 2, shape, dtype, product)
        return PartialSum(x_TE, self, placed)

    def _all_reduce_add_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float,
                             placed: Sequence[PlacedRows]) -> tuple[Tensor, Tensor]:
        assert self.peers is not None, "fuses_norm says whether there is shared memory"
        x_TE, residual_TE = x_TE.contiguous(), residual_TE.contiguous()
        if not placed:
            return peer_add_rms_norm(x_TE, residual_TE, weight_E, eps, self.peers, settled=True)
        out_TE, sum_TE = torch.empty_like(x_TE), torch.empty_like(x_TE)
        for rows, parts, sent in placed:
            if sent is not None:
                sent.wait(torch.cuda.current_stream(self.device))
            # Not launched early: what it waits for is no kernel of this stream.
            peer_add_rms_norm_into(out_TE[rows], sum_TE[rows], x_TE[rows], residual_TE[rows], weight_E, eps, self.peers,
                                   settled=True, parts=parts, overlap=None if sent is None else False)
        return out_TE, sum_TE

    def _all_reduce_max(self, x: Tensor) -> Tensor:
        if self.peers is not None and (way := way_of(x, self.peers)) is not None:
            return peer_all_reduce(x, self.peers, way, largest=True)
        return super()._all_reduce_max(x)

    def _argmax(self, value_R: Tensor, index_R: Tensor) -> Tensor:
        if self.peers is not None and value_R.dtype is torch.float32:
            return peer_argmax(value_R, index_R, self.peers)
        return super()._argmax(value_R, index_R)

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        # The ranks' parts arrive one after the other: gather along a new first dimension, then join at dim.
        gathered = x.new_empty((self.size, *x.shape))
        _all_gather_single(gathered.view(-1), x.contiguous().view(-1), self.process_group)
        return torch.cat(gathered.unbind(0), dim)

    def _all_reduce_min(self, value: int) -> int:
        smallest = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.process_group)
        return int(smallest.item())

    def _barrier(self) -> None:
        if self.device.type == "cuda":
            dist.barrier(group=self.process_group, device_ids=[self.device.index])
        else:
            dist.barrier(group=self.process_group)


# torch 2.13 renames it and warns about the old name; 2.11 knows the old one only.
_all_gather_single: Callable[[Tensor, Tensor, dist.ProcessGroup], Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)

"""All-reduce over memory that the ranks' GPUs read of each other: one launch, no library, the same bits on every rank.

Every rank has a memory that all others can read and write (:class:`PeerMemory`). A call copies its input there, *meets* the
others, and adds up what all of them have, in rank order in float32, rounded once: so every rank gets the same bits.

one-shot   every rank reads the whole input of every other: one meeting, ``(n - 1) * bytes`` to read
two-shot   every rank adds up one share, and reads the others' sums: two meetings, ``2 * (n - 1) / n * bytes`` to read

A meeting is between the programs of one number on all ranks: each writes the call's number into a flag on every other rank,
behind all it wrote before (release), and waits until all flags that the others write here have reached that number (acquire;
both at system scope, PTX ISA, "Memory Consistency Model"). Programs of another number are not waited for: what they exchange
is theirs alone.

No meeting ends a call. Calls take the two halves of the memory in turn instead: who writes into a half again has met the
others in the call between, so they have left the call before it. The call's number is counted on the device: one that the host
counts would be the same in every replay of a graph.

A product that is to be summed may be where the ranks read it already, so that nothing is copied: in a *room*, a buffer
behind the halves. There are two in turn, for the same reason. That calls of both kinds come in any order harms nothing:
between two uses of one room this rank has left another call, in which it met the others. Replays of one graph, or of two in a
row, may begin with the room that the last one ended with, so a step that uses rooms must have a call of another kind too: every
step begins with the sum of the embedding.

No meeting is missed. A flag has one writer, whose numbers grow: who looks late finds its number or a larger one. So each
program arrives once its peers' programs have. Those run at once on every GPU (``MAX_PROGRAMS``), and a kernel that is launched
early takes the place of none: it starts when all programs of the one ahead have. A flag that could *fall* would break this:
with a number baked into a graph, a fast rank writes, in its next replay, that old number over the larger one of an eager call,
for which a slow rank still looks, and which it then waits for for ever. So that fault shows as wrong sums, and now and then as
a hang.

After CustomAllreduce of vLLM and the two-shot of TensorRT-LLM, whose published races (a barrier that orders nothing, a counter
baked into a graph, a buffer reused too early) are what the rules above are for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.kernels.common import cdiv, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs

MAX_RANKS = 32
"""One lane of a warp for each."""
MAX_PROGRAMS = 128
"""Programs that can meet at once: fewer than a GPU has multiprocessors, so that all of them run."""
_STAGES = 2
FLAG_BYTES = 8 * MAX_RANKS * MAX_PROGRAMS * _STAGES
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)
_BYTES_PER_THREAD = 16


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """One rank's view of the memory that the ranks share.

    parts  every rank's memory, uint8 ``[FLAG_BYTES + 2 * half_bytes + 2 * room_bytes]``: flags, two halves in turn, two rooms in
           turn; zeros at first
    calls  int64 ``[MAX_PROGRAMS]``, on the device: how many calls there were, for each program to read; this rank's alone
    """

    rank: int
    size: int
    half_bytes: int
    parts: tuple[torch.Tensor, ...]
    calls: torch.Tensor
    room_bytes: int = 0

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the ranks' memories begin, as this rank sees them."""
        return tuple(part.data_ptr() for part in self.parts)

    def flags(self, rank: int) -> torch.Tensor:
        """int64 ``[stage, program, sender]`` in the memory of ``rank``."""
        return self.parts[rank][:FLAG_BYTES].view(torch.int64).view(_STAGES, MAX_PROGRAMS, MAX_RANKS)

    def data(self, rank: int, call: int, like: torch.Tensor) -> torch.Tensor:
        """What ``rank`` gives to a call, of the type and size of ``like``, flat."""
        start = FLAG_BYTES + call % 2 * self.half_bytes
        return self.parts[rank][start : start + like.numel() * like.element_size()].view(like.dtype)

    def room(self, rank: int, number: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Room 0 or 1 of ``rank``'s memory, as far as ``shape`` goes."""
        start = FLAG_BYTES + 2 * self.half_bytes + number * self.room_bytes
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        assert num_bytes <= self.room_bytes, f"{num_bytes} bytes are more than a room's {self.room_bytes}"
        return self.parts[rank][start : start + num_bytes].view(dtype).view(shape)


@triton.jit
def _enter(calls):
    """The call's number, from 1."""
    return tl.load(calls + tl.program_id(0), cache_modifier=".cg") + 1


@triton.jit
def _leave(calls, call, MAX: tl.constexpr):
    """Count the call, for as many programs as the next one may have. Each writes what no other of this call reads."""
    programs = tl.arange(0, MAX)
    is_mine = programs % tl.num_programs(0) == tl.program_id(0)
    tl.store(calls + programs, tl.zeros([MAX], tl.int64) + call, mask=is_mine)


@triton.jit
def _meet(bases, call, stage: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, MAX: tl.constexpr, LANES: tl.constexpr,
          INTERPRETED: tl.constexpr):  # fmt: skip
    """What this program wrote before can be read by its peers after, and what they wrote by this one."""
    lanes = tl.arange(0, LANES)
    is_peer = (lanes < SIZE) & (lanes != RANK)
    slot = (stage * MAX + tl.program_id(0)) * LANES
    theirs = tl.zeros([LANES], tl.int64)
    for peer in tl.static_range(SIZE):
        theirs = tl.where(lanes == peer, bases[peer], theirs)
    theirs += (slot + RANK) * 8
    own = bases[RANK] + (slot + lanes) * 8
    numbers = tl.zeros([LANES], tl.int64) + call
    tl.debug_barrier()  # all threads have written
    if INTERPRETED:
        tl.atomic_xchg(theirs.to(tl.pointer_type(tl.int64)), numbers, mask=is_peer, sem="release", scope="sys")
        flags = own.to(tl.pointer_type(tl.int64))
        while tl.max(tl.where(is_peer & (tl.load(flags, mask=is_peer, other=0) < numbers), 1, 0)) > 0:
            pass
    else:
        # The first warp alone, a lane for each rank.
        tl.inline_asm_elementwise(
            """
            {
                .reg .u32 thread;
                .reg .pred first, go;
                mov.u32 thread, %tid.x;
                setp.lt.u32 first, thread, 32;
                setp.ne.and.s32 go, $3, 0, first;
                @go st.release.sys.global.u64 [$1], $2;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,l,r", [theirs, numbers, is_peer.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            """
            {
                .reg .u32 thread;
                .reg .u64 seen;
                .reg .pred first, go, early;
                mov.u32 thread, %tid.x;
                setp.lt.u32 first, thread, 32;
                setp.ne.and.s32 go, $3, 0, first;
                mov.u64 seen, $2;
            again:
                @go ld.acquire.sys.global.u64 seen, [$1];
                setp.lt.s64 early, seen, $2;
                @early bra again;
                mov.u32 $0, 0;
            }
            """,
            "=r,l,l,r", [own, numbers, is_peer.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()  # no thread reads before


@triton.jit
def _data(base, call, half_bytes, FLAGS: tl.constexpr, like):
    """Where the call's data begins in a rank's memory."""
    start = (base + FLAGS + call % 2 * half_bytes).to(tl.pointer_type(like.dtype.element_ty))
    return tl.multiple_of(start, 16)


@triton.jit
def _sum_of_ranks(bases, call, half_bytes, at, keep, like, SIZE: tl.constexpr, FLAGS: tl.constexpr,
                  LARGEST: tl.constexpr = False):  # fmt: skip
    """In rank order, beginning with rank 0's own bits: -0.0 stays -0.0. Integers are added as such.

    With LARGEST, it is the largest instead.
    """
    WIDE: tl.constexpr = tl.int32 if like.dtype.element_ty == tl.int32 else tl.float32
    total = tl.load(_data(bases[0], call, half_bytes, FLAGS, like) + at, mask=keep, other=0).to(WIDE)
    for peer in tl.static_range(1, SIZE):
        other = tl.load(_data(bases[peer], call, half_bytes, FLAGS, like) + at, mask=keep, other=0).to(WIDE)
        total = tl.maximum(total, other) if LARGEST else total + other
    return total


@triton.jit
def _one_shot_kernel(
    x, bases, calls, numel, half_bytes,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, FLAGS: tl.constexpr, MAX: tl.constexpr, LANES: tl.constexpr,
    LARGEST: tl.constexpr, OVERLAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program after program takes BLOCK elements, and as many again further on."""
    first, step = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    wait_for_inputs(OVERLAP)
    call = _enter(calls)
    own = _data(bases[RANK], call, half_bytes, FLAGS, x)
    for start in range(first, numel, step):
        at = start + tl.arange(0, BLOCK)
        tl.store(own + at, tl.load(x + at, mask=at < numel), mask=at < numel)
    _meet(bases, call, 0, RANK, SIZE, MAX, LANES, INTERPRETED)
    for start in range(first, numel, step):
        at = start + tl.arange(0, BLOCK)
        total = _sum_of_ranks(bases, call, half_bytes, at, at < numel, x, SIZE, FLAGS, LARGEST)
        tl.store(x + at, total.to(x.dtype.element_ty), mask=at < numel)
    _leave(calls, call, MAX)


@triton.jit
def _two_shot_kernel(
    x, bases, calls, numel, half_bytes,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, FLAGS: tl.constexpr, MAX: tl.constexpr, LANES: tl.constexpr,
    LARGEST: tl.constexpr, OVERLAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of SIZE blocks of BLOCK elements, one for each rank to add up, program after program takes the next."""
    first, step = tl.program_id(0) * (SIZE * BLOCK), tl.num_programs(0) * (SIZE * BLOCK)
    wait_for_inputs(OVERLAP)
    call = _enter(calls)
    own = _data(bases[RANK], call, half_bytes, FLAGS, x)
    for start in range(first, numel, step):
        for peer in tl.static_range(SIZE):
            at = start + peer * BLOCK + tl.arange(0, BLOCK)
            tl.store(own + at, tl.load(x + at, mask=at < numel), mask=at < numel)
    _meet(bases, call, 0, RANK, SIZE, MAX, LANES, INTERPRETED)
    for start in range(first, numel, step):
        at = start + RANK * BLOCK + tl.arange(0, BLOCK)
        total = _sum_of_ranks(bases, call, half_bytes, at, at < numel, x, SIZE, FLAGS, LARGEST).to(x.dtype.element_ty)
        # Over this rank's part of the block, which nobody else reads before the next meeting.
        tl.store(own + at, total, mask=at < numel)
        tl.store(x + at, total, mask=at < numel)
    _meet(bases, call, 1, RANK, SIZE, MAX, LANES, INTERPRETED)
    for start in range(first, numel, step):
        for distance in tl.static_range(1, SIZE):
            # Not all from the same rank at once.
            at = start + (RANK + distance) % SIZE * BLOCK + tl.arange(0, BLOCK)
            total = tl.load(_data(bases[(RANK + distance) % SIZE], call, half_bytes, FLAGS, x) + at, mask=at < numel)
            tl.store(x + at, total, mask=at < numel)
    _leave(calls, call, MAX)


# Steps have any number of rows: a variant for those that 16 divides would stall the first step that has another one.
@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x, residual, weight, out, new_residual, bases, parts, calls, num_rows, half_bytes, eps,
    COPIES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, SETTLED: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, FLAGS: tl.constexpr, MAX: tl.constexpr, LANES: tl.constexpr,
    OVERLAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One-shot: program after program takes ROWS rows; what follows is what ``rms_norm.py`` does with the rounded sum.

    Without COPIES, ``parts`` are where the ranks' x are, and FLAGS and half_bytes are 0.
    """
    first, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    dims = tl.arange(0, D_PAD)[None, :]
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    weights = tl.load(weight + dims, mask=dims < D, other=0.0).to(tl.float32)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    call = _enter(calls)
    if COPIES:
        own = _data(bases[RANK], call, half_bytes, FLAGS, x)
        for start in range(first, num_rows, step):
            rows = (start + tl.arange(0, ROWS))[:, None]
            keep = (rows < num_rows) & (dims < D)
            tl.store(own + rows * D + dims, tl.load(x + rows * D + dims, mask=keep), mask=keep)
    rows = (first + tl.arange(0, ROWS))[:, None]
    # A tile's residual comes in while the ranks meet, or while the tile before is summed.
    added = tl.load(residual + rows * D + dims, mask=(rows < num_rows) & (dims < D), other=0.0)
    _meet(bases, call, 0, RANK, SIZE, MAX, LANES, INTERPRETED)
    for start in range(first, num_rows, step):
        rows = (start + tl.arange(0, ROWS))[:, None]
        keep = (rows < num_rows) & (dims < D)
        at = rows * D + dims
        total = _sum_of_ranks(parts, call, half_bytes, at, keep, x, SIZE, FLAGS).to(x.dtype.element_ty)
        rounded = (total.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        added = tl.load(residual + at + step * D, mask=(rows + step < num_rows) & (dims < D), other=0.0)
        tl.store(new_residual + at, rounded, mask=keep)
        values = rounded.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(values * values, axis=1) / D + eps)
        tl.store(out + at, (values * inverse_rms[:, None] * weights).to(out.dtype.element_ty), mask=keep)
    _leave(calls, call, MAX)


@triton.jit(do_not_specialize=["num_rows"])
def _argmax_kernel(
    values, indices, bases, calls, out, num_rows, half_bytes,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, FLAGS: tl.constexpr, MAX: tl.constexpr, LANES: tl.constexpr,
    OVERLAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK rows a program. A rank gives its indices, then its values."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < num_rows
    wait_for_inputs(OVERLAP)
    call = _enter(calls)
    own = _data(bases[RANK], call, half_bytes, FLAGS, indices)
    tl.store(own + at, tl.load(indices + at, mask=keep), mask=keep)
    own_values = (own + num_rows).to(tl.pointer_type(tl.float32))
    tl.store(own_values + at, tl.load(values + at, mask=keep), mask=keep)
    _meet(bases, call, 0, RANK, SIZE, MAX, LANES, INTERPRETED)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.full([BLOCK], -1, tl.int64)
    for peer in tl.static_range(SIZE):
        their_indices = _data(bases[peer], call, half_bytes, FLAGS, indices)
        their_values = (their_indices + num_rows).to(tl.pointer_type(tl.float32))
        value = tl.load(their_values + at, mask=keep, other=float("-inf"))
        is_better = value > best
        index = tl.where(is_better, tl.load(their_indices + at, mask=keep, other=-1), index)
        best = tl.where(is_better, value, best)
    tl.store(out + at, tl.where(best < float("inf"), index, -1), mask=keep)
    _leave(calls, call, MAX)


def _constants(memory: PeerMemory, overlap: bool) -> dict[str, object]:
    return {"RANK": memory.rank, "SIZE": memory.size, "FLAGS": FLAG_BYTES, "MAX": MAX_PROGRAMS, "LANES": MAX_RANKS,
            "OVERLAP": overlap, "INTERPRETED": os.environ.get("TRITON_INTERPRET") == "1", **early_launch(overlap)}


@dataclass(frozen=True, slots=True)
class Way:
    """How an all-reduce runs: ``num_warps * 32 * per_thread`` times 16 bytes are what a program takes at a time."""

    two_shot: bool
    num_warps: int = 8
    per_thread: int = 1
    num_programs: int = MAX_PROGRAMS


def way_of(x: torch.Tensor, memory: PeerMemory) -> Way | None:
    """The fastest way on H200s over NVLink, by size; None where the library does as well, or has to. The same on every rank."""
    num_bytes, size = x.numel() * x.element_size(), memory.size
    if x.dtype not in DTYPES or not 0 < num_bytes <= _LARGEST_BYTES:
        return None
    two_shot = _wants_two_shots(num_bytes, size)
    if num_bytes <= _SMALL_BYTES and not two_shot:
        return Way(two_shot=False)
    return Way(two_shot=two_shot, num_warps=16, per_thread=2 if num_bytes < _LARGE_BYTES else 4)


def _wants_two_shots(num_bytes: int, size: int) -> bool:
    """Whether a second meeting saves more in bytes to read than it takes."""
    return num_bytes * (size - 1) * (size - 2) / size > _MEETING_BYTES


def fuses_norm(shape: tuple[int, int], dtype: torch.dtype, memory: PeerMemory) -> bool:
    """Whether :func:`peer_add_rms_norm` is faster than a sum and a norm on an ``x`` ``[T, D]``. The same on every rank."""
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    return (dtype in DTYPES and dtype.is_floating_point and 0 < num_bytes <= _LARGEST_FUSED_BYTES
            and not _wants_two_shots(num_bytes, memory.size))


_SMALL_BYTES = 2**16
_LARGE_BYTES = 2**23
_LARGEST_BYTES = 2**26
_LARGEST_FUSED_BYTES = 2**28
_MAX_NORM_TILE = 2**14
"""Elements of a program's tile: 32 a thread."""
_MEETING_BYTES = 1.2e6
"""3 us at 395 GB/s."""


def peer_all_reduce(x: torch.Tensor, memory: PeerMemory, way: Way, *, largest: bool = False,
                    overlap: bool | None = None) -> torch.Tensor:
    """The sum of the ranks' ``x``, in their order in float32, rounded once. ``x`` is overwritten, and returned.

    x        contiguous, bfloat16, float16, float32 or int32 (whose sums wrap), of one shape and dtype on all ranks
    way      the same on all ranks; :func:`way_of` knows a good one
    largest  give the largest of the ranks' elements instead
    overlap  as in :mod:`engine.kernels.overlap`, by default where the device can

    An ``x`` that is larger than half of the memory goes in pieces. Raises ``ValueError`` for other dtypes.
    """
    _check_dtype(x)
    overlap = may_overlap(x, overlap)
    kernel = _two_shot_kernel if way.two_shot else _one_shot_kernel
    block = 32 * way.num_warps * way.per_thread * _BYTES_PER_THREAD // x.element_size()
    for piece in _pieces(x, memory):
        wanted = cdiv(piece.numel(), block * memory.size if way.two_shot else block)
        kernel[(min(wanted, way.num_programs),)](
            piece, memory.addresses, memory.calls, piece.numel(), memory.half_bytes, BLOCK=block, LARGEST=largest,
            num_warps=way.num_warps, **_constants(memory, overlap),
        )  # fmt: skip
    return x


def peer_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, memory: PeerMemory, *, settled: bool = False,
    num_programs: int = MAX_PROGRAMS, overlap: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add_rms_norm(all_reduce(x), residual, weight, eps)`` of ``rms_norm.py`` in one launch; ``x`` is not changed.

    x, residual   ``[T, D]`` contiguous, of one dtype
    settled, overlap   as in ``rms_norm.py``
    num_programs   at most, ``MAX_PROGRAMS`` or fewer

    An ``x`` that is larger than half of the memory goes in pieces of equally many rows.
    """
    _check_dtype(x)
    out, new_residual = torch.empty_like(x), torch.empty_like(x)
    for piece in row_pieces(len(x), memory.half_bytes // (x.shape[1] * x.element_size())):
        peer_add_rms_norm_into(out[piece], new_residual[piece], x[piece], residual[piece], weight, eps, memory, settled=settled,
                               num_programs=num_programs, overlap=overlap)
    return out, new_residual


def peer_add_rms_norm_into(
    out: torch.Tensor, new_residual: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    memory: PeerMemory, *, settled: bool = False, num_programs: int = MAX_PROGRAMS, overlap: bool | None = None,
    parts: Sequence[torch.Tensor] = (),
) -> None:
    """:func:`peer_add_rms_norm` in one launch, into tensors that are there.

    parts  where this rank can read each rank's ``x`` once they have met; empty: ``x`` is copied into a half, and must fit
    """
    num_rows, dim = x.shape
    overlap, dim_padded = may_overlap(x, overlap), next_power_of_2(dim)
    rows = rows_of_tile(num_rows, dim, num_programs)
    addresses = tuple(part.data_ptr() for part in parts) or memory.addresses
    constants = _constants(memory, overlap) | ({"FLAGS": 0} if parts else {})
    _add_rms_norm_kernel[(min(cdiv(num_rows, rows), num_programs),)](
        x, residual, weight, out, new_residual, memory.addresses, addresses, memory.calls, num_rows,
        0 if parts else memory.half_bytes, eps, not parts, dim, dim_padded, rows, settled,
        num_warps=min(16, max(4, rows * dim_padded // 512)), **constants,
    )  # fmt: skip


def rows_of_tile(num_rows: int, dim: int, num_programs: int = MAX_PROGRAMS) -> int:
    """Rows that a program of :func:`peer_add_rms_norm` takes at a time. There is a variant of the kernel for each number."""
    return min(next_power_of_2(cdiv(num_rows, num_programs)), max(1, _MAX_NORM_TILE // next_power_of_2(dim)))


def _check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x.dtype={x.dtype}: must be one of bfloat16, float16, float32, int32")


def _pieces(x: torch.Tensor, memory: PeerMemory) -> Iterator[torch.Tensor]:
    """``x``, flat, in pieces that fit into half of the memory."""
    return (piece for piece in x.view(-1).split(memory.half_bytes // x.element_size()) if piece.numel())


def row_pieces(num_rows: int, most: int) -> list[slice]:
    """Rows in pieces of at most ``most``, all about as large."""
    size = cdiv(num_rows, max(1, cdiv(num_rows, most)))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size or 1)]


def peer_argmax(value_R: torch.Tensor, index_R: torch.Tensor, memory: PeerMemory, *, overlap: bool | None = None) -> torch.Tensor:
    """For each row the index ``[R]`` int64 of the rank whose value is largest, of equals the lowest rank's.

    -1 where the largest value is infinite. ``value_R`` is float32 without NaN, ``index_R`` int64, both contiguous.
    """
    out_R = torch.empty_like(index_R)
    num_rows = len(index_R)
    if num_rows:
        overlap = may_overlap(value_R, overlap)
        block = max(128, next_power_of_2(cdiv(num_rows, MAX_PROGRAMS)))
        _argmax_kernel[(cdiv(num_rows, block),)](
            value_R, index_R, memory.addresses, memory.calls, out_R, num_rows, memory.half_bytes, BLOCK=block,
            **_constants(memory, overlap),
        )  # fmt: skip
    return out_R


_PAUSE_S = 1e-5


def _enter_torch(memory: PeerMemory) -> int:
    memory.calls.add_(1)
    return int(memory.calls[0])


def _meet_torch(memory: PeerMemory, call: int, stage: int) -> None:
    """As one program. The host's processor orders what a thread writes."""
    peers = [peer for peer in range(memory.size) if peer != memory.rank]
    for peer in peers:
        memory.flags(peer)[stage, 0, memory.rank] = call
    while int(memory.flags(memory.rank)[stage, 0, peers].min()) < call:
        time.sleep(_PAUSE_S)


def peer_all_reduce_torch(x: torch.Tensor, memory: PeerMemory, way: Way, *, largest: bool = False) -> torch.Tensor:
    """Plain-torch twin of :func:`peer_all_reduce` on a memory of the host's, one thread a rank: step by step the same."""
    combine = _largest_torch if largest else _sum_torch
    _check_dtype(x)
    for piece in _pieces(x, memory):
        call = _enter_torch(memory)
        own = memory.data(memory.rank, call, piece)
        own.copy_(piece)
        _meet_torch(memory, call, 0)
        parts = [memory.data(peer, call, piece) for peer in range(memory.size)]
        if way.two_shot:
            shares = [part.tensor_split(memory.size) for part in parts]
            mine = [share[memory.rank] for share in shares]
            mine[memory.rank].copy_(combine(mine))
            _meet_torch(memory, call, 1)
            piece.copy_(torch.cat([share[peer] for peer, share in enumerate(shares)]))
        else:
            piece.copy_(combine(parts))
    return x


def _sum_torch(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0] if parts[0].dtype is torch.int32 else parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total


def _largest_torch(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).amax(0)


def peer_argmax_torch(value_R: torch.Tensor, index_R: torch.Tensor, memory: PeerMemory) -> torch.Tensor:
    """Plain-torch twin of :func:`peer_argmax`, likewise."""
    call = _enter_torch(memory)
    give_2R = torch.stack((index_R.double(), value_R.double()))  # exact: an index is below 2^31
    memory.data(memory.rank, call, give_2R).copy_(give_2R.flatten())
    _meet_torch(memory, call, 0)
    index_NR, value_NR = torch.stack([memory.data(peer, call, give_2R).view(2, -1) for peer in range(memory.size)], dim=1)
    best_1R = value_NR.argmax(dim=0, keepdim=True)  # of equals the first
    found_R = torch.where(value_NR.gather(0, best_1R).isfinite(), index_NR.gather(0, best_1R), -1.0)
    return found_R.squeeze(0).long()

"""Jobs of the tests on NCCL ranks: what runs there must be importable there."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels.peer_all_reduce import DTYPES, Way, peer_all_reduce
from engine.kernels.rms_norm import add_rms_norm
from engine.layers.norm import RMSNorm
from engine.parallel import rooms
from engine.parallel.group import ProcessTPGroup
from engine.parallel.linear import RowParallelLinear
from engine.ranks.ranks import RankContext
from engine.scheduling.batch import StepBatch
from tests.engine.kernels.peers import integers
from tests.engine.kernels.problems import over_budget, rounding_budget
from tests.gpu.support import runner_of


def sum_of_ranks(rank: RankContext) -> float:
    """1 + 2 + ... over the ranks, by one all-reduce, on every rank."""
    total = rank.tp.all_reduce(torch.full((1000,), rank.tp.rank + 1.0, device=rank.device))
    assert total.unique().numel() == 1
    return total[0].item()


def die_before_the_all_reduce(rank: RankContext, victim: int) -> float:
    """The victim is killed as the system kills: at once, without a word. The others wait for it on their GPUs."""
    rank.phase = "summing"
    if rank.tp.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum_of_ranks(rank)


def wrong_sums(rank: RankContext) -> list[str]:
    """Every way of an all-reduce on shared memory, by size and dtype; what was not the exact sum of all ranks' integers."""
    assert isinstance(rank.tp, ProcessTPGroup)
    memory = rank.tp.peers
    assert memory is not None, "these GPUs share no memory"
    wrong = []
    ways = [Way(two_shot=False), Way(two_shot=True), Way(two_shot=False, num_warps=16, per_thread=2, num_programs=7)]
    for number, (way, dtype, count) in enumerate(itertools.product(ways, DTYPES, (1, 7, 1000, 4097, 262_144, 1_048_577))):
        total = sum(integers(other, number, count, torch.float64) for other in range(memory.size))
        found = peer_all_reduce(integers(rank.tp.rank, number, count, dtype).to(rank.device), memory, way)
        if not torch.equal(found.cpu().double(), total):
            wrong.append(f"{way} of {count} {dtype}")
    return wrong


def wrong_integers(rank: RankContext) -> list[str]:
    """Sums that wrap and maxima of integers that float32 does not tell apart, every way and a group's own; what was not exact."""
    assert isinstance(rank.tp, ProcessTPGroup)
    memory = rank.tp.peers
    assert memory is not None, "these GPUs share no memory"
    wrong, generator = [], torch.Generator().manual_seed(0)
    ways = [None, Way(two_shot=False), Way(two_shot=True), Way(two_shot=True, num_warps=16, per_thread=4, num_programs=7)]
    for way, count, largest in itertools.product(ways, (1, 7, 1000, 4097, 262_144, 1_048_577), (False, True)):
        parts = torch.randint(-2**31, 2**31, (memory.size, count), generator=generator).int()
        own = parts[rank.tp.rank].to(rank.device)
        if way is None:
            found = rank.tp.all_reduce_max(own) if largest else rank.tp.all_reduce(own)
        else:
            found = peer_all_reduce(own, memory, way, largest=largest)
        right = parts.amax(0) if largest else parts.sum(0, dtype=torch.int32)
        if not torch.equal(found.cpu(), right):
            wrong.append(f"{'maximum' if largest else 'sum'} of {count} by {way}")
    return wrong


@torch.inference_mode()
def wrong_back_to_back(rank: RankContext, dtype: str, largest: bool, num_calls: int) -> tuple[int, int]:
    """(calls, wrong ones) of replays of a graph of 500 reductions of all sizes, with other numbers in each replay.

    Nothing waits for a call but the next one; a rank is late now and then. What each gives is held against what it must be, on
    the device, behind them all.
    """
    draw, per_replay, largest_count = random.Random(0), 500, 65_536
    sizes = [max(1, int(largest_count ** draw.random())) for _ in range(per_replay)]
    late = [draw.randrange(rank.tp.size) if draw.random() < 0.05 else None for _ in sizes]
    index = torch.arange(largest_count, device=rank.device)
    turn, num_wrong = (torch.zeros((), dtype=torch.int64, device=rank.device) for _ in range(2))

    def given(by: int, call: int) -> Tensor:
        """No two calls or turns have the same, and none of another rank's. Every dtype counts so far."""
        return (index[: sizes[call]] * 7 + 5 * by + 3 * call + turn * (2 * by + 1)) % 61

    def one_turn() -> None:
        own = [given(rank.tp.rank, call).to(getattr(torch, dtype)) for call in range(per_replay)]
        found = []
        for call, x in enumerate(own):
            if late[call] == rank.tp.rank:
                torch.cuda._sleep(50_000)
            found.append(rank.tp.all_reduce_max(x) if largest else rank.tp.all_reduce(x))
        for call, each in enumerate(found):
            parts = torch.stack([given(by, call) for by in range(rank.tp.size)])
            num_wrong.add_((each.to(torch.int64) != (parts.amax(0) if largest else parts.sum(0))).any())
        turn.add_(1)

    one_turn()
    torch.cuda.synchronize(rank.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_turn()
    for _ in range(num_calls // per_replay):
        graph.replay()
    return per_replay * int(turn), int(num_wrong)


def norms_of_sums(rank: RankContext, num_rows: int, dim: int) -> tuple[bool, float]:
    """A sum with residual and norm in one launch, against one after the other: the same new residual, how far the norms are."""
    generator = torch.Generator().manual_seed(num_rows)
    parts = torch.randn(rank.tp.size, num_rows, dim, generator=generator).bfloat16()
    residual = torch.randn(num_rows, dim, generator=generator).bfloat16().to(rank.device)
    weight = torch.randn(dim, generator=generator).bfloat16().to(rank.device)
    normed, sum_ = rank.tp.all_reduce_add_norm(parts[rank.tp.rank].to(rank.device), residual, weight, 1e-6)
    right, right_sum = add_rms_norm(parts.float().sum(0).bfloat16().to(rank.device), residual, weight, 1e-6)
    return torch.equal(sum_, right_sum), over_budget(normed, right.double(), rounding_budget(right, right, torch.bfloat16))


def sums_in_rooms(rank: RankContext, num_rows: int, dim: int, sent_bytes: int) -> tuple[list[bool], set[str]]:
    """Layer after layer, each a product, its sum and norm: with products where all ranks read them, and with those copied there.

    Gives whether all bits are equal, kernel by kernel and for each of four replays of a graph with other inputs, whose ranks
    are late in turn; and in which ways the sums were taken.
    """
    assert isinstance(rank.tp, ProcessTPGroup), "every rank has a GPU"
    own_rooms, before = rank.tp.rooms, rooms.SENT_BYTES
    generator = torch.Generator(rank.device).manual_seed(rank.tp.rank)
    x_TI, inner = torch.empty(num_rows, 256, device=rank.device).bfloat16(), 256 * rank.tp.size
    layers, ways = [], set()
    for _ in range(5):
        layer = RowParallelLinear(inner, dim, tp=rank.tp, dtype=torch.bfloat16, device=rank.device, norm_follows=True)
        layer.weight.data.copy_(torch.randn(dim, 256, device=rank.device, generator=generator) / 16)
        layers.append(layer)
    norm = RMSNorm(dim, 1e-6, dtype=torch.bfloat16, device=rank.device)
    norm.weight.data.fill_(1.5)

    def run() -> list[Tensor]:
        outputs, residual = [], torch.zeros(num_rows, dim, device=rank.device).bfloat16()
        rank.tp.all_reduce(torch.zeros(8, device=rank.device))  # as each step begins
        for number, layer in enumerate(layers):
            if number % rank.tp.size == rank.tp.rank:
                torch.cuda._sleep(300_000)
            product = layer(x_TI)
            ways.add("copied" if not product.placed else "written" if product.placed[0].sent is None else "sent")
            normed, residual = norm(product, residual)
            outputs += [normed, residual]
        return outputs

    def outcomes(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
        found = []
        for seed in range(4):
            x_TI.copy_(torch.randn(x_TI.shape, device=rank.device, generator=generator.manual_seed(10 * seed + rank.tp.rank)))
            found.append([each.clone() for each in call()])
        return found

    try:
        with torch.inference_mode():
            rank.tp.rooms = None
            wanted = outcomes(run)
            rank.tp.rooms, rooms.SENT_BYTES = own_rooms, sent_bytes
            found = [outcomes(run)]
            if sent_bytes > num_rows * dim * 2:
                torch.cuda.synchronize(rank.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = run()

                def replay() -> list[Tensor]:
                    graph.replay()
                    return captured

                found.append(outcomes(replay))
    finally:
        rank.tp.rooms, rooms.SENT_BYTES = own_rooms, before
    return [torch.equal(*pair) for each in found for outputs, right in zip(each, wanted, strict=True)
            for pair in zip(outputs, right, strict=True)], ways


def die_in_a_replay(rank: RankContext, victim: int) -> None:
    """All ranks replay a graph full of all-reduces; the victim is killed among its replays."""
    rank.phase = "replaying"
    x = torch.zeros(4096, dtype=torch.bfloat16, device=rank.device)
    rank.tp.all_reduce(x)
    torch.cuda.synchronize(rank.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(200):
            rank.tp.all_reduce(x)
    for number in range(200):
        graph.replay()
        if rank.tp.rank == victim and number == 50:
            torch.cuda.synchronize(rank.device)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.cuda.synchronize(rank.device)


def hang_after_replays(rank: RankContext, victim: int, count: int) -> None:
    """From now on the victim's host stands still ahead of a replay, while the others' GPUs wait for it in theirs."""
    graphs = runner_of(rank).graphs
    assert graphs is not None, "the runner captured no graphs"
    run, left = graphs.run, itertools.count(count, -1)

    def hanging(batch: StepBatch) -> tuple[Tensor, Tensor]:
        if next(left) == 0:
            time.sleep(120)
        return run(batch)

    if rank.tp.rank == victim:
        graphs.run = hanging  # type: ignore[method-assign]

"""All-reduce by message size: as the engine calls it, and by every other way there is, eager and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import DTYPES
from engine.parallel.group import ProcessTPGroup
from engine.ranks.ranks import RankContext
from harness.bench.bounds import all_reduce_bytes
from harness.bench.figures import Measured
from harness.bench.measurement import OnRanks
from harness.bench.timing import Group
from harness.bench.workloads import ENGINE_CASE, CollectivesWork, size_name

OWN_WAY = "shardproof"
Problems = dict[tuple[str, str | None], str]
"""(who, case; None for all) -> why it can't run here"""
_SYMMETRIC = "symmetric"


class CollectivesMeasurement(OnRanks):
    """All-reduces on fresh ranks. The slowest rank's time counts."""

    def prepare(self) -> None:
        task = self.task
        for problems in self.run(build, task.dtype, task.work):
            self.ready.problems |= problems
        rate = task.ceiling(ENGINE_CASE, "gpu_to_gpu_gb_per_s" if task.device == "cuda" else "copy_gb_per_s")
        if rate is not None:
            self.ready.bounds = {
                f"{size_name(size)}, {mode}": {"all_reduce_us": all_reduce_bytes(size, task.tp_size) / (rate * 1e3)}
                for size in task.work.message_bytes for mode in ("eager", "graph")}

    def measure(self) -> Measured:
        found = self.run(measure)
        return {way: {"all_reduce_us": 1e6 * max(times[way] for times in found)} for way in found[0]}

    def close(self) -> None:
        with suppress(Exception):  # ranks that are broken are ended all the same
            self.run(free)
        super().close()


def build(rank: RankContext, dtype: str, work: CollectivesWork) -> Problems:
    """Job: make every size and way ready. Returns the ways that can't run here, and why."""
    rank.phase = "build collectives"
    problems: Problems = {}
    groups: dict[tuple[str, str], Group] = {}
    modes = ("eager", "graph") if rank.tp.fabric == "nccl" else ("eager",)
    for message_bytes in work.message_bytes:
        for who, call in _ways(rank, message_bytes, DTYPES[dtype], problems):
            for mode in modes:
                case = f"{size_name(message_bytes)}, {mode}"
                try:
                    call()
                    groups[case, who] = Group([call], work.calls, rank.device, graph=mode == "graph")
                except RuntimeError as problem:
                    if not who.startswith(_SYMMETRIC):
                        raise
                    # They refuse some sizes, on all ranks alike.
                    problems[who, case] = _in_a_line(problem)
    rank.state["collectives"] = groups
    return problems


def measure(rank: RankContext) -> dict[tuple[str, str], float]:
    """Job: seconds of one call, the mean of many, by (case, who)."""
    rank.phase = "time collectives"
    groups: Mapping[tuple[str, str], Group] = rank.state["collectives"]
    found = {}
    for way, group in groups.items():
        rank.tp.barrier()
        found[way] = group.run() / group.num_calls
    return found


def free(rank: RankContext) -> None:
    """Job: graphs go before the group does."""
    rank.state.pop("collectives", None)


def _ways(rank: RankContext, message_bytes: int, dtype: torch.dtype,
          problems: Problems) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    # Zeros stay zeros, however often they are summed.
    x = torch.zeros(message_bytes // dtype.itemsize, dtype=dtype, device=rank.device)
    yield OWN_WAY, partial(rank.tp.all_reduce, x)
    if isinstance(rank.tp, ProcessTPGroup):
        yield f"torch {rank.tp.fabric}", partial(_torch_all_reduce, x, rank.tp.process_group)
    if rank.tp.fabric == "nccl":
        try:
            yield from _symmetric_ways(rank, message_bytes, dtype).items()
        except Exception as problem:  # of a torch build or a machine without them: said in the report
            problems["symmetric memory", None] = _in_a_line(problem)


def _torch_all_reduce(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def _symmetric_ways(rank: RankContext, message_bytes: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Peer-to-peer all-reduces of torch. Multicast (``multimem_*``) stays unused."""
    import torch.distributed._symmetric_memory as symmetric

    assert isinstance(rank.tp, ProcessTPGroup), "symmetric memory needs process ranks"
    name = rank.tp.process_group.group_name
    x = symmetric.empty(message_bytes // dtype.itemsize, dtype=dtype, device=rank.device)
    symmetric.rendezvous(x, name)
    x.zero_()
    return {f"{_SYMMETRIC} one-shot": partial(torch.ops.symm_mem.one_shot_all_reduce, x, "sum", name),
            f"{_SYMMETRIC} two-shot": partial(torch.ops.symm_mem.two_shot_all_reduce_, x, "sum", name)}


def _in_a_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"

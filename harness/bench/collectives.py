"""All-reduce by message size: as the engine calls it, and by every other way there is, eager and in CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import DTYPES
from engine.parallel.group import ProcessTPGroup
from engine.ranks.ranks import RankContext
from harness.bench.timing import group_of
from harness.bench.workloads import CollectivesPart

OWN_WAY = "shardproof"
MODES = ("eager", "graph")
Way = tuple[str, str, str]
"""(case, who does it, ``eager`` or ``graph``)"""
Problems = dict[tuple[str, str | None], str]
"""(who, case; None for all) -> why it can't run here"""
_SYMMETRIC = "symmetric"


def case_name(message_bytes: int, mode: str) -> str:
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if message_bytes >= scale and message_bytes % scale == 0:
            return f"{message_bytes // scale} {unit}, {mode}"
    return f"{message_bytes} B, {mode}"


def size_of_case(sizes: Sequence[int], case: str) -> int:
    """The message size of a case."""
    return next(size for size in sizes for mode in MODES if case_name(size, mode) == case)


def build(rank: RankContext, dtype: str, part: CollectivesPart) -> Problems:
    """Job: make every size and way ready. Returns the ways that can't run here, and why."""
    rank.phase = "build collectives"
    problems: Problems = {}
    runs: dict[Way, Callable[[], float]] = {}
    for message_bytes in part.message_bytes:
        for who, mode, call in _ways(rank, message_bytes, DTYPES[dtype], problems):
            case = case_name(message_bytes, mode)
            try:
                runs[case, who, mode] = _timed(rank, call, mode, part.calls)
            except RuntimeError as problem:
                if not who.startswith(_SYMMETRIC):
                    raise
                # They refuse some sizes, on all ranks alike.
                problems[who, case] = _in_a_line(problem)
    rank.state["collectives"] = runs
    return problems


def measure(rank: RankContext) -> dict[tuple[str, str], float]:
    """Job: seconds of one call, by (case, who)."""
    rank.phase = "time collectives"
    runs: Mapping[Way, Callable[[], float]] = rank.state["collectives"]
    found = {}
    for (case, who, _), run in runs.items():
        rank.tp.barrier()
        found[case, who] = run()
    return found


def _ways(rank: RankContext, message_bytes: int, dtype: torch.dtype,
          problems: Problems) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    # Zeros stay zeros, however often they are summed.
    x = torch.zeros(message_bytes // dtype.itemsize, dtype=dtype, device=rank.device)
    ways: dict[str, Callable[[], Tensor]] = {OWN_WAY: partial(rank.tp.all_reduce, x)}
    if isinstance(rank.tp, ProcessTPGroup):
        ways[f"torch {rank.tp.fabric}"] = partial(_torch_all_reduce, x, rank.tp.process_group)
    if rank.tp.fabric == "nccl":
        try:
            ways |= _symmetric_ways(rank, message_bytes, dtype)
        except Exception as problem:  # of a torch build or a machine without them: said in the report
            problems["symmetric memory", None] = _in_a_line(problem)
    modes = MODES if rank.tp.fabric == "nccl" else MODES[:1]
    for who, call in ways.items():
        for mode in modes:
            yield who, mode, call


def _torch_all_reduce(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def _symmetric_ways(rank: RankContext, message_bytes: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """torch's peer-to-peer all-reduces. Multicast (``multimem_*``) stays unused."""
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


def _timed(rank: RankContext, call: Callable[[], Tensor], mode: str, num_calls: int) -> Callable[[], float]:
    """Seconds of one call, the mean over ``num_calls``."""
    call()
    if mode == "graph":
        group = group_of([call], num_calls, rank.device)
        return lambda: group.run() / num_calls

    def run() -> float:
        _wait(rank.device)
        started = time.perf_counter()
        for _ in range(num_calls):
            call()
        _wait(rank.device)
        return (time.perf_counter() - started) / num_calls

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(rank: RankContext) -> None:
    """Job: graphs go before the group does."""
    with suppress(KeyError):
        del rank.state["collectives"]

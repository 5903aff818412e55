"""Each parallel layer alone, by batch size: what a rank computes, and the collective after it.

Shape suffixes: T = tokens, I = input features of this rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import DTYPES, ModelConfig
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.group import SoloGroup, TPGroup
from engine.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from engine.parallel.sharding import head_shard, scale_range
from engine.ranks.ranks import RankContext
from harness.bench.figures import Figures, Measured
from harness.bench.measurement import OnRanks, Ready, Task
from harness.bench.timing import Group
from harness.bench.workloads import ENGINE_CASE, ONE_THREAD_CASE, LayersWork


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """The least that one call of one rank must do."""

    num_bytes: float
    flop: float


class LayersMeasurement(OnRanks):
    """Parallel layers on fresh ranks. The slowest rank's time counts: the others wait for it."""

    def __init__(self, task: Task) -> None:
        # On a CPU one rank is a process of its own too, so that it is as fresh as several are.
        super().__init__(replace(task, fabric="gloo") if task.tp_size == 1 and task.device == "cpu" else task)
        self._turns = 0

    def prepare(self) -> None:
        task = self.task
        works = self.run(build, task.folder, task.dtype, task.work, task.slower)
        # The rank that has most to do.
        most = {case: max((work[case] for work in works), key=lambda work: work.num_bytes + work.flop) for case in works[0]}
        self.ready = Ready(fabric="solo" if task.tp_size == 1 else self.ready.fabric,
                           bounds={case: self._bounds(work) for case, work in most.items()})

    def measure(self) -> Measured:
        # The first run belongs to the first ranks' rounds.
        if (every := self.task.work.fresh_every) and self._turns > 1 and (self._turns - 1) % every == 0:
            self.close()
            self.renew_ranks()
        self._turns += 1
        found = self.run(measure)
        return {(case, self.task.engine): {"call_us": 1e6 * max(times[case] for times in found)} for case in found[0]}

    def _bounds(self, work: LayerWork) -> Figures:
        # On a CPU one thread a rank; weights in the cache are not read from memory.
        on_gpu = self.task.device == "cuda"
        matmul, copy = (self.task.ceiling(ENGINE_CASE if on_gpu else ONE_THREAD_CASE, metric)
                        for metric in ("matmul_tflop_per_s", "copy_gb_per_s"))
        if matmul is None or copy is None:
            return {}
        read_s = work.num_bytes / (copy * 1e9) if on_gpu or self.task.work.rotate_bytes else 0.0
        seconds = max(work.flop / (matmul * 1e12), read_s)
        return {"call_us": 1e6 * seconds} if seconds else {}


def case_name(layer: str, batch_size: int, vocab_size: int | None = None) -> str:
    """``vocab_size`` where the model's own was cut."""
    return f"{layer}{f' of {vocab_size} ids' if vocab_size else ''}, batch {batch_size}"


def build(rank: RankContext, folder: Path, dtype: str, work: LayersWork, slower: Mapping[str, float]) -> dict[str, LayerWork]:
    """Job: make every layer and batch ready to be timed. What this rank must do in each case.

    Args:
        slower: layer -> share of its work that is done on top, to see whether that is found.
    """
    rank.phase = "build layers"
    if rank.device.type == "cpu":
        torch.set_num_threads(1)
    config = ModelConfig.from_folder(folder)
    config = replace(config, vocab_size=min(config.vocab_size, work.most_vocab or config.vocab_size))
    # A process group of one would still cost each call its collective.
    tp = SoloGroup() if rank.tp.size == 1 else rank.tp
    timed: dict[str, _Timed] = {}
    works: dict[str, LayerWork] = {}
    with torch.inference_mode():
        for name in work.layers:
            placements = _placements(name, config, tp, DTYPES[dtype], rank.device, work)
            for layer in chain(*placements):
                if name in slower:
                    slow_down(layer, slower[name])
            for batch_size in work.batch_sizes:
                case = case_name(name, batch_size, work.most_vocab if name in ("embed_tokens", "lm_head") else None)
                x = _input(placements[0][0], config, batch_size, DTYPES[dtype], rank.device)
                works[case] = _work(placements[0][0], x)
                timed[case] = _time_case(rank, placements, x, work)
    rank.state["layers"] = timed
    return works


def measure(rank: RankContext) -> dict[str, float]:
    """Job: one round, seconds of one call for every case."""
    rank.phase = "time layers"
    timed: Mapping[str, _Timed] = rank.state["layers"]
    number = rank.state["layers_round"] = rank.state.get("layers_round", -1) + 1
    figures = {}
    with torch.inference_mode(), _on_one_core(rank, number):
        for case, (groups, num_runs) in timed.items():
            rank.tp.barrier()
            figures[case] = groups[number % len(groups)].fastest(num_runs)
    return figures


@contextmanager
def _on_one_core(rank: RankContext, number: int) -> Iterator[None]:
    """On a CPU, one rank alone stays on one core for a round, and takes them in turns.

    Left to the scheduler, two processes that are compared would each keep a core of its own, and cores differ: in what else
    runs on them, and in what they share.
    """
    if rank.device.type != "cpu" or rank.tp.size > 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    # Another order than that of the placements, which rounds take in turns as well.
    os.sched_setaffinity(0, {sorted(cores)[(number + number // len(cores)) % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def make_layer(name: str, config: ModelConfig, tp: TPGroup, dtype: torch.dtype, device: torch.device) -> Any:
    """A layer as the model has it, its weights not yet written."""
    hidden, width = config.hidden_size, config.intermediate_size
    options: dict[str, Any] = {"tp": tp, "dtype": dtype, "device": device}
    if name == "qkv_proj":
        return QKVParallelLinear(hidden, config.head_dim, config.num_q_heads, config.num_kv_heads, **options)
    if name == "o_proj":
        heads = head_shard(config.num_q_heads, config.num_kv_heads, tp_rank=tp.rank, tp_size=tp.size)
        return RowParallelLinear(config.num_q_heads * config.head_dim, hidden,
                                 input_range=scale_range(heads.q_heads, config.head_dim), **options)
    if name == "gate_up_proj":
        return MergedColumnParallelLinear(hidden, (width, width), **options)
    if name == "down_proj":
        return RowParallelLinear(width, hidden, **options)
    if name == "embed_tokens":
        return VocabParallelEmbedding(config.vocab_size, hidden, **options)
    if name == "lm_head":
        return ParallelLMHead(config.vocab_size, hidden, **options)
    raise ValueError(f"layer={name!r} is unknown")


def _placements(name: str, config: ModelConfig, tp: TPGroup, dtype: torch.dtype, device: torch.device,
                work: LayersWork) -> list[list[Any]]:
    """The layer, as many times as there are placements, each as often as its weights fill ``rotate_bytes``, at least once."""
    first = make_layer(name, config, tp, dtype, device)
    first.weight.data.copy_(torch.randn(first.weight.shape, device=device).mul_(first.weight.shape[1] ** -0.5))
    num_copies = max(1, -(-work.rotate_bytes // (first.weight.numel() * first.weight.element_size())))
    layers = [first]
    while len(layers) < work.placements * num_copies:
        layers.append(make_layer(name, config, tp, dtype, device))
        layers[-1].weight.data.copy_(first.weight.data)
    return [layers[start : start + num_copies] for start in range(0, len(layers), num_copies)]


def _input(layer: Any, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, VocabParallelEmbedding):
        return torch.randint(0, config.vocab_size, (batch_size,), generator=generator).to(device)
    return torch.randn(batch_size, layer.weight.shape[1], generator=generator).to(dtype).to(device)


def slow_down(layer: Any, share: float) -> None:
    """Let a linear layer compute ``share`` more output features than it has: more of the same work, never a pause.

    Nothing drops them: that would cost time too.

    Raises:
        ValueError: for shares out of (0, 1], and for layers whose weight is no matrix of output features.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]: the part of the work that is done on top")
    if not hasattr(layer, "weight") or layer.weight.ndim != 2:
        raise ValueError(f"layer={type(layer).__name__} has no matrix of output features to make longer")
    extra = max(1, round(share * layer.weight.shape[0]))
    layer.weight.data = torch.cat((layer.weight.data, layer.weight.data[:extra]))


_Timed = tuple[list[Group], int]
"""A group for each placement of the weights; how many runs of one of them a round takes."""


def _time_case(rank: RankContext, placements: Sequence[Sequence[nn.Module]], x: Tensor, work: LayersWork) -> _Timed:
    calls = [[partial(layer, x) for layer in layers] for layers in placements]
    rank.tp.barrier()
    # Every rank must enter a layer's collective equally often.
    one = Group(calls[0][:1], 1, rank.device, graph=False)
    num_calls = rank.tp.all_reduce_min(max(1, round(work.group_s / one.fastest(10))))
    groups = [Group(each, num_calls, rank.device, graph=rank.device.type == "cuda") for each in calls]
    return groups, rank.tp.all_reduce_min(max(2, int(work.slice_s / groups[0].run())))


def _work(layer: Any, x: Tensor) -> LayerWork:
    weight: Tensor = layer.weight
    size = weight.element_size()
    if isinstance(layer, VocabParallelEmbedding):
        return LayerWork(num_bytes=2.0 * x.numel() * weight.shape[1] * size, flop=0.0)
    return LayerWork(num_bytes=float(weight.numel() + x.numel() + x.shape[0] * weight.shape[0]) * size,
                     flop=2.0 * x.shape[0] * weight.numel())

"""Each parallel layer alone, by batch size: what a rank computes, and the collective after it.

Shape suffixes: T = tokens, I = input features of this rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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


class LayersMeasurement(OnRanks):
    """Parallel layers on fresh ranks. The slowest rank's time counts: the others wait for it."""

    def __init__(self, task: Task) -> None:
        # On a CPU one rank is a process of its own too, so that it is as fresh as several are.
        super().__init__(replace(task, fabric="gloo") if task.tp_size == 1 and task.device == "cpu" else task)
        self._turns = 0

    def prepare(self) -> None:
        task = self.task
        works = self.run(build, task.folder, task.dtype, task.work, task.slower)
        most = {case: max((work[case] for work in works), key=sum) for case in works[0]}  # of the rank that has most to do
        self.ready = Ready(fabric="solo" if task.tp_size == 1 else self.ready.fabric,
                           bounds={case: self._bounds(*work) for case, work in most.items()})

    def measure(self) -> Measured:
        # The first run belongs to the first ranks' rounds.
        if (every := self.task.work.fresh_every) and self._turns > 1 and (self._turns - 1) % every == 0:
            self.close()
            self.renew_ranks()
        self._turns += 1
        found = self.run(measure)
        return {(case, self.task.engine): {"call_us": 1e6 * max(times[case] for times in found)} for case in found[0]}

    def _bounds(self, num_bytes: float, flop: float) -> Figures:
        # On a CPU one thread a rank; weights in the cache are not read from memory.
        on_gpu = self.task.device == "cuda"
        matmul, copy = (self.task.ceiling(ENGINE_CASE if on_gpu else ONE_THREAD_CASE, metric)
                        for metric in ("matmul_tflop_per_s", "copy_gb_per_s"))
        if matmul is None or copy is None:
            return {}
        reads = on_gpu or self.task.work.rotate_bytes > 0
        seconds = max(flop / (matmul * 1e12), num_bytes / (copy * 1e9) if reads else 0.0)
        return {"call_us": 1e6 * seconds} if seconds else {}


def build(rank: RankContext, folder: Path, dtype: str, work: LayersWork,
          slower: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Job: make every layer and batch ready to be timed.

    Args:
        rank: where it runs; the layers stay in its state.
        folder: of the model whose layers they are.
        dtype: of weights and inputs.
        work: which batch sizes and how weights are placed.
        slower: layer -> share of its work that is done on top, to see whether that is found.

    Returns:
        Bytes and floating-point operations that one call of this rank must at least move and do, by case.
    """
    rank.phase = "build layers"
    if rank.device.type == "cpu":
        torch.set_num_threads(1)
    config = ModelConfig.from_folder(folder)
    config = replace(config, vocab_size=min(config.vocab_size, work.most_vocab or config.vocab_size))
    # A process group of one would still cost each call its collective.
    tp = SoloGroup() if rank.tp.size == 1 else rank.tp
    timed: dict[str, _Timed] = {}
    least: dict[str, tuple[float, float]] = {}
    with torch.inference_mode():
        for name in work.layers:
            placements = _placements(name, config, tp, DTYPES[dtype], rank.device, work)
            for layer in chain(*placements):
                if name in slower:
                    slow_down(layer, slower[name])
            cut = f" of {work.most_vocab} ids" if work.most_vocab and name in ("embed_tokens", "lm_head") else ""
            for batch_size in work.batch_sizes:
                case = f"{name}{cut}, batch {batch_size}"
                x = layer_input(placements[0][0], config, batch_size, DTYPES[dtype], rank.device)
                least[case] = _least(placements[0][0], x)
                timed[case] = _time_case(rank, placements, x, work)
    rank.state["layers"] = timed
    return least


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
    heads = head_shard(config.num_q_heads, config.num_kv_heads, tp_rank=tp.rank, tp_size=tp.size)
    kind, sizes, options = {
        "qkv_proj": (QKVParallelLinear, (hidden, config.head_dim, config.num_q_heads, config.num_kv_heads), {}),
        "o_proj": (RowParallelLinear, (config.num_q_heads * config.head_dim, hidden),
                   {"input_range": scale_range(heads.q_heads, config.head_dim)}),
        "gate_up_proj": (MergedColumnParallelLinear, (hidden, (width, width)), {}),
        "down_proj": (RowParallelLinear, (width, hidden), {}),
        "embed_tokens": (VocabParallelEmbedding, (config.vocab_size, hidden), {}),
        "lm_head": (ParallelLMHead, (config.vocab_size, hidden), {}),
    }[name]
    return kind(*sizes, tp=tp, dtype=dtype, device=device, **options)


def layer_input(layer: Any, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Token ids ``[T]`` for an embedding, else values ``[T, I]``; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, VocabParallelEmbedding):
        return torch.randint(0, config.vocab_size, (batch_size,), generator=generator).to(device)
    return torch.randn(batch_size, layer.weight.shape[1], generator=generator).to(dtype).to(device)


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


def _least(layer: Any, x: Tensor) -> tuple[float, float]:
    (num_outputs, num_inputs), size = layer.weight.shape, layer.weight.element_size()
    if isinstance(layer, VocabParallelEmbedding):
        return 2.0 * len(x) * num_inputs * size, 0.0
    return float(num_outputs * num_inputs + x.numel() + len(x) * num_outputs) * size, 2.0 * len(x) * num_outputs * num_inputs

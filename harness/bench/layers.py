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
from harness.bench.slowdown import slow_down
from harness.bench.timing import Group, fastest, group_of, seconds_of_one
from harness.bench.workloads import LayersPart


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """The least that one call of one rank must do."""

    num_bytes: float
    flop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """One group for each placement of the weights; a round times ``num_groups`` runs of one of them."""

    groups: list[Group]
    num_groups: int


def case_name(layer: str, batch_size: int, vocab_size: int | None = None) -> str:
    """``vocab_size`` where the model's own was cut."""
    return f"{layer}{f' of {vocab_size} ids' if vocab_size else ''}, batch {batch_size}"


def build(rank: RankContext, folder: Path, dtype: str, part: LayersPart, slower: Mapping[str, float]) -> dict[str, LayerWork]:
    """Job: make every layer and batch ready to be timed. The work of each case, on the rank that has most of it.

    Args:
        slower: layer -> share of its work that is done on top, to see whether that is found.
    """
    rank.phase = "build layers"
    if rank.device.type == "cpu":
        torch.set_num_threads(1)
    config = ModelConfig.from_folder(folder)
    config = replace(config, vocab_size=min(config.vocab_size, part.most_vocab or config.vocab_size))
    # A process group of one would still cost each call its collective.
    tp = SoloGroup() if rank.tp.size == 1 else rank.tp
    timed: dict[str, _Timed] = {}
    works: dict[str, LayerWork] = {}
    with torch.inference_mode():
        for name in part.layers:
            placements = _placements(name, config, tp, DTYPES[dtype], rank.device, part)
            for layer in chain(*placements):
                if name in slower:
                    slow_down(layer, slower[name])
            for batch_size in part.batch_sizes:
                case = case_name(name, batch_size, part.most_vocab if name in ("embed_tokens", "lm_head") else None)
                x = _input(placements[0][0], config, batch_size, DTYPES[dtype], rank.device)
                works[case] = _work(placements[0][0], x)
                timed[case] = _time_case(rank, placements, x, part)
    rank.state["layers"] = timed
    return works


def measure(rank: RankContext) -> dict[str, float]:
    """Job: one round, seconds of one call for every case."""
    rank.phase = "time layers"
    timed: Mapping[str, _Timed] = rank.state["layers"]
    number = rank.state["layers_round"] = rank.state.get("layers_round", -1) + 1
    figures = {}
    with torch.inference_mode(), _on_one_core(rank, number):
        for case, item in timed.items():
            rank.tp.barrier()
            figures[case] = fastest(item.groups[number % len(item.groups)], item.num_groups)
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
                part: LayersPart) -> list[list[Any]]:
    """The layer, as many times as there are placements, each as often as its weights fill ``rotate_bytes``, at least once."""
    first = make_layer(name, config, tp, dtype, device)
    first.weight.data.copy_(torch.randn(first.weight.shape, device=device).mul_(first.weight.shape[1] ** -0.5))
    num_copies = max(1, -(-part.rotate_bytes // (first.weight.numel() * first.weight.element_size())))
    layers = [first]
    while len(layers) < part.placements * num_copies:
        layers.append(make_layer(name, config, tp, dtype, device))
        layers[-1].weight.data.copy_(first.weight.data)
    return [layers[start : start + num_copies] for start in range(0, len(layers), num_copies)]


def _input(layer: Any, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, VocabParallelEmbedding):
        return torch.randint(0, config.vocab_size, (batch_size,), generator=generator).to(device)
    return torch.randn(batch_size, layer.weight.shape[1], generator=generator).to(dtype).to(device)


def _time_case(rank: RankContext, placements: Sequence[Sequence[nn.Module]], x: Tensor, part: LayersPart) -> _Timed:
    calls = [[partial(layer, x) for layer in layers] for layers in placements]
    rank.tp.barrier()
    # Every rank must enter a layer's collective equally often.
    num_calls = rank.tp.all_reduce_min(max(1, round(part.group_s / _seconds(rank, calls[0][0]))))
    groups = [group_of(each, num_calls, rank.device) for each in calls]
    num_groups = rank.tp.all_reduce_min(max(2, int(part.slice_s / groups[0].run())))
    return _Timed(groups=groups, num_groups=num_groups)


def _seconds(rank: RankContext, call: Any) -> float:
    if rank.tp.size == 1:
        return seconds_of_one(call, rank.device)
    # Ranks would not agree when enough calls were made: three for everyone, the last one counts.
    return min(group_of([call], 1, torch.device("cpu")).run() for _ in range(3))


def _work(layer: Any, x: Tensor) -> LayerWork:
    weight: Tensor = layer.weight
    if isinstance(layer, VocabParallelEmbedding):
        moved = x.numel() * weight.shape[1] * weight.element_size()
        return LayerWork(num_bytes=2 * moved, flop=0.0)
    size = weight.element_size()
    return LayerWork(num_bytes=float(weight.numel() + x.numel() + x.shape[0] * weight.shape[0]) * size,
                     flop=2.0 * x.shape[0] * weight.numel())

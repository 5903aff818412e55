"""Clean random cases, run and measured: how far is correct code off, and how far is its baseline?

Ranks are threads; each case is run with the float32 sums of threads and with the rounding of gloo's ring. All kinds:

* ``layer``: one row- or column-parallel layer on real numbers, errors in units of ``u (|x| @ |W|.T + |b|)``;
* ``logits``: a whole tiny model, or a real one, errors in units of ``u`` times the logits' root mean square.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.parallel.group import TPGroup
from engine.parallel.ranks import RankContext
from harness import jobs
from harness.budgets import FEWEST_FOR_TYPICAL, Statistic, measure
from harness.calibrate.groups import RingGroup, SpoilingGroup
from harness.checks.layers import run_layer
from harness.layer_cases import LayerCase
from harness.strategies import random_config
from harness.subjects import Script
from reference.checkpoints import random_checkpoint

ORDERS = ("flat", "ring")
"""Of summation over the ranks: in float32 and rounded once, or along a ring and rounded at every step."""
SAMPLED_KINDS = ("row", "attention_output", "column", "qkv")
OPTIONS = {"block_size": 16, "num_kv_blocks": 24, "max_num_batched_tokens": 64, "max_num_seqs": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One case: by statistic the candidate's error and the baseline's, in units of roundoff times scale.

    Of the statistics by row, those of the row on which the candidate is the most times as far off as the baseline.
    """

    kind: str
    dtype: str
    tp_size: int
    order: str
    numel: int
    candidate: Mapping[Statistic, float]
    baseline: Mapping[Statistic, float]

    def ratio(self, statistic: Statistic) -> float:
        """How many times the baseline's error the candidate's is; 0 if both are none."""
        candidate, baseline = self.candidate[statistic], self.baseline[statistic]
        return candidate / baseline if baseline else 0.0 if not candidate else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoiled:
    """A planted error: this rank's part is too large by this much, relatively."""

    tp_rank: int
    error: float


def measured(kind: str, dtype: str, tp_size: int, order: str, candidate: Tensor, baseline: Tensor, exact: Tensor,
             scale: Tensor | None = None, float32: Tensor | None = None) -> Sample:
    """The errors of ``[T, F]`` tensors."""
    found: dict[Statistic, float] = {}
    own: dict[Statistic, float] = {}
    for statistic, (errors, expected) in measure(candidate, baseline, exact, dtype, scale, float32).items():
        if statistic == "typical" and exact.numel() < FEWEST_FOR_TYPICAL:
            continue
        worst = int((errors / expected).nan_to_num(0.0).argmax())
        found[statistic], own[statistic] = errors.flatten()[worst].item(), expected.flatten()[worst].item()
    return Sample(kind=kind, dtype=dtype, tp_size=tp_size, order=order, numel=exact.numel(), candidate=found, baseline=own)


def grouped(rank: RankContext, order: str, spoiled: Spoiled | None = None) -> RankContext:
    """The rank with sums in that order, and with that error in its part of every sum."""
    tp: TPGroup = RingGroup(rank.tp) if order == "ring" else rank.tp
    if spoiled is not None:
        tp = SpoilingGroup(tp, tp_rank=spoiled.tp_rank, error=spoiled.error)
    other = RankContext(tp=tp, device=rank.device)
    other.state = rank.state
    return other


def random_layer(draw: random.Random, tp_size: int, dtype: str) -> LayerCase:
    """A layer of up to 512 features; real numbers, half of them with outliers."""
    num_kv_heads = draw.randint(1, 4)
    num_q_heads = num_kv_heads * draw.randint(-(-tp_size // num_kv_heads), max(4, tp_size))
    return LayerCase(
        kind=draw.choice(SAMPLED_KINDS), hidden_size=size_up_to(draw, 256), intermediate_size=tp_size * size_up_to(draw, 64),
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=draw.choice((2, 8, 16)), vocab_size=tp_size,
        bias=draw.random() < 0.5, dtype=dtype, integers=False, num_tokens=size_up_to(draw, 32), outliers=draw.random() < 0.5,
        seed=draw.randrange(2**31),
    )


def size_up_to(draw: random.Random, most: int) -> int:
    """Evenly spread over the powers of two: small sizes are where luck is."""
    return max(1, int(most ** draw.random() + 0.5))


def run_layers(rank: RankContext, cases: Sequence[LayerCase], order: str, spoiled: Spoiled | None = None) -> list[Sample]:
    """Job: a sample of each case, of this rank's part of the output."""
    samples = []
    for case in cases:
        found, part = run_layer(grouped(rank, order, spoiled), case)
        samples.append(measured("layer", case.dtype, rank.tp.size, order, found, part.baseline, part.exact, part.scale))
    return samples


def random_model(draw: random.Random, folder: Path, dtype: str, *, tp_size: int) -> Path:
    """A tiny model. Half of them are ill-conditioned: sharp attention, and a feature of the residual stream that dwarfs the
    others, as in real models."""
    config = random_config(draw, tp_size, max_width=draw.choice((32, 128)), max_layers=draw.choice((2, 8)))
    random_checkpoint(folder, config, dtype=dtype, seed=draw.randrange(2**31))
    if draw.random() < 0.5:
        return folder
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensor *= 4
        if name.endswith("embed_tokens.weight"):
            tensor[:, draw.randrange(tensor.shape[1])] *= 32
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def load_model(rank: RankContext, folder: Path, dtype: str, order: str) -> None:
    """Job: load the engine with sums in that order."""
    jobs.load(grouped(rank, order), "engine", folder, dtype, OPTIONS)


def run_logits(rank: RankContext, script: Script, spoiled: tuple[str, Spoiled] | None = None) -> list[Tensor]:
    """Job: the loaded model's logits, from rank 0. ``spoiled``: a module's path, and what is planted in that module alone."""
    subject = rank.state["subject"]
    if spoiled is None:
        return found_on_first(rank, subject.logits(script))
    path, planted = spoiled
    module = subject.runner.model.get_submodule(path)
    clean = module.tp
    try:
        module.tp = SpoilingGroup(clean, tp_rank=planted.tp_rank, error=planted.error)
        return found_on_first(rank, subject.logits(script))
    finally:
        module.tp = clean


def found_on_first(rank: RankContext, logits: list[Tensor]) -> list[Tensor]:
    return [torch.cat(logits)] if rank.tp.rank == 0 else []

"""Where a wrong model goes wrong first: the module whose input is within budget and whose output is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.parallel.ranks import Ranks
from harness import jobs
from harness.budgets import Comparison, computation
from harness.subjects import Taps
from harness.truth import Truth
from reference.shards import owners


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The first module whose output is over budget, on which rank, at which token, by how much."""

    module: str
    rank: int
    token: int
    error_over_budget: float

    def __str__(self) -> str:
        return (f"first over budget: {self.module} on rank {self.rank}, token {self.token}, "
                f"{self.error_over_budget:.3g} of its budget")


def localise(ranks: Ranks, truth: Truth, sequence: int) -> Place | None:
    """Re-run the script on both sides with taps, and walk the modules of one sequence in the order of computation.

    All points before the one named were within budget, its input among them. None if none is over budget.
    """
    by_rank: list[Taps] = ranks.run(jobs.taps, truth.script, sequence)
    exact, baseline = truth.exact_activations(sequence), truth.baseline_activations(sequence)
    for point in points(truth.config):
        source = "inputs" if point.is_input else "outputs"
        whole, own = getattr(exact, source)[point.module], getattr(baseline, source)[point.module]
        worst: tuple[Comparison, int] | None = None
        for rank, taps in enumerate(by_rank):
            candidate = getattr(taps, source).get(point.module)
            if candidate is None:
                raise ValueError(f"rank={rank} gave no {source} of module={point.module}: the subject must tap every module")
            index = point.indices(truth.config, ranks.tp_size, rank, whole.shape[-1])
            expected = whole[..., index]
            if candidate.shape != expected.shape:
                return Place(module=point.label, rank=rank, token=0, error_over_budget=float("inf"))
            verdict = computation(candidate, own[..., index], expected, truth.dtype)
            if worst is None or verdict.error_over_budget > worst[0].error_over_budget:
                worst = verdict, rank
        if worst is not None and not worst[0].ok:
            return Place(module=point.label, rank=worst[1], token=worst[0].row, error_over_budget=worst[0].error_over_budget)
    return None


@dataclass(frozen=True, slots=True)
class Point:
    """A tensor between modules that both sides can show."""

    module: str
    is_input: bool
    sharded_by: str | None
    """The weight whose sharded dimension this tensor's features follow; None: whole on every rank."""

    @property
    def label(self) -> str:
        """The module that makes this tensor: what feeds a row-parallel projection has no module of its own."""
        if not self.is_input:
            return self.module
        parent, _, last = self.module.rpartition(".")
        return f"{parent} ({'attention' if last == 'o_proj' else 'activation'}, before {last})"

    def indices(self, config: dict[str, Any], tp_size: int, rank: int, width: int) -> Tensor:
        if self.sharded_by is None:
            return torch.arange(width)
        name = f"{self.module}.weight"
        shape = (width, 1) if not self.is_input else (1, width)
        return torch.from_numpy(np.asarray(owners(config, name, shape, tp_size).indices[rank]))


def points(config: dict[str, Any]) -> Iterator[Point]:
    """Every point of a decoder in the order of computation."""

    def whole(module: str) -> Point:
        return Point(module, False, None)

    def sharded(module: str, *, is_input: bool = False) -> Point:
        return Point(module, is_input, module)

    yield whole("model.embed_tokens")
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield whole(f"{layer}.input_layernorm")
        yield from (sharded(f"{layer}.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj"))
        yield sharded(f"{layer}.self_attn.o_proj", is_input=True)
        yield whole(f"{layer}.self_attn.o_proj")
        yield whole(f"{layer}.post_attention_layernorm")
        yield from (sharded(f"{layer}.mlp.{name}") for name in ("gate_proj", "up_proj"))
        yield sharded(f"{layer}.mlp.down_proj", is_input=True)
        yield whole(f"{layer}.mlp.down_proj")
    yield whole("model.norm")
    yield whole("lm_head")

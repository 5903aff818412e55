"""Does each parallel layer give, to the bit, what the unsharded one gives on integers that its dtype can add exactly?

With ``sum |x * w| + |b|`` within the dtype's exact integers no order of summation rounds, so a lost, doubled or misplaced
part shows as a wrong integer. Which part of the unsharded result a rank must show comes from ``reference.shards``.

Shape suffixes: T = tokens, I = input features, O = output features, V = vocabulary, E = hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from engine.parallel.ranks import RankContext
from engine.parallel.sharding import scale_range
from harness.budgets import EXACT_INTEGER_LIMIT
from harness.checks.base import CheckContext, Outcome
from reference.hf import DTYPES
from reference.shards import owners

LARGEST_WEIGHT, LARGEST_INPUT, LARGEST_BIAS = 3, 3, 8
KINDS = ("replicated", "column", "merged", "qkv", "row", "attention_output", "embedding", "lm_head")
NUM_DRAWN = 3
"""Drawn shapes a kind of layer, beside the model's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCase:
    """One layer with its sizes; the values follow from the seed."""

    kind: str
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bias: bool
    dtype: str
    seed: int

    @property
    def config(self) -> dict[str, Any]:
        """As in a config.json, for ``reference.shards``."""
        return {"model_type": "llama", "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
                "num_attention_heads": self.num_q_heads, "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim, "vocab_size": self.vocab_size}

    def __str__(self) -> str:
        sizes = {"replicated": f"{self.hidden_size}->{self.intermediate_size}",
                 "column": f"{self.hidden_size}->{self.intermediate_size}",
                 "merged": f"{self.hidden_size}->2x{self.intermediate_size}",
                 "row": f"{self.intermediate_size}->{self.hidden_size}"}
        heads = f"{self.num_q_heads} query and {self.num_kv_heads} KV heads of {self.head_dim}, hidden {self.hidden_size}"
        vocabulary = f"vocabulary {self.vocab_size}, hidden {self.hidden_size}"
        size = sizes.get(self.kind) or (vocabulary if self.kind in ("embedding", "lm_head") else heads)
        return f"{self.kind} layer, {size}, {'with' if self.bias else 'no'} bias, {self.dtype}, seed={self.seed}"


def check_layers(context: CheckContext) -> Outcome:
    cases = draw_cases(random.Random(context.seed), context.truth.config, context.dtype, context.ranks.tp_size)
    by_rank = context.ranks.run(run_cases, cases)
    compared = sum(numbers for answers in by_rank for numbers, _ in answers)
    for number, case in enumerate(cases):
        for rank, answers in enumerate(by_rank):
            if answers[number][1]:
                return Outcome(cases=len(cases), compared=compared, rank=rank, module=case.kind,
                               finding=f"{case}: rank {rank}: {answers[number][1]}")
    return Outcome(cases=len(cases), compared=compared)


def draw_cases(draw: random.Random, config: dict[str, Any], dtype: str, tp_size: int) -> list[LayerCase]:
    """For each kind of layer the model's own sizes (a long vocabulary cut) and drawn ones, with and without bias."""
    num_q_heads = config["num_attention_heads"]
    own = {"hidden_size": config["hidden_size"], "intermediate_size": config["intermediate_size"], "num_q_heads": num_q_heads,
           "num_kv_heads": config.get("num_key_value_heads") or num_q_heads,
           "head_dim": config.get("head_dim") or config["hidden_size"] // num_q_heads,
           "vocab_size": min(config["vocab_size"], 1009)}
    cases = []
    for kind in KINDS:
        for number in range(NUM_DRAWN + 1):
            sizes = own if number == 0 else _draw_sizes(draw, tp_size)
            cases.append(LayerCase(kind=kind, bias=number % 2 == 1 and kind != "embedding", dtype=dtype,
                                   seed=draw.randrange(2**31), **sizes))
    return cases


def _draw_sizes(draw: random.Random, tp_size: int) -> dict[str, int]:
    num_kv_heads = draw.randint(1, 4)
    group = draw.randint(-(-tp_size // num_kv_heads), max(4, tp_size))
    return {"hidden_size": draw.randint(1, 40), "intermediate_size": draw.randint(tp_size, 8 * tp_size),
            "num_q_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "head_dim": draw.choice((2, 4, 8)),
            "vocab_size": draw.randint(tp_size, 9 * tp_size)}


def run_cases(rank: RankContext, cases: Sequence[LayerCase]) -> list[tuple[int, str | None]]:
    """Job: build each layer for this rank, load it through its loader, run it, compare. (values compared, what is wrong)"""
    with torch.inference_mode():
        return [_run_case(rank, case) for case in cases]


def _run_case(rank: RankContext, case: LayerCase) -> tuple[int, str | None]:
    problem = _Problem(case)
    layer, weights = _build(rank, case, problem)
    for parameter, loaded, shard_id in weights:
        arguments = (parameter, loaded) if shard_id is None else (parameter, loaded, shard_id)
        parameter.weight_loader(*arguments)
    x, expected = problem.inputs_and_outputs(rank.tp.rank, rank.tp.size)
    found = layer(x.to(rank.device)).cpu()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return found.numel(), f"gave {tuple(found.shape)} {found.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
    wrong = (found != expected).nonzero()  # as integers: the sign of a zero is no finding
    if not len(wrong):
        return found.numel(), None
    place = tuple(wrong[0].tolist())
    return found.numel(), (f"{len(wrong)} of {found.numel()} values differ, the first at {place}: "
                           f"got {found[place].item():g}, expected {expected[place].item():g}")


class _Problem:
    """Whole integer weights, inputs and outputs of a case, the same on every rank."""

    def __init__(self, case: LayerCase) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        q_size, kv_size = case.num_q_heads * case.head_dim, case.num_kv_heads * case.head_dim
        hidden, width, vocab = case.hidden_size, case.intermediate_size, case.vocab_size
        # (name in reference.shards, output features, input features)
        self.parts: list[tuple[str, int, int]] = {
            "replicated": [("norm", width, hidden)],
            "column": [("gate_proj", width, hidden)],
            "merged": [("gate_proj", width, hidden), ("up_proj", width, hidden)],
            "qkv": [("q_proj", q_size, hidden), ("k_proj", kv_size, hidden), ("v_proj", kv_size, hidden)],
            "row": [("down_proj", hidden, width)],
            "attention_output": [("o_proj", hidden, q_size)],
            "embedding": [("embed_tokens", vocab, hidden)],
            "lm_head": [("lm_head", vocab, hidden)],
        }[case.kind]
        self.weights = [self._integers((out, into), LARGEST_WEIGHT) for _, out, into in self.parts]
        self.biases = [self._integers((out,), LARGEST_BIAS) for _, out, _ in self.parts]

    def _integers(self, shape: tuple[int, ...], largest: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=self.generator).double()

    def inputs_and_outputs(self, tp_rank: int, tp_size: int) -> tuple[Tensor, Tensor]:
        """What this rank's layer is given, and what it must give, in the case's dtype."""
        case, dtype = self.case, DTYPES[self.case.dtype]
        if case.kind == "embedding":
            ids_T = torch.randint(0, case.vocab_size, (29,), generator=self.generator)
            ids_T[:2] = torch.tensor([0, case.vocab_size - 1])
            return ids_T, self.weights[0][ids_T].to(dtype)
        x_TI = self._sparse_inputs(self.parts[0][2])
        outputs = []
        for (name, out, into), weight, bias in zip(self.parts, self.weights, self.biases, strict=True):
            whole_TO = x_TI @ weight.T + (bias if case.bias else 0)
            scale = (x_TI.abs() @ weight.abs().T + (bias.abs() if case.bias else 0)).max()
            assert scale <= EXACT_INTEGER_LIMIT[case.dtype], f"scale={scale} is beyond exact integers of {case.dtype}"
            owned = owners(case.config, f"model.layers.0.{name}.weight", (out, into), tp_size)
            if owned.dim == 0 and case.kind != "lm_head":
                whole_TO = whole_TO[:, torch.from_numpy(owned.indices[tp_rank])]
            elif owned.dim == 1:
                local_TI = x_TI[:, torch.from_numpy(owned.indices[tp_rank])]
            outputs.append(whole_TO)
        given_TI = local_TI if case.kind in ("row", "attention_output") else x_TI
        return given_TI.to(dtype), torch.cat(outputs, dim=1).to(dtype)

    def _sparse_inputs(self, num_features: int) -> Tensor:
        """Rows with so few non-zeros that sums stay exact; together they touch every feature."""
        most = (EXACT_INTEGER_LIMIT[self.case.dtype] - LARGEST_BIAS) // (LARGEST_WEIGHT * LARGEST_INPUT)
        per_row = min(num_features, most)
        order = torch.randperm(num_features, generator=self.generator)
        rows = []
        for features in order.split(per_row):
            row = torch.zeros(num_features, dtype=torch.float64)
            signs = torch.randint(0, 2, (len(features),), generator=self.generator) * 2 - 1
            row[features] = (torch.randint(1, LARGEST_INPUT + 1, (len(features),), generator=self.generator) * signs).double()
            rows.append(row)
        return torch.stack(rows)


def _build(rank: RankContext, case: LayerCase, problem: _Problem) -> tuple[nn.Module, list[tuple[Any, Tensor, Any]]]:
    """The layer, and (parameter, whole checkpoint tensor, shard_id) for each tensor to load."""
    tp, dtype, device, bias = rank.tp, DTYPES[case.dtype], rank.device, case.bias
    hidden, width, vocab = case.hidden_size, case.intermediate_size, case.vocab_size
    shard_ids: Sequence[Any] = (None,)
    layer: Any
    if case.kind == "replicated":
        layer = ReplicatedLinear(hidden, width, bias=bias, tp=tp, dtype=dtype, device=device)
    elif case.kind == "column":
        layer = ColumnParallelLinear(hidden, width, bias=bias, tp=tp, dtype=dtype, device=device)
    elif case.kind == "merged":
        layer = MergedColumnParallelLinear(hidden, (width, width), bias=bias, tp=tp, dtype=dtype, device=device)
        shard_ids = (0, 1)
    elif case.kind in ("qkv", "attention_output"):
        layer, shard_ids = QKVParallelLinear(hidden, case.head_dim, case.num_q_heads, case.num_kv_heads, bias=bias, tp=tp,
                                             dtype=dtype, device=device), ("q", "k", "v")
        if case.kind == "attention_output":
            layer, shard_ids = RowParallelLinear(
                case.num_q_heads * case.head_dim, hidden, bias=bias, tp=tp, dtype=dtype, device=device,
                input_range=scale_range(layer.heads.q_heads, case.head_dim)), (None,)
    elif case.kind == "row":
        layer = RowParallelLinear(width, hidden, bias=bias, tp=tp, dtype=dtype, device=device)
    elif case.kind == "embedding":
        layer = VocabParallelEmbedding(vocab, hidden, tp=tp, dtype=dtype, device=device)
    else:
        layer = ParallelLMHead(vocab, hidden, bias=bias, tp=tp, dtype=dtype, device=device)
    tensors = [(layer.weight, whole.to(dtype), shard_id) for whole, shard_id in zip(problem.weights, shard_ids, strict=True)]
    if bias:
        tensors += [(layer.bias, whole.to(dtype), shard_id) for whole, shard_id in zip(problem.biases, shard_ids, strict=True)]
    return layer, tensors

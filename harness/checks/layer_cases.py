"""One parallel layer with its values: drawn from a seed, the same on every rank, with what each rank must show.

Values are integers that the dtype adds exactly, so that no order of summation rounds, or real numbers, with the float64
result and the variance that rounding gives it. Which part of the whole result a rank must show follows from the subject's
layout.

Shape suffixes: T = tokens, I = input features, O = output features, V = vocabulary, E = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.subjects.rank import Rank
from harness.verification.budgets import EXACT_INTEGER_LIMIT, sum_variance
from reference.hf import DTYPES

LAYERS = ("replicated", "column", "merged", "qkv", "row", "attention_output", "embedding", "lm_head")
LARGEST_WEIGHT, LARGEST_INPUT, LARGEST_BIAS = 3, 3, 8
OUTLIER = 64.0
"""How much larger a few input features are, as in real models, if the case has outliers."""
NUM_TOKEN_IDS = 29
WITH_BIAS = " with bias"
NAMES = tuple(layer + bias for layer in LAYERS for bias in ("", WITH_BIAS) if (layer, bias) != ("embedding", WITH_BIAS))
"""Kinds of case to be told apart; an embedding has no bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCase:
    """One layer with its sizes; the values follow from the seed."""

    layer: str
    """One of ``LAYERS``."""
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bias: bool
    dtype: str
    seed: int
    integers: bool = True
    num_tokens: int = 1
    """Rows of real input; those of integers follow from the sizes."""
    outliers: bool = False
    negative: bool = False
    """No result is positive: zeros that pad a vocabulary would win."""

    @property
    def kind(self) -> str:
        """One of ``NAMES``."""
        return self.layer + (WITH_BIAS if self.bias else "")

    @property
    def module(self) -> str:
        return self.layer

    @property
    def config(self) -> dict[str, Any]:
        """As in a config.json, for ``reference.shards``."""
        return {"model_type": "llama", "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
                "num_attention_heads": self.num_q_heads, "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim, "vocab_size": self.vocab_size}

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """(name in ``reference.shards``, output features, input features) of each tensor that the layer fuses."""
        hidden, width, vocab = self.hidden_size, self.intermediate_size, self.vocab_size
        q_size, kv_size = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "replicated": [("norm", width, hidden)],
            "column": [("gate_proj", width, hidden)],
            "merged": [("gate_proj", width, hidden), ("up_proj", width, hidden)],
            "qkv": [("q_proj", q_size, hidden), ("k_proj", kv_size, hidden), ("v_proj", kv_size, hidden)],
            "row": [("down_proj", hidden, width)],
            "attention_output": [("o_proj", hidden, q_size)],
            "embedding": [("embed_tokens", vocab, hidden)],
            "lm_head": [("lm_head", vocab, hidden)],
        }[self.layer]

    @property
    def size(self) -> int:
        """Its weights."""
        return sum(out * into for _, out, into in self.parts)

    def __str__(self) -> str:
        sizes = {"replicated": f"{self.hidden_size}->{self.intermediate_size}",
                 "column": f"{self.hidden_size}->{self.intermediate_size}",
                 "merged": f"{self.hidden_size}->2x{self.intermediate_size}",
                 "row": f"{self.intermediate_size}->{self.hidden_size}"}
        heads = f"{self.num_q_heads} query and {self.num_kv_heads} KV heads of {self.head_dim}, hidden {self.hidden_size}"
        vocabulary = f"vocabulary {self.vocab_size}, hidden {self.hidden_size}"
        size = sizes.get(self.layer) or (vocabulary if self.layer in ("embedding", "lm_head") else heads)
        values = "integers" if self.integers else f"{self.num_tokens} rows of reals{' with outliers' if self.outliers else ''}"
        values += ", none positive" if self.negative else ""
        return (f"{self.layer} layer, {size}, {'with' if self.bias else 'no'} bias, {self.dtype} {values}, "
                f"seed={self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPart:
    """What one rank's layer is given, and what its output is held against.

    given      inputs in the case's dtype, or token ids
    exact      [T, O] float64
    variance   [T, O] float64, of the rounding error; zero where nothing is computed
    """

    given: Tensor
    exact: Tensor
    variance: Tensor


class LayerProblem:
    """Whole weights and biases of a case in its dtype, in checkpoint order."""

    def __init__(self, case: LayerCase) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        self._generator = torch.Generator().manual_seed(case.seed)
        draw = self._integers if case.integers else self._reals
        self.weights = [draw((out, into), LARGEST_WEIGHT, into**-0.5) for _, out, into in case.parts]
        self.biases = [draw((out,), LARGEST_BIAS, 0.25) for _, out, _ in case.parts]
        if case.negative:
            self.weights, self.biases = [-w.abs() for w in self.weights], [-b.abs() for b in self.biases]

    def part(self, rank: Rank) -> RankPart:
        """What a rank is given and must show, by the subject's own layout. To be called once: it draws the inputs."""
        case, tp_rank, tp_size = self.case, rank.tp_rank, rank.tp_size
        if case.layer == "embedding":
            ids_T = torch.randint(0, case.vocab_size, (NUM_TOKEN_IDS,), generator=self._generator)
            # Every rank's first and last row.
            by_rank = rank.layout(case.config, "model.embed_tokens.weight", (case.vocab_size, case.hidden_size), tp_size).indices
            ids_T = torch.cat([torch.tensor([int(ids[end]) for ids in by_rank if len(ids) for end in (0, -1)]), ids_T])
            rows = self.weights[0][ids_T]
            return RankPart(given=ids_T, exact=rows.double(), variance=torch.zeros(rows.shape, dtype=torch.float64))
        x_TI = self._sparse_integers() if case.integers else self._real_inputs()
        x_TI = x_TI.abs() if case.negative else x_TI
        given = x_TI
        exact: list[Tensor] = []
        variance: list[Tensor] = []
        for (name, out, into), weight, bias in zip(case.parts, self.weights, self.biases, strict=True):
            owned = rank.layout(case.config, f"model.layers.0.{name}.weight", (out, into), tp_size)
            whole = self._whole(x_TI, weight, bias if case.bias else None, parts=tp_size if owned.dim == 1 else 1)
            if owned.dim == 0 and case.layer != "lm_head":
                columns = torch.from_numpy(owned.indices[tp_rank])
                whole = [tensor[:, columns] for tensor in whole]
            elif owned.dim == 1:
                given = x_TI[:, torch.from_numpy(owned.indices[tp_rank])]
            for tensors, tensor in zip((exact, variance), whole, strict=True):
                tensors.append(tensor)
        return RankPart(given=given, exact=torch.cat(exact, 1), variance=torch.cat(variance, 1))

    def _whole(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, parts: int) -> list[Tensor]:
        """Exact result of one linear, and the variance of its rounding if it is summed in so many parts."""
        x, weight = x_TI.double(), weight_OI.double()
        bias = weight.new_zeros(len(weight)) if bias_O is None else bias_O.double()
        exact = x @ weight.T + bias
        if self.case.integers:
            reach, limit = (x.abs() @ weight.abs().T + bias.abs()).max(), EXACT_INTEGER_LIMIT[self.case.dtype]
            assert reach <= limit, f"sums reach {reach}, beyond the exact integers of {self.case.dtype}"
            return [exact, torch.zeros_like(exact)]
        squares = x.square() @ weight.square().T + bias.square()
        return [exact, sum_variance(squares, exact, self.case.dtype, addends=x.shape[1] + (bias_O is not None), parts=parts)]

    def _integers(self, shape: tuple[int, ...], largest: int, _: float) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=self._generator).to(self.dtype)

    def _reals(self, shape: tuple[int, ...], _: int, deviation: float) -> Tensor:
        return (torch.randn(shape, generator=self._generator, dtype=torch.float64) * deviation).to(self.dtype)

    def _real_inputs(self) -> Tensor:
        num_features = self.case.parts[0][2]
        x_TI = torch.randn((self.case.num_tokens, num_features), generator=self._generator, dtype=torch.float64)
        if self.case.outliers:
            x_TI[:, torch.randint(num_features, (1 + num_features // 128,), generator=self._generator)] *= OUTLIER
        return x_TI.to(self.dtype)

    def _sparse_integers(self) -> Tensor:
        """Rows with so few non-zeros that sums stay exact; together they touch every feature."""
        num_features = self.case.parts[0][2]
        most = (EXACT_INTEGER_LIMIT[self.case.dtype] - LARGEST_BIAS) // (LARGEST_WEIGHT * LARGEST_INPUT)
        order = torch.randperm(num_features, generator=self._generator)
        rows = []
        for features in order.split(min(num_features, most)):
            row = torch.zeros(num_features, dtype=self.dtype)
            signs = torch.randint(0, 2, (len(features),), generator=self._generator) * 2 - 1
            row[features] = (torch.randint(1, LARGEST_INPUT + 1, (len(features),), generator=self._generator) * signs
                             ).to(self.dtype)
            rows.append(row)
        return torch.stack(rows)

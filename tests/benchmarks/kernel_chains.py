"""Times a decoder layer's kernels one after the other, for ``kernels_gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from engine.kernels.gemv import gemv
from engine.kernels.matmul_few_rows import matmul_few_rows, tiles_for
from engine.kernels.paged_decode import paged_decode
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.rope import rope_store_kv
from engine.kernels.silu_mul import silu_mul
from tests.benchmarks.graph_timing import (
    BLOCK_SIZE,
    DECODE_MAX_CONTEXT,
    HEAD_DIM,
    Row,
    normal,
    paged,
    time_us,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """One layer of a decoder, and how many of them are enough to not fit the L2 cache."""

    name: str
    hidden: int
    num_q_heads: int
    num_kv_heads: int
    intermediate: int
    num_layers: int


def layer_rows() -> Iterator[Row]:
    """Whole layers in a row, as a captured decode step runs them: what launches and gaps cost shows only here."""
    shapes = [
        _Shape(name="0.6B", hidden=1024, num_q_heads=16, num_kv_heads=8, intermediate=3072, num_layers=8),
        _Shape(name="8B", hidden=4096, num_q_heads=32, num_kv_heads=8, intermediate=12_288, num_layers=2),
    ]
    for shape, num_seqs in product(shapes, (1, 8, 64, 128, 256)):
        generator = torch.Generator().manual_seed(0)
        low, high = (1024, 1024) if num_seqs == 1 else (100, 2000)
        contexts = torch.randint(low, high + 1, (num_seqs,), generator=generator).tolist()
        heads = shape.num_q_heads + 2 * shape.num_kv_heads
        weight_bytes = 2.0 * shape.hidden * ((heads + shape.num_q_heads) * HEAD_DIM + 3 * shape.intermediate)
        moved = weight_bytes + sum(contexts) * shape.num_kv_heads * HEAD_DIM * 4.0
        layers = [_layer(shape, contexts) for _ in range(shape.num_layers)]
        x, norm = normal(num_seqs, shape.hidden), normal(shape.hidden)
        for matmul, overlap in _LAYER_VARIANTS:

            def step(
                layers: list[Any] = layers, x: torch.Tensor = x, norm: torch.Tensor = norm,
                matmul: str = matmul, overlap: bool = overlap,
            ) -> torch.Tensor:  # fmt: skip
                residual = x
                for layer in layers:
                    x, residual = layer(x, residual, norm, matmul, overlap)
                return x

            us = time_us([step], min_calls=4) / shape.num_layers
            launched = "launched early" if overlap else "in turn"
            yield Row(
                kernel="layer", case=f"{shape.name} batch {num_seqs}", config=f"{matmul} matmul, {launched}",
                us=us, bytes_moved=moved,
            )  # fmt: skip


_LAYER_VARIANTS = [
    # matmul, launched early
    ("torch", False),
    ("torch", True),
    ("ours", False),
    ("ours", True),
]


def _ours(x: torch.Tensor, weight: torch.Tensor, *, overlap: bool) -> torch.Tensor:
    """As ``engine.layers.matmul`` chooses."""
    if x.shape[0] == 1:
        return gemv(x, weight, settled=True, overlap=overlap)
    tiles = tiles_for(x.shape[0], *weight.shape)
    return F.linear(x, weight) if tiles is None else matmul_few_rows(x, weight, tiles=tiles, settled=True, overlap=overlap)


def _layer(shape: _Shape, contexts: list[int]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """One layer's decode step, on weights and a cache of its own."""
    heads, group = shape.num_q_heads + 2 * shape.num_kv_heads, shape.num_q_heads // shape.num_kv_heads
    qkv_proj, o_proj, gate_up_proj, down_proj = (
        normal(outputs, inputs) / inputs**0.5
        for outputs, inputs in (
            (heads * HEAD_DIM, shape.hidden), (shape.hidden, shape.num_q_heads * HEAD_DIM),
            (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate),
        )
    )  # fmt: skip
    k_cache, v_cache, table = paged(contexts, shape.num_kv_heads)
    lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    positions = lengths.long() - 1
    slots = table[torch.arange(len(contexts)), positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = torch.arange(0, shape.num_q_heads, group, dtype=torch.int32, device="cuda")
    served = (lengths, starts, torch.full_like(starts, group), HEAD_DIM**-0.5)
    angles = torch.rand(4096, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    head_norm = normal(HEAD_DIM)
    bounds: dict[str, Any] = {"max_group": group, "max_context": DECODE_MAX_CONTEXT}

    def layer(
        x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, matmul: str, overlap: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        linear = partial(_ours, overlap=overlap) if matmul == "ours" else F.linear
        x, residual = add_rms_norm(x, residual, norm, 1e-6, settled=True, overlap=overlap)
        q = rope_store_kv(linear(x, qkv_proj), positions, cos, sin, k_cache, v_cache, slots, head_norm, head_norm,
                          settled=True, overlap=overlap)  # fmt: skip
        x = paged_decode(q, k_cache, v_cache, table, *served, overlap=overlap, **bounds)
        x, residual = add_rms_norm(linear(x.flatten(1), o_proj), residual, norm, 1e-6, settled=True, overlap=overlap)
        return linear(silu_mul(linear(x, gate_up_proj), overlap=overlap), down_proj), residual

    return layer

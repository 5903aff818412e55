"""Kernels where they run, their plain-torch twins where not: ``python -m pytest tests/benchmarks --benchmark-only -k kernel``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from engine.kernels.paged_decode import paged_decode, paged_decode_torch
from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_torch
from engine.kernels.silu_mul import silu_mul, silu_mul_torch
from engine.layers.dispatch import pick
from tests.benchmarks.timed import finished

HIDDEN, HEAD_DIM, BLOCK_SIZE = 1024, 128, 256


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_kernel_silu_mul(num_tokens: int, benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(num_tokens, 2 * HIDDEN, device=device).to(dtype)
    result = benchmark(finished(lambda: pick(x, silu_mul, silu_mul_torch)(x), device))
    assert result.shape == (num_tokens, HIDDEN)
    assert result.isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_kernel_add_rms_norm(num_tokens: int, benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(num_tokens, HIDDEN, device=device).to(dtype) for _ in range(2))
    weight = torch.ones(HIDDEN, dtype=dtype, device=device)
    kernel = pick(x, add_rms_norm, add_rms_norm_torch)
    result = benchmark(finished(lambda: kernel(x, residual, weight, 1e-6)[0], device))
    assert result.shape == x.shape
    assert result.float().square().mean().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("num_seqs", [1, 16])
def test_kernel_paged_decode(num_seqs: int, benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    num_q_heads, num_kv_heads, context = 16, 8, 1024
    blocks = context // BLOCK_SIZE
    q = torch.randn(num_seqs, num_q_heads, HEAD_DIM, device=device).to(dtype)
    k_cache, v_cache = (torch.randn(num_seqs * blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM, device=device).to(dtype)
                        for _ in range(2))
    ints = partial(torch.tensor, dtype=torch.int32, device=device)
    table = torch.arange(num_seqs * blocks, dtype=torch.int32, device=device).view(num_seqs, blocks)
    starts = ints(range(0, num_q_heads, num_q_heads // num_kv_heads))
    counts = torch.full_like(starts, num_q_heads // num_kv_heads)
    attend = partial(pick(q, paged_decode, paged_decode_torch), q, k_cache, v_cache, table, ints([context] * num_seqs), starts,
                     counts, HEAD_DIM**-0.5)
    result = benchmark(finished(attend, device))
    assert result.shape == q.shape
    assert result.isfinite().all()

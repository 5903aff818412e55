"""The plain-torch norms against the formula in float64."""

import pytest
import torch

from engine.kernels.rms_norm import add_rms_norm_torch, rms_norm_torch
from tests.engine.kernels.problems import over_budget, rounding_budget

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
EPS = 1e-6


def _exact(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    x = x.double()
    return x / ((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_the_formula_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 96, generator=generator).to(dtype)
    weight = torch.randn(96, generator=generator).to(dtype)
    exact = _exact(x, weight)
    assert over_budget(rms_norm_torch(x, weight, EPS), exact, rounding_budget(exact, exact, dtype)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_addition_gives_the_bits_of_an_addition_and_a_norm(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.ones(64, dtype=dtype)
    normed, new_residual = add_rms_norm_torch(x, residual, weight, EPS)
    assert torch.equal(new_residual, (x.double() + residual.double()).to(dtype))
    assert torch.equal(normed, rms_norm_torch(new_residual, weight, EPS))


def test_the_budget_would_notice_a_forgotten_epsilon() -> None:
    x = torch.full((1, 64), 1e-3)
    weight = torch.ones(64)
    exact = _exact(x, weight)
    budget = rounding_budget(exact, exact, torch.float32)
    assert over_budget(rms_norm_torch(x, weight, EPS), exact, budget) <= 1
    assert over_budget(rms_norm_torch(x, weight, 0.0), exact, budget) > 100


def test_a_row_of_zeros_stays_zero() -> None:
    assert not rms_norm_torch(torch.zeros(2, 8), torch.ones(8), EPS).any()

"""The plain-torch gate against the formula in float64."""

import pytest
import torch

from engine.kernels.silu_mul import silu_mul_torch
from tests.engine.kernels.problems import over_budget, rounding_budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gate_is_the_formula_rounded_once(dtype: torch.dtype) -> None:
    gate_up = (4 * torch.randn(9, 70, generator=torch.Generator().manual_seed(0))).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = gate / (1 + (-gate).exp()) * up
    assert over_budget(silu_mul_torch(gate_up), exact, rounding_budget(exact, exact, dtype)) <= 1
    swapped = up / (1 + (-up).exp()) * gate
    assert over_budget(silu_mul_torch(gate_up), swapped, rounding_budget(swapped, swapped, dtype)) > 10


def test_large_gates_neither_overflow_nor_leave_a_nan() -> None:
    gate_up = torch.tensor([[-1000.0, 1000.0, 2.0, 2.0]])
    assert silu_mul_torch(gate_up).tolist() == [[0.0, 2000.0]]

"""Products of one row against float64.

bfloat16 is left to the GPU: the interpreter's product of it is wrong.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.gemv import gemv, gemv_torch
from tests.engine.kernels.problems import over_budget, rounding_budget


def _normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _share_of_budget(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    exact = gemv_torch(x.double(), weight.double(), None if bias is None else bias.double())
    scale = gemv_torch(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return over_budget(actual, exact, rounding_budget(exact, scale, x.dtype))


@settings(max_examples=25, deadline=None)
@given(
    num_outputs=st.sampled_from([0, 1, 5, 40]),
    num_inputs=st.sampled_from([8, 72, 576, 1500, 4500]),
    launch=st.sampled_from([{}, {"num_warps": 2, "rows": 8, "parts": 1}, {"num_warps": 1, "rows": 2}]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    with_bias=st.booleans(),
    settled=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gemv_is_the_product(
    num_outputs: int,
    num_inputs: int,
    launch: dict[str, Any],
    dtype: torch.dtype,
    with_bias: bool,
    settled: bool,
    seed: int,
) -> None:
    x = _normal(seed, 1, num_inputs + 8, dtype=dtype)[:, :num_inputs]
    weight = _normal(seed + 1, num_outputs, num_inputs + 8, dtype=dtype)[:, 8:]
    bias = _normal(seed + 2, num_outputs, dtype=dtype) if with_bias else None
    y = gemv(x, weight, bias, settled=settled, **launch)
    assert y.shape == (1, num_outputs)
    assert _share_of_budget(y, x, weight, bias) <= 1


def test_the_budget_would_notice_an_input_feature_too_few_and_a_bias_missing() -> None:
    x, weight = _normal(0, 1, 576, dtype=torch.float16), _normal(1, 40, 576, dtype=torch.float16)
    bias = _normal(2, 40, dtype=torch.float16)
    fewer = x.clone()
    fewer[:, -1] = 0
    assert _share_of_budget(gemv(x, weight, bias), x, weight, bias) <= 1
    assert _share_of_budget(gemv(fewer, weight, bias), x, weight, bias) > 10
    assert _share_of_budget(gemv(x, weight), x, weight, bias) > 10


@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "dtype"),
    [(0, 16, torch.float16), (2, 16, torch.float16), (1, 24, torch.float16), (1, 16, torch.float32), (1, 16, torch.float64)],
)
def test_what_does_not_fit_is_refused(num_rows: int, num_inputs: int, dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 16, dtype=torch.float64 if dtype is torch.float64 else torch.float16)
    with pytest.raises(ValueError, match="float64" if dtype is torch.float64 else "one row of x"):
        gemv(torch.zeros(num_rows, num_inputs, dtype=dtype), weight)

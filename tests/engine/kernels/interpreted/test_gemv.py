"""Products of one row against float64.

bfloat16 is left to the GPU: the interpreter's product of it is wrong.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.gemv import HalfNormed, gemv, gemv_add_norm, gemv_add_norm_torch, gemv_torch
from engine.kernels.rms_norm import rms_norm_torch
from engine.kernels.silu_mul import silu_mul
from tests.engine.kernels.problems import over_budget, rounding_budget


def _normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _share_of_budget(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    exact = gemv_torch(x.double(), weight.double(), None if bias is None else bias.double())
    scale = gemv_torch(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return over_budget(actual, exact, rounding_budget(exact, scale, x.dtype))


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
    into = torch.full((1, num_outputs), torch.nan, dtype=dtype) if settled else None
    y = gemv(x, weight, bias, settled=settled, out_TO=into, **launch)
    assert into is None or y is into
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


@pytest.mark.parametrize(("num_features", "num_inputs"), [(1, 8), (21, 72)])
def test_a_gated_product_has_the_bits_of_silu_mul_on_the_product(num_features: int, num_inputs: int) -> None:
    x, weight, bias = (_normal(seed, *shape, dtype=torch.float16) for seed, shape in enumerate(
        ((1, num_inputs), (2 * num_features, num_inputs), (2 * num_features,))))
    weight /= num_inputs**0.5
    for b in (None, bias):
        assert torch.equal(gemv(x, weight, b, gated=True, settled=True), silu_mul(gemv(x, weight, b)))


@pytest.mark.parametrize("hidden", [1, 300])
def test_two_products_share_the_norm_between_them(hidden: int) -> None:
    """In float32, where the twin's roundings are as many."""
    x, first, residual, norm, second = (_normal(seed, *shape, dtype=torch.float32) for seed, shape in enumerate(
        ((1, 72), (hidden, 72), (1, hidden), (hidden,), (24, hidden))))
    second /= hidden**0.5
    half, new_residual = gemv_add_norm(x, first, residual, norm, 1e-6, settled=True)
    twin, same_residual = gemv_add_norm_torch(x, first, residual, norm, 1e-6)
    torch.testing.assert_close(new_residual, same_residual)
    assert torch.equal(half.values_TI, new_residual * norm)
    torch.testing.assert_close(half.squares_TP.sum(dim=1, keepdim=True), twin.squares_TP)
    for gated in (False, True):
        torch.testing.assert_close(gemv(half, second, gated=gated), gemv_torch(half, second, gated=gated), rtol=1e-5,
                                   atol=1e-4)
    too_much = HalfNormed(half.values_TI, half.squares_TP * 1.05, half.eps)
    expected = gemv_torch(half, second)
    assert (gemv(too_much, second) - expected).abs().max() > 0.01 * expected.abs().max()


def test_the_twins_share_the_norm_alike() -> None:
    x, first, residual, norm, second = (_normal(seed, *shape, dtype=torch.float64) for seed, shape in enumerate(
        ((5, 48), (40, 48), (5, 40), (40,), (24, 40))))
    half, new_residual = gemv_add_norm_torch(x, first, residual, norm, 1e-6)
    torch.testing.assert_close(new_residual, x @ first.T + residual)
    torch.testing.assert_close(gemv_torch(half, second), rms_norm_torch(new_residual, norm, 1e-6) @ second.T)

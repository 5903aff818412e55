"""Products of few rows against float64.

bfloat16 is left to the GPU: the interpreter's product of it is wrong.
"""

import pytest
import torch

from engine.kernels.matmul_few_rows import Tiles, matmul_few_rows, matmul_few_rows_torch
from engine.kernels.silu_mul import silu_mul
from tests.engine.kernels.problems import over_budget, rounding_budget


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def _share_of_budget(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    exact = matmul_few_rows_torch(x.double(), weight.double(), None if bias is None else bias.double())
    scale = matmul_few_rows_torch(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return over_budget(actual, exact, rounding_budget(exact, scale, x.dtype))


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs"), [(0, 4, 32), (1, 1, 16), (2, 16, 32), (16, 33, 40),
                                                                     (17, 5, 72)])
def test_it_is_the_product_at_the_borders_of_tiles(num_rows: int, num_outputs: int, num_inputs: int, weight_first: bool) -> None:
    x, weight = _normal(1, num_rows, num_inputs + 8)[:, :num_inputs], _normal(2, num_outputs, num_inputs + 8)[:, 8:]
    tiles = Tiles(16, 16, 32, weight_first=weight_first)
    for bias in (None, _normal(3, num_outputs)):
        into = None if bias is None else torch.full((num_rows, num_outputs), torch.nan).half()
        y = matmul_few_rows(x, weight, bias, tiles=tiles, settled=True, out_TO=into)
        assert into is None or y is into
        assert y.shape == (num_rows, num_outputs)
        assert _share_of_budget(y, x, weight, bias) <= 1


def test_the_budget_would_notice_an_input_feature_too_few_and_a_bias_missing() -> None:
    x, weight, bias = _normal(0, 3, 40), _normal(1, 5, 40), _normal(2, 5)
    fewer = x.clone()
    fewer[:, -1] = 0
    tiles = Tiles(16, 16, 16)
    assert _share_of_budget(matmul_few_rows(x, weight, bias, tiles=tiles), x, weight, bias) <= 1
    assert _share_of_budget(matmul_few_rows(fewer, weight, bias, tiles=tiles), x, weight, bias) > 10
    assert _share_of_budget(matmul_few_rows(x, weight, tiles=tiles), x, weight, bias) > 10


@pytest.mark.parametrize(("num_inputs", "dtype", "message"), [(24, torch.float16, "one number of input features"),
                                                              (16, torch.float32, "16-bit"), (16, torch.float64, "float64")])
def test_what_does_not_fit_is_refused(num_inputs: int, dtype: torch.dtype, message: str) -> None:
    weight = torch.zeros(4, 16, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        matmul_few_rows(torch.zeros(2, num_inputs, dtype=dtype), weight, tiles=Tiles(16, 16, 16))


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize(("num_rows", "num_features", "num_inputs"), [(0, 4, 32), (2, 8, 32), (17, 21, 40)])
def test_a_gated_product_has_the_bits_of_silu_mul_on_the_product(num_rows: int, num_features: int, num_inputs: int,
                                                                 weight_first: bool) -> None:
    """Of quarters, whose products are exact: the interpreter sums each variant in an order of its own."""
    x, weight, bias = (torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).half() / 4 for seed, shape in
                       enumerate(((num_rows, num_inputs), (2 * num_features, num_inputs), (2 * num_features,))))
    tiles = Tiles(16, 16, 32, weight_first=weight_first)
    for b in (None, bias):
        gated = matmul_few_rows(x, weight / 4, b, tiles=tiles, gated=True, settled=True)
        assert gated.shape == (num_rows, num_features)
        assert torch.equal(gated, silu_mul(matmul_few_rows(x, weight / 4, b, tiles=tiles)))
        if num_rows:
            exchanged = silu_mul(matmul_few_rows(x, weight.roll(num_features, 0) / 4, b, tiles=tiles))
            assert not torch.equal(gated, exchanged)

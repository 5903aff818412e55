"""A sum in any order is within the budget that theory gives it, on any machine; what is wrong is not.

Sums in drawn orders (``harness.studies.calibrate.orders``) stand for machines and libraries that are not here.

Shape suffixes: T = rows, I = input features, O = output features.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.checks.layer_cases import LayerCase, LayerProblem
from harness.checks.layers import draw_cases
from harness.strategies import random_config
from harness.studies.calibrate.draws import drawn_models
from harness.studies.calibrate.orders import DrawnOrders, Order, product
from harness.verification.budgets import rounding, sum_variance
from harness.verification.simulated import SimulatedRounding
from reference.hf import DTYPES
from tests.harness.checking import alone

every_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
SEQUENTIAL = Order(lanes=1, pairwise=False, permuted=False, fused=False, addend_first=False, seed=0)


def real_cases(dtype: str, seed: int) -> list[LayerCase]:
    """Of one run of the check of layers, those of one tensor of real numbers without a bias."""
    draw, kinds = random.Random(seed), ("replicated", "column", "row", "attention_output", "lm_head")
    return [case for case in draw_cases(draw, random_config(draw, 1), dtype, 1)
            if not case.integers and not case.bias and case.layer in kinds]


@every_dtype
def test_products_in_drawn_orders_are_within_budget_and_take_their_share_of_it(dtype: str) -> None:
    """No fitted constant is in this budget: theory alone, and a fifth of it is not used by any order."""
    worst = []
    for seed in range(6):
        for case in real_cases(dtype, seed):
            problem = LayerProblem(case)
            part = problem.part(alone())
            with DrawnOrders(seed):
                found = F.linear(part.given, problem.weights[0])
            worst.append(rounding(found, part.exact, part.variance).error_over_budget)
    assert 0.5 < max(worst) < 0.8


@settings(deadline=None, max_examples=60)
@given(num_addends=st.integers(1, 70), seed=st.integers(0, 2**31), dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
       with_addend=st.booleans())
def test_a_product_in_any_order_is_that_product(num_addends: int, seed: int, dtype: str, with_addend: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in ((5, num_addends), (num_addends, 7), (7,)))
    order = Order.draw(random.Random(seed), num_addends)
    found = product(a, b, order, c if with_addend else None)
    added = c.double() * with_addend
    exact = a.double() @ b.double() + added
    squares = a.double().square() @ b.double().square() + added.square()
    assert found.dtype == DTYPES[dtype]
    assert rounding(found, exact, sum_variance(squares, exact, dtype, addends=num_addends + with_addend)).ok


def test_orders_round_differently_and_each_is_what_it_says() -> None:
    """2**24 + 1 is 2**24 in float32: which sums survive tells the order."""
    a = torch.tensor([[2.0**24, 1.0, 1.0, 1.0]])
    ones = torch.ones(4, 1)
    assert product(a, ones, SEQUENTIAL).item() == 2.0**24
    assert product(a, ones, replace(SEQUENTIAL, lanes=4, pairwise=True)).item() == 2.0**24 + 2
    assert product(a, ones, replace(SEQUENTIAL, lanes=2)).item() == 2.0**24 + 2
    assert product(a[:, :2], ones[:2], SEQUENTIAL, torch.tensor([3.0])).item() == 2.0**24 + 4
    assert product(a[:, :2], ones[:2], replace(SEQUENTIAL, addend_first=True), torch.tensor([3.0])).item() == 2.0**24 + 4
    # x * x rounds to 1 + 2**-11; what it loses is there if multiply and add round once.
    x = torch.tensor([[1 + 2.0**-12, 1 + 2.0**-11]])
    b = torch.tensor([[1 + 2.0**-12], [-1.0]])
    assert product(x.flip(1), b.flip(0), SEQUENTIAL).item() == 0
    assert product(x.flip(1), b.flip(0), replace(SEQUENTIAL, fused=True)).item() == 2.0**-24
    cancelling = torch.tensor([[2.0**24, 1.0, -(2.0**24), 1.0]])
    permuted = {product(cancelling, ones, replace(SEQUENTIAL, permuted=True, seed=seed)).item() for seed in range(20)}
    assert len(permuted) > 1


@pytest.mark.parametrize("inference", [False, True])
def test_every_product_of_a_layer_is_summed_in_a_drawn_order(inference: bool) -> None:
    x_TI, weight_OI, bias_O = torch.randn(9, 300), torch.randn(20, 300), torch.randn(20)
    plain = F.linear(x_TI, weight_OI, bias_O), weight_OI @ x_TI.T, x_TI[None] @ weight_OI.T[None]
    with torch.inference_mode(inference), DrawnOrders(3) as orders:
        drawn = F.linear(x_TI, weight_OI, bias_O), weight_OI @ x_TI.T, x_TI[None] @ weight_OI.T[None]
    assert orders.number == 3
    for found, usual in zip(drawn, plain, strict=True):
        assert not torch.equal(found, usual)
        torch.testing.assert_close(found, usual, rtol=1e-3, atol=1e-3)


@every_dtype
def test_a_part_that_is_a_little_too_large_is_seen(dtype: str) -> None:
    """Of a layer with 2,000 outputs, by four roundoffs; by a quarter of one it is not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((16, 128), (128, 128)))
    parts = [x[:, :64] @ weight[:, :64].T, x[:, 64:] @ weight[:, 64:].T]
    exact = parts[0] + parts[1]
    variance = sum_variance(x.square() @ weight.square().T, exact, dtype, addends=128, parts=2)
    u = torch.finfo(DTYPES[dtype]).eps / 2
    shares = {share: rounding((exact + share * u * parts[0]).to(DTYPES[dtype]), exact, variance).ok for share in (0.25, 32.0)}
    assert shares == {0.25: True, 32.0: False}


@pytest.mark.parametrize("parts", [1, 8])
def test_float16_sums_may_be_subnormal_but_not_flushed_to_zero(parts: int) -> None:
    """Below 6.1e-5 float16 keeps a step of 6e-8 and no longer 11 bits; each rank's part rounds to it, their sum does not."""
    generator = torch.Generator().manual_seed(0)
    products = torch.randn((parts, 20, 30), generator=generator).mul(1e-6).double()
    exact = products.sum(0)
    variance = sum_variance(products.square().sum(0), exact, "float16", addends=parts, parts=parts)
    found = products.half().sum(0)
    assert not torch.equal(found.double(), exact)
    assert rounding(found, exact, variance).ok
    assert not rounding(torch.zeros_like(found), exact, variance).ok


def test_one_wrong_element_one_wrong_row_and_a_little_everywhere_are_told_apart() -> None:
    exact, variance = torch.randn(30, 40, dtype=torch.float64), torch.full((30, 40), 1e-12, dtype=torch.float64)
    found = exact.clone()
    assert rounding(found, exact, variance).error_over_budget == 0
    found[7, 3] += 8e-6
    assert rounding(found, exact, variance).row == 7
    assert rounding(found, exact, variance).error_over_budget > 1
    found = exact.clone()
    found[9] += 2.5e-6
    assert rounding(found, exact, variance).row == 9
    assert rounding(found, exact, variance).error_over_budget > 1
    off = exact + 1.3e-6
    assert rounding(off, exact, variance).row == -1
    assert rounding(off, exact, variance).error_over_budget > 1
    assert rounding(exact + 1.0e-6, exact, variance).ok


def test_elements_that_share_an_error_count_as_one() -> None:
    """A row that is off by two standard deviations throughout is improbable, unless it is one draw."""
    exact, variance = torch.zeros(1, 50, dtype=torch.float64), torch.ones(1, 50, dtype=torch.float64)
    off = exact + 2.0
    assert not rounding(off, exact, variance).ok
    assert rounding(off, exact, variance, shared=True).ok


def test_an_error_where_nothing_may_round_nan_and_another_shape_are_never_within_budget() -> None:
    exact, nothing = torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    assert rounding(exact.float(), exact, nothing).ok
    assert rounding(exact + 1e-9, exact, nothing).error_over_budget == math.inf
    broken = exact.clone()
    broken[2, 1] = math.nan
    found = rounding(broken, exact, torch.ones_like(exact))
    assert found.error_over_budget == math.inf
    assert found.row == 2
    with pytest.raises(ValueError, match=r"candidate=\(2, 4\) and exact=\(3, 4\) must have one shape"):
        rounding(exact[:2], exact, nothing)
    assert rounding(exact[:0], exact[:0], nothing[:0]).compared == 0


@every_dtype
def test_correct_rounding_errors_exceed_a_budget_as_rarely_as_they_should(dtype: str) -> None:
    """The chance is a bound: of 4,000 tensors of the model's own errors, the largest the budget knows, none is beyond."""
    generator = torch.Generator().manual_seed(1)
    exact, variance = torch.zeros(4, 6, dtype=torch.float64), torch.ones(4, 6, dtype=torch.float64)
    worst = max(rounding(torch.randn(4, 6, generator=generator, dtype=torch.float64), exact, variance).error_over_budget
                for _ in range(4000))
    assert 0.5 < worst < 1


@pytest.mark.parametrize("inference", [False, True])
def test_simulated_rounding_is_as_large_as_theory_says_and_touches_nothing_else(inference: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 64), (50, 64), (50,)))
    exact = F.linear(x, weight, bias)
    with torch.inference_mode(inference), SimulatedRounding("bfloat16", seed=0):
        found, single, sums, shifted = F.linear(x, weight, bias), x.float() @ weight.float().T, x + x, x + 1.0
    variance = sum_variance(x.square() @ weight.square().T + bias.square(), exact, "bfloat16", addends=65)
    assert 0.9 < ((found - exact).square() / variance).mean() < 1.1
    assert torch.equal(single, x.float() @ weight.float().T)
    assert torch.equal(shifted, x + 1.0)
    with SimulatedRounding("bfloat16", seed=0):
        masked = x + torch.full_like(x, -math.inf)
    assert torch.equal(masked, torch.full_like(x, -math.inf))
    assert 0.9 < (((sums - 2 * x) / (2 * x)).square() / (2.0**-16 / 3)).mean() < 1.1
    with SimulatedRounding("bfloat16", seed=0):
        again = F.linear(x, weight, bias)
    with SimulatedRounding("bfloat16", seed=1):
        other = F.linear(x, weight, bias)
    assert torch.equal(again, found)
    assert not torch.equal(other, found)


def test_simulated_rounding_knows_attention_that_is_made_of_products_and_a_mask() -> None:
    """As torch computes it in float64 on a GPU."""
    models = drawn_models(random.Random(3), "judge", 1, ("bfloat16",))
    results = next(models)
    with sdpa_kernel(SDPBackend.MATH):
        simulated = torch.cat(results.simulated_logits, 1)
    exact = torch.cat(results.exact_logits)
    ratios = [((draw - exact).square().mean() / (torch.cat(results.baseline_logits).double() - exact).square().mean()).sqrt()
              for draw in simulated]
    assert len(simulated) == 8
    assert all(0.4 < ratio < 4 for ratio in ratios), "as far off as the model in that dtype, about"

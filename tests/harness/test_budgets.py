"""Each class of tolerance sees what is planted, and lets pass what is only rounded in another order.

Shape suffixes: T = rows, I = input features, O = output features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.verification.budgets import (
    FEWEST_FOR_TYPICAL,
    UNIT_ROUNDOFF,
    computation,
    constants,
    measure,
    near_tie_margins,
    reduction,
    row_errors,
    same_bits,
)
from reference.hf import DTYPES

NUM_RANKS, T, I, O = 4, 32, 64, 24  # noqa: E741 - shape letters

every_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])


@dataclass(frozen=True)
class Problem:
    """A row-parallel layer: ``parts`` are what each rank adds."""

    dtype: str
    parts: list[Tensor]
    baseline: Tensor
    exact: Tensor
    bias: Tensor

    @property
    def unit(self) -> Tensor:
        """One roundoff of the scale."""
        return UNIT_ROUNDOFF[self.dtype] * self.exact.square().mean().sqrt()

    @property
    def candidate(self) -> Tensor:
        return torch.stack([part.float() for part in self.parts]).sum(0).to(DTYPES[self.dtype]) + self.bias

    def ratio(self, candidate: Tensor) -> float:
        return computation(candidate, self.baseline, self.exact, self.dtype).error_over_budget


def problem(dtype: str, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x_TI, weight_OI, bias_O = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in ((T, I), (O, I), (O,)))
    parts = [F.linear(x, weight) for x, weight in zip(x_TI.chunk(NUM_RANKS, 1), weight_OI.chunk(NUM_RANKS, 1), strict=True)]
    return Problem(dtype=dtype, parts=parts, baseline=F.linear(x_TI, weight_OI, bias_O), bias=bias_O,
                   exact=F.linear(x_TI.double(), weight_OI.double(), bias_O.double()))


def test_movement_is_bit_for_bit() -> None:
    x = torch.tensor([0.0, float("nan"), 3.0])
    assert same_bits(x, x.clone())
    assert not same_bits(x, torch.tensor([-0.0, float("nan"), 3.0]))
    assert not same_bits(x, x.double())
    assert not same_bits(x, x.reshape(1, 3))


@every_dtype
def test_a_sum_in_any_order_is_within_the_bound_of_reduction(dtype: str) -> None:
    parts = problem(dtype).parts
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = parts[order[0]]
        for rank in order[1:]:
            total = total + parts[rank]
        found = reduction(total, parts, dtype)
        assert found.ok
        assert found.compared == T * O


@every_dtype
def test_a_sum_that_lacks_a_part_has_it_twice_or_holds_nan_is_not(dtype: str) -> None:
    parts = problem(dtype).parts
    total = torch.stack([part.float() for part in parts]).sum(0).to(DTYPES[dtype])
    assert not reduction(total - parts[2], parts, dtype).ok
    assert not reduction(total + parts[2], parts, dtype).ok
    total[3, 5] = float("nan")
    found = reduction(total, parts, dtype)
    assert found.error_over_budget == math.inf


def test_a_sum_of_nothing_compares_nothing() -> None:
    empty = [torch.zeros(0, 7), torch.zeros(0, 7)]
    assert reduction(empty[0], empty, "float32").compared == 0


@every_dtype
@pytest.mark.parametrize("seed", range(5))
def test_what_is_off_as_far_as_its_baseline_is_within_budget(dtype: str, seed: int) -> None:
    clean = problem(dtype, seed)
    other = clean.exact - (clean.baseline.double() - clean.exact).flip(0)
    assert 0 < clean.ratio(other) <= 1


@every_dtype
def test_a_lost_part_a_part_summed_twice_and_a_bias_of_every_rank_are_not(dtype: str) -> None:
    clean = problem(dtype)
    assert clean.ratio(clean.candidate - clean.parts[1]) > 1
    assert clean.ratio(clean.candidate + clean.parts[1]) > 1
    assert clean.ratio(clean.candidate + (NUM_RANKS - 1) * clean.bias) > 1


@every_dtype
def test_nan_and_infinity_are_never_within_budget(dtype: str) -> None:
    clean = problem(dtype)
    for value in (float("nan"), float("inf")):
        candidate = clean.candidate
        candidate[7, 2] = value
        found = computation(candidate, clean.baseline, clean.exact, dtype)
        assert found.error_over_budget == math.inf
        assert found.row == 7


def test_a_baseline_of_nan_allows_nothing() -> None:
    clean = problem("float32")
    clean.baseline[0, 0] = float("nan")
    assert clean.ratio(clean.candidate) == math.inf


def test_a_tensor_without_rows_compares_nothing_and_is_no_finding() -> None:
    nothing = torch.zeros(0, 5)
    found = computation(nothing, nothing, nothing.double(), "float32")
    assert found.ok
    assert found.compared == 0


@every_dtype
def test_one_bad_row_among_good_ones_is_seen_and_named(dtype: str) -> None:
    clean = problem(dtype)
    candidate = clean.candidate
    candidate[19] = candidate[18]
    found = computation(candidate, clean.baseline, clean.exact, dtype)
    assert not found.ok
    assert found.row == 19
    assert found.where == "row 19"
    assert (row_errors(candidate, clean.baseline, clean.exact, dtype) > 1).nonzero().flatten().tolist() == [19]


def test_a_reference_that_is_exact_by_chance_does_not_forbid_to_round() -> None:
    """Where the fit leaves a floor, roundoff is the measure."""
    exact = problem("bfloat16").exact
    floor = constants("row", "bfloat16").c
    unit = UNIT_ROUNDOFF["bfloat16"] * exact.square().mean().sqrt()
    assert not computation(exact + 64 * unit, exact, exact, "bfloat16").ok
    assert (row_errors(exact + 0.9 * floor * unit, exact, exact, "bfloat16") > 1).any() == (floor == 0)


@every_dtype
def test_what_is_off_by_a_little_everywhere_shows_in_the_median_row(dtype: str) -> None:
    """A tenth of the largest error of one row, in all of them."""
    clean = problem(dtype)
    typical, (_, own) = constants("typical", dtype), measure(clean.candidate, clean.baseline, clean.exact, dtype)["typical"]
    off = clean.exact + 1.5 * (typical.c + typical.k * own) * clean.unit
    loose = clean.baseline.double().clone()
    loose[0] += 1000 * clean.unit  # one row so bad that worst rows may be as bad
    found = computation(off, loose, clean.exact, dtype)
    assert found.error_over_budget > 1
    assert found.row == -1
    assert found.where == "all rows together"


def test_of_few_values_the_median_is_not_judged() -> None:
    exact = torch.ones(FEWEST_FOR_TYPICAL - 1, 1, dtype=torch.float64)
    u = UNIT_ROUNDOFF["float32"]
    off, loose = exact + 1.5 * 8 * u, exact.clone()
    loose[0] += 1000 * u
    assert computation(off, loose, exact, "float32").ok
    more = torch.ones(FEWEST_FOR_TYPICAL, 1, dtype=torch.float64)
    loose = more.clone()
    loose[0] += 1000 * u
    assert not computation(more + 1.5 * 8 * u, loose, more, "float32").ok


def test_a_row_may_be_as_far_off_as_simulated_rounding_says_that_it_is_magnified_and_no_other_row() -> None:
    torch.manual_seed(0)
    exact = torch.randn(T, O, dtype=torch.float64)
    noise = torch.randn(6, T, O, dtype=torch.float64)
    u = UNIT_ROUNDOFF["bfloat16"]
    magnified = torch.ones(T, 1, dtype=torch.float64)
    magnified[5] = 100
    baseline, simulated = exact + u * noise[0], list(exact + u * magnified * noise[1:5])
    candidate = exact + u * magnified * noise[5]
    assert not computation(candidate, baseline, exact, "bfloat16").ok
    assert computation(candidate, baseline, exact, "bfloat16", simulated).ok
    swapped = candidate.clone()
    swapped[[5, 6]] = exact[[5, 6]] + u * magnified[[6, 5]] * noise[5][[5, 6]]
    found = computation(swapped, baseline, exact, "bfloat16", simulated)
    assert not found.ok
    assert found.row == 6


def test_a_row_on_which_the_baseline_was_lucky_is_no_finding_and_a_wrong_one_is() -> None:
    torch.manual_seed(0)
    exact = torch.randn(T, O, dtype=torch.float64)
    noise = torch.randn(6, T, O, dtype=torch.float64)
    u = UNIT_ROUNDOFF["bfloat16"]
    baseline, candidate, simulated = exact + 10 * u * noise[0], exact + 10 * u * noise[1], list(exact + 10 * u * noise[2:])
    baseline[3] = exact[3]
    assert computation(candidate, baseline, exact, "bfloat16", simulated).ok
    candidate[3] += 60 * u * noise[0, 3]
    found = computation(candidate, baseline, exact, "bfloat16", simulated)
    assert not found.ok
    assert found.row == 3


def test_a_near_tie_is_what_two_errors_within_budget_can_turn_round() -> None:
    torch.manual_seed(0)
    exact = torch.randn(3, 50, dtype=torch.float64)
    rms, reach = exact.square().mean().sqrt(), math.sqrt(2 * math.log(50))
    unit = UNIT_ROUNDOFF["bfloat16"] * rms * reach
    allowed = constants("element", "bfloat16")
    assert torch.equal(near_tie_margins(exact, exact, "bfloat16"), (2 * allowed.c * unit).expand(3))
    # A reference that is far off allows more, in proportion: of the baseline any row, of simulated rounding that row.
    off = exact + 100 * unit
    assert torch.allclose(near_tie_margins(off, exact, "bfloat16"), 2 * allowed.k * 100 * unit)
    one = exact.clone()
    one[1] = off[1]
    expected = torch.tensor([allowed.c, max(allowed.c, allowed.k * 100), allowed.c], dtype=torch.float64)
    assert torch.allclose(near_tie_margins(exact, exact, "bfloat16", [one, one]), 2 * expected * unit)

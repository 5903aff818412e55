"""The three classes of tolerance, and the only place that has numbers for them.

*Movement* (loading, gathering, looking up, writing to a cache) is bit-exact. *Reduction* is exact on integers that the dtype
can add exactly, and bounded by rounding otherwise. *Computation* is measured: a candidate may be so many times worse than
the unsharded baseline of the same dtype, both against the exact reference, with a floor in units of rounding for a lucky
baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
"""Half the distance from 1 to the next number, the most that one rounding can be off, relatively."""

EXACT_INTEGER_LIMIT = {"bfloat16": 2**8, "float16": 2**11, "float32": 2**24, "float64": 2**53}
"""Integers up to this in magnitude are exact in the dtype, so sums that stay within it are exact in any order."""

BASELINE_FACTOR = 8.0
"""k: how many times the baseline's error a candidate's may be. Correct code is heavy-tailed: on ill-conditioned tokens of a
real model (bfloat16, ranks 1 to 4, three sequences a seed) the worst seen was 4.2, the median 0.8."""

ROUNDOFF_FACTOR = 8.0
"""c: the floor of the budget, in units of roundoff times the scale of the values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came of holding a candidate against its budget."""

    error_over_budget: float
    """The worst error as a fraction of its budget; above 1 is a finding; infinite for NaN."""
    compared: int
    """Values compared."""
    row: int = -1
    """The worst row."""

    @property
    def ok(self) -> bool:
        return self.error_over_budget <= 1


def same_bits(candidate: Tensor, expected: Tensor) -> bool:
    """Movement: whether two tensors agree in dtype, shape and every bit."""
    return (candidate.dtype == expected.dtype and candidate.shape == expected.shape
            and torch.equal(bits(candidate), bits(expected)))


def bits(x: Tensor) -> Tensor:
    """The bit patterns of ``x`` as integers of its width, so that NaN equals NaN and -0 differs from 0."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer)


def reduction(candidate: Tensor, parts: list[Tensor], dtype: str) -> Comparison:
    """Reduction of real values: ``|candidate - sum(parts)| <= (p - 1) u sum(|part|)``, element by element.

    Each of the p - 1 additions rounds once, to the dtype, a partial sum that is never above ``sum(|part|)`` (Higham 2002,
    section 4.2, to first order).
    """
    exact = torch.stack([part.double() for part in parts]).sum(dim=0)
    scale = torch.stack([part.double().abs() for part in parts]).sum(dim=0)
    # One more rounding where the parts were summed in a wider type and rounded at the end.
    budget = max(1, len(parts) - 1) * UNIT_ROUNDOFF[dtype] * scale
    return _worst((candidate.double() - exact).abs().reshape(1, -1), budget.reshape(1, -1))


def computation(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str) -> Comparison:
    """Computation: rows of a candidate against ``max(k * baseline error, c * u * scale)``.

    ``[T, F]`` each. Two errors are judged: a row's root mean square, sharp when a whole row is off by a little, and its
    largest element, sharp when one element is off by a lot. The baseline's error is its worst row's; the scale is the exact
    values' root mean square (times the reach of a maximum over F values, for the largest element).
    """
    ratio_T = row_errors(candidate, baseline, exact, dtype)
    if not ratio_T.numel():
        return Comparison(error_over_budget=0.0, compared=0)
    row = int(ratio_T.argmax())
    return Comparison(error_over_budget=ratio_T[row].item(), compared=candidate.numel(), row=row)


def row_errors(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str) -> Tensor:
    """``[T]``: the error of each row as a fraction of its budget, by the rule of :func:`computation`."""
    exact, error, own = exact.double(), candidate.double() - exact.double(), baseline.double() - exact.double()
    if not exact.numel():
        return exact.new_zeros(len(exact))
    scale = _rms(exact.reshape(1, -1))
    floor = ROUNDOFF_FACTOR * UNIT_ROUNDOFF[dtype] * scale
    reach = math.sqrt(2 * math.log(max(2, exact.shape[-1])))  # of the largest of F normal values, in standard deviations
    by_rms = _ratio(_rms(error), torch.clamp(BASELINE_FACTOR * _rms(own).max(), min=floor.item()))
    by_max = _ratio(error.abs().amax(-1), torch.clamp(BASELINE_FACTOR * own.abs().max(), min=floor.item() * reach))
    return torch.maximum(by_rms, by_max)


def near_tie_margin(baseline: Tensor, exact: Tensor, dtype: str) -> float:
    """The largest top-2 margin of the exact logits ``[T, V]`` that rounding may turn round: twice the logits' budget."""
    exact = exact.double()
    own = (baseline.double() - exact).abs().max().item()
    reach = math.sqrt(2 * math.log(max(2, exact.shape[-1])))
    floor = ROUNDOFF_FACTOR * UNIT_ROUNDOFF[dtype] * _rms(exact.reshape(1, -1)).item() * reach
    return 2 * max(BASELINE_FACTOR * own, floor)


def too_many_flips(candidate_flips: int, candidate_total: int, baseline_flips: int, baseline_total: int) -> bool:
    """Whether near-ties turn round more than twice as often as in the baseline, beyond chance.

    One-sided exact binomial test at 1 in 1,000 against twice the baseline's rate, that rate estimated as (flips + 1) /
    (total + 1) so that a baseline without flips does not forbid the first one.
    """
    rate = min(1.0, 2 * (baseline_flips + 1) / (baseline_total + 1))
    fewer = sum(math.comb(candidate_total, i) * rate**i * (1 - rate) ** (candidate_total - i) for i in range(candidate_flips))
    return 1 - fewer < 1e-3


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1).sqrt()


def _worst(error: Tensor, budget: Tensor) -> Comparison:
    ratio = _ratio(error, budget)
    if not ratio.numel():
        return Comparison(error_over_budget=0.0, compared=0)
    index = int(ratio.argmax())
    return Comparison(error_over_budget=ratio.flatten()[index].item(), compared=ratio.numel(), row=index)


def _ratio(error: Tensor, budget: Tensor) -> Tensor:
    """Errors as fractions of their budgets; infinite for NaN, and for any error where there is no budget."""
    ratio = torch.where(error == 0, 0.0, error / budget)
    return torch.where(torch.isfinite(ratio), ratio, math.inf)

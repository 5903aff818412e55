"""The three classes of tolerance, and the only place that has numbers for them.

*Movement* (loading, gathering, looking up, writing to a cache) is bit-exact. *Reduction* is exact on integers that the dtype
can add exactly, and bounded by rounding otherwise. *Computation* is measured: a candidate may be so many times worse than
the unsharded baseline of the same dtype, both against the exact reference, with a floor in units of rounding for a lucky
baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
"""Half the distance from 1 to the next number, the most that one rounding can be off, relatively."""

EXACT_INTEGER_LIMIT = {"bfloat16": 2**8, "float16": 2**11, "float32": 2**24, "float64": 2**53}
"""Integers up to this in magnitude are exact in the dtype, so sums that stay within it are exact in any order."""

Statistic = Literal["typical", "row", "element"]
"""Three ways to say in one number how far a tensor ``[T, F]`` is off, each with a budget of its own: the median over the rows
of their root mean squares, sharp when much is off by a little; the worst row's, sharp when a row is; the worst element."""

BASELINE_FACTOR: dict[Statistic, float] = {"typical": 8.0, "row": 8.0, "element": 8.0}
"""k: how many times the baseline's error a candidate's may be, by statistic."""

ROUNDOFF_FACTOR: dict[Statistic, float] = {"typical": 8.0, "row": 8.0, "element": 8.0}
"""c: the floor of the budget, in units of roundoff times the scale of the values. For when the baseline was lucky."""

FEWEST_FOR_TYPICAL = 64
"""Of fewer values the baseline's median is a matter of luck: the other two statistics judge those alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came of holding a candidate against its budget."""

    error_over_budget: float
    """The worst error as a fraction of its budget; above 1 is a finding; infinite for NaN."""
    compared: int
    """Values compared."""
    row: int = -1
    """The worst row; -1 if no single one is over budget, but their median."""

    @property
    def ok(self) -> bool:
        return self.error_over_budget <= 1

    @property
    def where(self) -> str:
        """What is off the most: a row, or none by itself."""
        return "the median row" if self.row < 0 else f"row {self.row}"


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


def computation(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str, scale: Tensor | None = None) -> Comparison:
    """Computation: a candidate ``[T, F]`` against ``max(k * baseline error, c * u * scale)``, by all three statistics.

    Args:
        scale: ``[T, F]``, of what was summed, ``|x| @ |W|.T + |b|`` for a layer: errors are measured in units of it. By default
            the exact values' root mean square, times the reach of a maximum over F values for the largest element.
    """
    ratio_T = row_errors(candidate, baseline, exact, dtype, scale)
    if not ratio_T.numel():
        return Comparison(error_over_budget=0.0, compared=0)
    row = int(ratio_T.argmax())
    worst, typical = ratio_T[row].item(), typical_error(candidate, baseline, exact, dtype, scale)
    if typical > max(1.0, worst):
        return Comparison(error_over_budget=typical, compared=candidate.numel())
    return Comparison(error_over_budget=max(worst, typical), compared=candidate.numel(), row=row)


def row_errors(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str, scale: Tensor | None = None) -> Tensor:
    """``[T]``: how far each row is off, by root mean square and by largest element, as a fraction of its budget.

    The baseline's error is its worst row's.
    """
    if not exact.numel():
        return exact.new_zeros(len(exact), dtype=torch.float64)
    error, own = row_sizes(candidate, exact, dtype, scale), row_sizes(baseline, exact, dtype, scale)
    return torch.maximum(_over_budget(error["row"], own["row"].max(), "row"),
                         _over_budget(error["element"], own["element"].max(), "element"))


def typical_error(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str, scale: Tensor | None = None) -> float:
    """How far the median row is off, by root mean square, as a fraction of its budget; 0 for a tensor too small for that.

    A few ill-conditioned rows make the worst row's error heavy-tailed, and its budget wide. The median has a narrow one: it
    sees what is off by a little in most rows.
    """
    if exact.numel() < FEWEST_FOR_TYPICAL:
        return 0.0
    error, own = row_sizes(candidate, exact, dtype, scale)["row"], row_sizes(baseline, exact, dtype, scale)["row"]
    return _over_budget(error.median(), own.median(), "typical").item()  # NaN where a row has NaN


def row_sizes(values: Tensor, exact: Tensor, dtype: str, scale: Tensor | None = None) -> dict[Literal["row", "element"], Tensor]:
    """``[T]`` each: the error of every row, root mean square and largest element, in units of roundoff times scale."""
    exact = exact.double()
    error = (values.double() - exact).abs()
    if scale is None:
        unit = UNIT_ROUNDOFF[dtype] * _rms(exact.reshape(1, -1))
        reach = math.sqrt(2 * math.log(max(2, exact.shape[-1])))  # of the largest of F normal values, in standard deviations
        return {"row": _ratio(_rms(error), unit), "element": _ratio(error.amax(-1), unit * reach)}
    error = _ratio(error, UNIT_ROUNDOFF[dtype] * scale.double())
    return {"row": _rms(error), "element": error.amax(-1)}


def near_tie_margin(baseline: Tensor, exact: Tensor, dtype: str) -> float:
    """The largest top-2 margin of the exact logits ``[T, V]`` that rounding may turn round: twice the logits' budget."""
    exact = exact.double()
    own = (baseline.double() - exact).abs().max().item()
    reach = math.sqrt(2 * math.log(max(2, exact.shape[-1])))
    floor = ROUNDOFF_FACTOR["element"] * UNIT_ROUNDOFF[dtype] * _rms(exact.reshape(1, -1)).item() * reach
    return 2 * max(BASELINE_FACTOR["element"] * own, floor)


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


def _over_budget(error: Tensor, own: Tensor, statistic: Statistic) -> Tensor:
    """Errors as fractions of the budget that the baseline's ``own`` error gives them; all in units of roundoff times scale."""
    budget = torch.clamp(BASELINE_FACTOR[statistic] * own, min=ROUNDOFF_FACTOR[statistic])
    return _ratio(error, torch.where(torch.isfinite(own), budget, 0.0))  # a baseline of NaN allows nothing


def _worst(error: Tensor, budget: Tensor) -> Comparison:
    ratio = _ratio(error, budget)
    if not ratio.numel():
        return Comparison(error_over_budget=0.0, compared=0)
    index = int(ratio.argmax())
    return Comparison(error_over_budget=ratio.flatten()[index].item(), compared=ratio.numel(), row=index)


def _ratio(error: Tensor, budget: Tensor) -> Tensor:
    """Infinite for NaN; 0 for no error, whatever the budget."""
    ratio = torch.where(error == 0, 0.0, error / budget)
    return torch.where(torch.isfinite(ratio), ratio, math.inf)

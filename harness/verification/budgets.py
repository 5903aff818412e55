"""The three classes of tolerance, and the only place that has numbers for them.

*Movement* (loading, gathering, looking up, writing to a cache) is bit-exact. *Reduction* is exact on integers that the dtype
can add exactly, and bounded by rounding otherwise. *Computation* has two forms. A single operation (a layer, attention, a
rotation) is held against the variance that rounding gives a sum in any order (``rounding``): nothing in it is measured. A
whole model is measured (``computation``): ``error <= max(k * reference error, c * u * scale)``, the reference error being that
of the unsharded baseline of the same dtype or of simulated rounding, whichever is larger; all against the exact reference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
"""Half the distance from 1 to the next number, the most that one rounding can be off, relatively."""

LARGEST_UNDERFLOW = {"bfloat16": 2.0**-134, "float16": 2.0**-25, "float32": 2.0**-150, "float64": 0.0}
"""Half the distance between subnormal numbers, the most that one rounding can be off below the normal ones, whatever the value.
That of float64 is itself below the smallest float64."""

EXACT_INTEGER_LIMIT = {"bfloat16": 2**8, "float16": 2**11, "float32": 2**24, "float64": 2**53}
"""Integers up to this in magnitude are exact in the dtype, so sums that stay within it are exact in any order."""

Statistic = Literal["typical", "row", "element"]
"""Three ways to say in one number how far a tensor ``[T, F]`` is off, each with a budget of its own: the median over the rows
of their root mean squares, sharp when much is off by a little; the worst row's, sharp when a row is; the worst element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """``budget = max(k * reference error, c)``, errors in units of roundoff times scale; c is for references exact by chance."""

    k: float
    c: float


WIDE, NARROW = "float32, float64", "bfloat16, float16"
CONSTANTS: dict[str, dict[Statistic, Constants]] = {
    WIDE: {"typical": Constants(k=1.5, c=7.25), "row": Constants(k=4.5, c=0.0), "element": Constants(k=4.5, c=0.0)},
    NARROW: {"typical": Constants(k=1.75, c=0.0), "row": Constants(k=4.0, c=6.75), "element": Constants(k=3.5, c=7.25)},
}
"""What ``computation`` allows, by precision and statistic.

They are the fit in the committed record of ``shardproof calibrate``: the pairs with the narrowest budgets that are twice as large
as every error of correct code that was sampled, half of it with sums in drawn orders. Where sums are in float32 and so is the
result, their order is all that the error is; 16-bit results are rounded far more coarsely than their sums. Not to be changed by
hand.
"""


def constants(statistic: Statistic, dtype: str) -> Constants:
    """Of this statistic for this dtype."""
    return CONSTANTS[precision(dtype)][statistic]


def precision(dtype: str) -> str:
    """Which class of dtypes it belongs to: those of one class have constants in common."""
    return NARROW if dtype in NARROW else WIDE


VERDICT_LIMITS: dict[str, dict[str, float]] = {
    "reference": {"size": 1.6, "peak": 3.0, "shift": 0.25, "where": 1.2, "side": 0.8},
    "noise": {"size": 4.0, "peak": 8.0, "shift": 0.25, "where": 1.2, "side": 0.8},
    "dtype": {"size": 26.0, "peak": 9.0, "shift": 0.25, "where": 1.2, "side": 0.8},
}
"""What the tests of ``harness.verdict.statistics`` allow, by yardstick and test: about twice what correct code was seen to take,
on 160 models like those of ``python -m harness.studies.scoreboard``, which judges them on others."""
VERDICT_TYPICAL = {"reference": 1.2, "noise": 2.0, "dtype": 6.0}
"""By yardstick: up to this size differences are called rounding; from here to the limit nobody can tell."""
VERDICT_CHANCE = 1e-4
"""Chance with which a shift, or a part that stands out, is no more than luck, all parts that were looked at together."""

SEARCH_MARGIN = 2.0
"""How many budgets off a tensor must be for a search through all tensors of a model to stop at it.

k and c are fitted to what the checks compare; among the hundreds of tensors inside a correct model some are beyond by a little:
``pytest -m endurance tests/harness/test_localise.py`` counts them. It decides what is named, not whether anything is found.
"""

CHANCE = 1e-6
"""Chance with which correct code exceeds the budget of one tensor, for each of the three statistics of ``rounding``."""

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
    """The worst row; -1 if no single one is over budget, but all of them together."""

    @property
    def ok(self) -> bool:
        return self.error_over_budget <= 1

    @property
    def where(self) -> str:
        """What is off the most: a row, or none by itself."""
        return "all rows together" if self.row < 0 else f"row {self.row}"


def same_bits(candidate: Tensor, expected: Tensor) -> bool:
    """Movement: whether two tensors agree in dtype, shape and every bit."""
    return (candidate.dtype == expected.dtype and candidate.shape == expected.shape
            and torch.equal(bits(candidate), bits(expected)))


def bits(x: Tensor) -> Tensor:
    """The bit patterns of ``x`` as integers of its width, so that NaN equals NaN and -0 differs from 0."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer)


def digest(tensors: Sequence[Tensor]) -> bytes:
    """Hash of shapes, dtypes and bits."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        total.update(bits(tensor.cpu()).numpy().tobytes())
    return total.digest()


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


def sum_variance(squares: Tensor, total: Tensor, dtype: str, *, addends: int, parts: int = 1) -> Tensor:
    """Variance of the rounding error of sums of products, whatever the order of summation.

    Correct is any order that does not look at the values: permuted, blocked, pairwise or sequential, with or without fused
    multiply-add. Rounding errors are modelled as independent, of mean zero and uniform up to ``u`` times the rounded value
    (Higham and Mary 2019, section 2), so each adds ``u**2 / 3`` times the square of a partial sum. In a random order the partial
    sum of m of n addends has the mean square ``squares * m (n - m) / (n (n - 1)) + total**2 * m (m - 1) / (n (n - 1))``. Over
    the n - 1 additions of the deepest order, the sequential one, that adds up to at most ``(squares + total**2) * (n + 1) / 3``:
    three quarters of it if one addend outweighs all others, 1.5 times as much if that one always comes first. Products round
    too::

        variance = u**2 / 3 * (1 + n / 3) * (squares + total**2)

    16-bit dtypes accumulate in float32, with n = ``addends``, and round n = ``parts`` partial sums to the dtype. Each may
    be subnormal, which ``underflow_variance`` allows for; where subnormal numbers are added up, nothing rounds.

    Args:
        squares: sum of the squares of the addends, ``x**2 @ (W**2).T + b**2`` for a layer; float64, as what follows.
        total: the exact sum.
        dtype: of the addends and of the result.
        addends: how many there are; of products, so many multiplications as well.
        parts: partial sums, one a rank, that are rounded to ``dtype`` before and while they are added up.
    """
    size = (squares + total.square()) / 3
    wide = dtype if dtype in ("float32", "float64") else "float32"
    variance = UNIT_ROUNDOFF[wide] ** 2 * (1 + addends / 3) * size
    if dtype == "float64":
        return 2 * variance  # the exact result is itself a sum in float64
    if dtype == wide:
        return variance
    return variance + UNIT_ROUNDOFF[dtype] ** 2 * (1 + parts / 3) * size + parts * underflow_variance(dtype)


def underflow_variance(dtype: str) -> float:
    """Variance of rounding one value to ``dtype`` where the result is subnormal, as float16 is below 6.1e-5.

    There it is off by up to ``LARGEST_UNDERFLOW``, however small it is, and not by a share of it.
    """
    return LARGEST_UNDERFLOW[dtype] ** 2 / 3


def rounding(candidate: Tensor, exact: Tensor, variance: Tensor, *, shared: bool = False) -> Comparison:
    """Computation by a single operation: errors ``[T, F]`` against the variance that rounding gives them.

    The mean square of n errors over their standard deviations is at most ``1 + 2 sqrt(L / n) + 2 L / n`` but for a chance of
    ``exp(-L)``, since bounded rounding errors are sub-Gaussian (Hsu, Kakade and Zhang 2012, theorem 2.1, for unit covariance).
    Three statistics: the largest element (n = 1), the worst row (n = F), all of it (n = T F); each has ``CHANCE`` for the tensor.

    Args:
        candidate: ``[T, F]`` in the dtype under test.
        exact: ``[T, F]`` float64.
        variance: ``[T, F]`` float64, of the error of each element; see ``sum_variance``.
        shared: the elements of a row share some of their error, such as the sum that a softmax divides by: a row then counts as
            one value in n, however many it has.
    """
    if candidate.shape != exact.shape:
        raise ValueError(f"candidate={tuple(candidate.shape)} and exact={tuple(exact.shape)} must have one shape")
    if not candidate.numel():
        return Comparison(error_over_budget=0.0, compared=0)
    square_TF = _ratio((candidate.double() - exact).square(), variance)
    num_rows, width = square_TF.shape
    own = 1 if shared else width
    ratio_T = torch.maximum(_beyond_chance(square_TF.amax(1), of=1, tests=num_rows * width),
                            _beyond_chance(square_TF.mean(1), of=own, tests=num_rows))
    row, whole = int(ratio_T.argmax()), _beyond_chance(square_TF.mean(), of=num_rows * own, tests=1).item()
    worst = ratio_T[row].item()
    return Comparison(error_over_budget=max(worst, whole), compared=candidate.numel(), row=-1 if whole > max(1.0, worst) else row)


def _beyond_chance(mean_square: Tensor, *, of: int, tests: int) -> Tensor:
    """Root mean squares as fractions of what ``tests`` such means of ``of`` values exceed with ``CHANCE``."""
    log = math.log(tests / CHANCE)
    return (mean_square / (1 + 2 * math.sqrt(log / of) + 2 * log / of)).sqrt()


def computation(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str, simulated: Sequence[Tensor] = ()) -> Comparison:
    """Computation by a whole model: ``[T, F]`` against ``max(k * reference error, c * u * scale)``, by all three statistics.

    The scale is the exact values' root mean square, times the reach of a maximum over F values for the largest element. The
    arguments are those of ``measure``.
    """
    sizes = measure(candidate, baseline, exact, dtype, simulated)
    ratios = {statistic: _over_budget(*sizes[statistic], constants(statistic, dtype)) for statistic in sizes}
    ratio_T = torch.maximum(ratios["row"], ratios["element"])
    if not ratio_T.numel():
        return Comparison(error_over_budget=0.0, compared=0)
    row = int(ratio_T.argmax())
    worst, typical = ratio_T[row].item(), ratios["typical"].item()
    if typical > max(1.0, worst):
        return Comparison(error_over_budget=typical, compared=candidate.numel())
    return Comparison(error_over_budget=max(worst, typical), compared=candidate.numel(), row=row)


def row_errors(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str, simulated: Sequence[Tensor] = ()) -> Tensor:
    """``[T]``: how far each row is off, by root mean square and by largest element, as a fraction of its budget."""
    sizes = measure(candidate, baseline, exact, dtype, simulated)
    return torch.maximum(_over_budget(*sizes["row"], constants("row", dtype)),
                         _over_budget(*sizes["element"], constants("element", dtype)))


def measure(candidate: Tensor, baseline: Tensor, exact: Tensor, dtype: str,
            simulated: Sequence[Tensor] = ()) -> dict[Statistic, tuple[Tensor, Tensor]]:
    """(the candidate's errors, the reference errors) by statistic, in units of roundoff times scale.

    ``[T]`` each for rows and their largest elements, a scalar for the median row, which is 0 where there are too few values.
    Reference error of row t: ``max(baseline_t, root mean square of simulated_t, rounded_t)``, the last one what comes of rounding
    the exact values; without ``simulated``, the largest of all rows, since one draw of rounding may be lucky on any.

    Args:
        candidate: ``[T, F]`` in the dtype under test.
        baseline: likewise, of the unsharded reference.
        exact: ``[T, F]`` float64.
        dtype: the one under test.
        simulated: ``[T, F]`` float64 each, exact but for simulated rounding (``harness.verification.simulated``).
    """
    if not exact.numel():
        nothing = exact.new_zeros(len(exact), dtype=torch.float64), exact.new_zeros(len(exact), dtype=torch.float64)
        return {"row": nothing, "element": nothing, "typical": (torch.tensor(0.0), torch.tensor(0.0))}
    error, own, least = (_row_sizes(values, exact, dtype) for values in (candidate, baseline, exact.to(getattr(torch, dtype))))
    own = {statistic: own[statistic].maximum(least[statistic]) for statistic in own}
    if simulated:
        draws = [_row_sizes(values, exact, dtype) for values in simulated]
        own = {statistic: own[statistic].maximum(_rms(torch.stack([draw[statistic] for draw in draws], -1))) for statistic in own}
    typical = error["row"].median(), own["row"].median()
    if not simulated:
        own = {statistic: own[statistic].max().expand_as(own[statistic]) for statistic in own}
    if exact.numel() < FEWEST_FOR_TYPICAL:
        typical = torch.zeros_like(typical[0]), typical[1]
    return {"typical": typical, "row": (error["row"], own["row"]), "element": (error["element"], own["element"])}


def _row_sizes(values: Tensor, exact: Tensor, dtype: str) -> dict[Literal["row", "element"], Tensor]:
    """``[T]`` each: the error of every row, root mean square and largest element, in units of roundoff times scale."""
    error, unit = (values.double() - exact.double()).abs(), _unit(exact, dtype)
    return {"row": _ratio(_rms(error), unit), "element": _ratio(error.amax(-1), unit * _reach(exact))}


def _unit(exact: Tensor, dtype: str) -> Tensor:
    """Roundoff times the root mean square of all values."""
    return UNIT_ROUNDOFF[dtype] * _rms(exact.double().reshape(1, -1))


def _reach(exact: Tensor) -> float:
    """Of the largest of F normal values, in standard deviations."""
    return math.sqrt(2 * math.log(max(2, exact.shape[-1])))


def near_tie_margins(baseline: Tensor, exact: Tensor, dtype: str, simulated: Sequence[Tensor] = ()) -> Tensor:
    """``[T]``: the largest top-2 margin of each row of exact logits that rounding may turn round: twice the row's budget."""
    _, own_T = measure(baseline, baseline, exact, dtype, simulated)["element"]
    unit = _unit(exact, dtype) * _reach(exact)
    allowed = constants("element", dtype)
    return 2 * torch.clamp(allowed.k * own_T, min=allowed.c) * unit


def too_many_flips(candidate_flips: int, candidate_total: int, baseline_flips: int, baseline_total: int) -> bool:
    """Whether near-ties turn round more than twice as often as in the baseline, beyond chance.

    One-sided exact binomial test at 1 in 1,000 against twice the baseline's rate, that rate estimated as (flips + 1) /
    (total + 1) so that a baseline without flips does not forbid the first one.
    """
    rate = min(1.0, 2 * (baseline_flips + 1) / (baseline_total + 1))
    fewer = sum(math.comb(candidate_total, i) * rate**i * (1 - rate) ** (candidate_total - i) for i in range(candidate_flips))
    return 1 - fewer < 1e-3


def batch_flips(dtype: str) -> int:
    """How many completions may differ between a batch and another one by rounding.

    Of some hundred drawn tokens, each with a chance of about 1e-6 in float32 that two candidates are so close, two differ with
    1e-8; in float64 one does with 1e-13.
    """
    return 0 if dtype == "float64" else 1


IMPROBABLE = 1e-9
"""Chance with which tokens that were drawn as they should be are called improbable."""


def improbability(baseline: Tensor, exact: Tensor, token_ids: list[int], *, temperature: float, top_p: float = 1.0) -> float:
    """How hard it is to believe that these tokens were drawn from logits ``[T, V]``, as a fraction of what can't be believed.

    A draw from p has ``E[p(x)**-0.5] = sum(p**0.5)``. So ``prod(p(x)**-0.5 / sum(p**0.5))`` over the tokens drawn so far is a
    martingale of mean 1, whatever the context of each, and ever reaches ``1 / IMPROBABLE`` with that chance at most (Ville
    1939). Of the nucleus ``top_p`` each token is up to ``1 / top_p`` more probable; and the logits that were drawn from are off
    by rounding, which changes a log probability by twice the baseline's worst error over the temperature.
    """
    if not token_ids:
        return 0.0
    log_p_TV = (exact.double() / temperature).log_softmax(-1)
    drawn_T = log_p_TV.gather(1, torch.tensor(token_ids, device=exact.device)[:, None]).squeeze(1)
    rounding = 2 * (baseline.double() - exact.double()).abs().max().item() / temperature
    growth_T = -0.5 * drawn_T - torch.logsumexp(0.5 * log_p_TV, -1) + math.log(top_p) - rounding
    return max(0.0, growth_T.cumsum(0).max().item()) / -math.log(IMPROBABLE)


def improbable_counts(count_V: Tensor, probability_V: Tensor) -> float:
    """Counts of independent draws, over the rejection threshold: above 1 they are improbable.

    Infinite if something was drawn whose probability is 0.
    By Bernstein's inequality (Boucheron, Lugosi and Massart 2013, section 2.8) n draws of probability p miss np by more than
    ``t = L/3 + sqrt(L**2 / 9 + 2 n p (1 - p) L)`` with a chance of at most ``2 exp(-L)``; all V together are given IMPROBABLE.
    """
    count_V, p_V = count_V.double(), probability_V.double()
    if (count_V[p_V == 0] > 0).any():
        return math.inf
    num_draws = count_V.sum()
    log = math.log(2 * len(p_V) / IMPROBABLE)
    allowed_V = log / 3 + torch.sqrt(log**2 / 9 + 2 * num_draws * p_V * (1 - p_V) * log)
    return float(((count_V - num_draws * p_V).abs() / allowed_V).max())


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1).sqrt()


def _over_budget(error: Tensor, own: Tensor, allowed: Constants) -> Tensor:
    """Errors as fractions of the budget that the baseline's ``own`` error gives them; all in units of roundoff times scale."""
    budget = torch.clamp(allowed.k * own, min=allowed.c)
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

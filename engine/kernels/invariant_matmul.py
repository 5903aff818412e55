"""Matmuls whose bits depend neither on how many rows and columns there are, nor on how many ranks share them.

*Column-parallel*: no rank cuts K. An element is the sum of its K products, leaf after leaf, whatever else is computed with it.

*Row-parallel*: K is cut at absolute borders into *leaves*, and ranks are cut between leaves. A leaf's sum of products is rounded
to a multiple of a power of two, the *quantum*, which is fixed for the weight: from then on it is added as an integer. Additions
of floating-point numbers depend on their order, those of integers do not, so that any split over ranks gives the same bits
(reproducible summation by pre-rounding: Demmel and Nguyen 2013; Hallberg and Adcroft 2014).

Shape suffixes: T = tokens, I = input features, O = output features, W = 2 words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.ieee import exact_matmul, exponent_of

COLUMN_LEAF = 128
MAX_RANKS = 64
_LOW_BITS = 40
_ABOVE_PEAK = 12
_SUM_BITS = 52
_FLAG = 1 << 56
"""What a rank adds to an element of which one of its leaves does not fit. MAX_RANKS of them stay below 2^63."""


def linear_in_order_torch(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, leaf after leaf in float64, rounded once."""
    y_TO = torch.zeros((x_TI.shape[0], weight_OI.shape[0]), dtype=torch.float64, device=x_TI.device)
    for x_TL, weight_OL in zip(x_TI.split(COLUMN_LEAF, 1), weight_OI.split(COLUMN_LEAF, 1), strict=True):
        y_TO += exact_matmul(x_TL.double(), weight_OL.double())
    return (y_TO if bias_O is None else y_TO + bias_O.double()).to(x_TI.dtype)


def quantum_exponent(weight: Tensor) -> int:
    """The quantum of a whole weight, as an exponent of two: of its largest magnitude alone, which any order of looking finds."""
    peak = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    return int(exponent_of(peak.double())) - _ABOVE_PEAK


def leaf_sums_torch(x_TI: Tensor, weight_OI: Tensor, *, leaf: int, num_leaves: int, quantum: int) -> Tensor:
    """This rank's leaves of ``x @ weight.T`` as integers, ``[W, T, O]`` int64: summed over the ranks, an element of any split.

    A leaf is two words: whole quanta, and what is left in units of 2^-40 quanta. The first words of all leaves together stay
    below 2^52 if each is below ``2^52 / num_leaves``. One that is not, or is not finite, counts as 0, and the rank adds a flag to
    its element: so whether an element fits is decided leaf by leaf, never by a partial sum.

    leaf         width of a leaf; ``x`` starts at a leaf's border
    num_leaves   of all ranks together
    quantum      exponent of the unit, of :func:`quantum_exponent`
    """
    limit = 2.0 ** (_SUM_BITS - (num_leaves - 1).bit_length())
    sums_WTO = torch.zeros((2, x_TI.shape[0], weight_OI.shape[0]), dtype=torch.int64, device=x_TI.device)
    all_fit_TO = torch.ones_like(sums_WTO[0], dtype=torch.bool)
    for x_TL, weight_OL in zip(x_TI.split(leaf, 1), weight_OI.split(leaf, 1), strict=True):
        scaled_TO = exact_matmul(x_TL.double(), weight_OL.double()) * 2.0**-quantum
        fits_TO = scaled_TO.abs() < limit
        scaled_TO = torch.where(fits_TO, scaled_TO, 0.0)
        quanta_TO = scaled_TO.round()
        sums_WTO[0] += quanta_TO.to(torch.int64)
        sums_WTO[1] += ((scaled_TO - quanta_TO) * 2.0**_LOW_BITS).round().to(torch.int64)
        all_fit_TO &= fits_TO
    sums_WTO[0] += torch.where(all_fit_TO, 0, _FLAG)
    return sums_WTO


def value_of_sums_torch(sums_WTO: Tensor, quantum: int, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the summed words of all ranks stand for, rounded once; NaN where some rank had a leaf that does not fit."""
    words_WTO = sums_WTO.to(torch.float64)
    y_TO = (words_WTO[0] + words_WTO[1] * 2.0**-_LOW_BITS) * 2.0**quantum
    y_TO = torch.where(sums_WTO[0].abs() <= 1 << _SUM_BITS, y_TO, torch.nan)
    return (y_TO if bias_O is None else y_TO + bias_O.double()).to(dtype)

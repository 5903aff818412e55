"""Arithmetic whose bits depend on the numbers alone, never on a tensor's shape: what the CPU side of TP invariance is made of.

On a CPU the same element may get other bits in another tensor: a BLAS sums in an order that it chooses by the shapes, and
torch's ``exp``, ``log`` or ``silu`` take one algorithm in a vector's lanes and another in what is left over at its end. Two
kinds of operation have no such freedom, and nothing else is used here:

* ``+ - * /``, square root, rounding to an integer and conversions, element by element: IEEE 754 fixes their result to the bit;
* sums and products of float64 numbers that are integers below 2^53: nothing is rounded, so any order gives the same.

Functions take and give float64. NaN and infinity come out as NaN, in the rows that they came in alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 256
"""The most products that :func:`exact_matmul` adds up."""
_BITS = 22
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10  # the first has 21 zeros at its end: times 2^11, it is exact
_EXP_TERMS, _LOG_TERMS = 13, 11


def power_of_two(exponent: Tensor) -> Tensor:
    """``2 ** exponent`` of int64, exactly; exponents are cut off at those of normal numbers."""
    return (exponent.clamp(-1022, 1023) + 1023).bitwise_left_shift(52).view(torch.float64)


def exponent_of(x: Tensor) -> Tensor:
    """The least int64 ``e`` of ``x < 2 ** e``, for ``x >= 0``; at least -900."""
    return (x.view(torch.int64).bitwise_right_shift(52) - 1022).clamp(min=-900)


def tree_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension, its order fixed by that dimension's size: halves are added until one is left."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def exp(x: Tensor) -> Tensor:
    """``e ** x`` within 2 units in the last place; 0 below -708. ``x`` is at most 709."""
    bounded = x.clamp(min=-708.0)
    power = (bounded * _LOG2_E).round()
    rest = (bounded - power * _LN2_HIGH) - power * _LN2_LOW
    # The Taylor series: |rest| is at most ln(2) / 2, and what is left out is below 2^-57.
    result = torch.ones_like(rest)
    for term in range(_EXP_TERMS, 0, -1):
        result = result * rest / term + 1.0
    return torch.where(x < -708.0, 0.0, result * power_of_two(power.to(torch.int64)))


def log(x: Tensor) -> Tensor:
    """The natural logarithm of normal ``x > 0``, within 3 units in the last place."""
    power = exponent_of(x)
    mantissa = x * power_of_two(-power)  # from 1/2 to 1
    below = mantissa < 0.7071067811865476
    mantissa, power = torch.where(below, 2.0 * mantissa, mantissa), torch.where(below, power - 1, power).to(torch.float64)
    # log(m) = 2 artanh(f); f^2 is below 0.0295, and what is left out below 2^-60.
    f = (mantissa - 1.0) / (mantissa + 1.0)
    squared = f * f
    series = torch.full_like(f, 1.0 / (2 * _LOG_TERMS + 1))
    for term in range(_LOG_TERMS - 1, -1, -1):
        series = series * squared + 1.0 / (2 * term + 1)
    return power * _LN2_HIGH + (power * _LN2_LOW + 2.0 * f * series)


def log_softmax(x: Tensor) -> Tensor:
    """``log(softmax(x))`` over the last dimension."""
    x = x - x.amax(dim=-1, keepdim=True)
    return x - log(tree_sum(exp(x)))[..., None]


def exact_matmul(x_TK: Tensor, w_OK: Tensor, w_exponent: Tensor | None = None) -> Tensor:
    """``x @ w.T``, ``[..., T, K]`` by ``[..., O, K]`` to ``[..., T, O]``, with the same bits in any shape; K is at most ``LEAF``.

    A row of ``x`` or ``w`` is cut into two integers an element, of 22 bits each, below its own largest magnitude (Ozaki et al.
    2012). Products of such integers and sums of 512 of these stay below 2^53: whatever order a BLAS takes, it rounds nothing.
    Numbers of 16 bits and of 24 are held in full down to 2^-36 and 2^-20 of their row's largest; what is lost of an element, and
    the product of the two low parts, is below 2^-42 of its row's largest.

    w_exponent   int64 that broadcasts to ``[..., O, 1]``: a power of two above all of ``w``; None: each row's own
    """
    if x_TK.shape[-1] > LEAF:
        raise ValueError(f"K={x_TK.shape[-1]} products may not be exact: add up at most {LEAF}")
    x_high, x_low, x_exponent = _integers(x_TK)
    w_high, w_low, w_exponent = _integers(w_OK, w_exponent)
    high = x_high @ w_high.mT
    cross = torch.cat((x_high, x_low), -1) @ torch.cat((w_low, w_high), -1).mT
    return (high + cross * 2.0**-_BITS) * power_of_two(x_exponent + w_exponent.mT - 2 * _BITS)


def _integers(x: Tensor, exponent: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """High and low integers of rows, and the exponents ``[..., 1]`` of their units, times 2^22."""
    if exponent is None:
        exponent = exponent_of(x.abs().amax(dim=-1, keepdim=True))
    scaled = x * power_of_two(_BITS - exponent)
    high = scaled.round()
    return high, ((scaled - high) * 2.0**_BITS).round(), exponent

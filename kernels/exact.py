"""Constants and sums whose bits depend on no library, compiler or processor.

libm, MKL, BLAS and numpy's own vector code give other last bits on other machines, and a last bit can decide on which
side of a threshold a number lies. This module avoids them in three ways:

- scalars by `decimal`, whose arithmetic is integer arithmetic: 60 digits, rounded once to fp64;
- arrays by + - * / and square roots of fp64 elements, which IEEE 754 rounds one by one, whatever the vector register;
- sums in a stated order (`total`).

It knows numbers and numpy arrays, no torch.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

DIGITS = 60
"""Decimal digits of every intermediate result."""
_NOTHING = Decimal("1e-45")  # a smaller result is 0 and its rounding error


def power_of_ten(numerator: float, denominator: int = 1) -> float:
    """10^(numerator / denominator), correctly rounded."""
    with localcontext(Context(prec=DIGITS)):
        return float(Decimal(10) ** (Decimal(numerator) / denominator))


def exp(x: float) -> float:
    """e^x, correctly rounded."""
    with localcontext(Context(prec=DIGITS)):
        return float(Decimal(x).exp())


def ln(x: float) -> float:
    """ln x of x > 0, correctly rounded."""
    with localcontext(Context(prec=DIGITS)):
        return float(Decimal(x).ln())


@functools.cache
def pi() -> Decimal:
    """pi to `DIGITS` digits, as 16 atan(1/5) - 4 atan(1/239) (Machin 1706)."""
    with localcontext(Context(prec=DIGITS + 5)):
        return 16 * _atan_of_inverse(5) - 4 * _atan_of_inverse(239)


def _atan_of_inverse(n: int) -> Decimal:
    total = term = Decimal(1) / n
    k = 1
    while abs(term) > Decimal(10) ** -(DIGITS + 5):
        term = -term / (n * n)
        k += 2
        total += term / k
    return total


def roots_of_unity(turns: int, count: int) -> NDArray[np.float64]:
    """e^(-2 pi i k / turns), k = 0 ... count - 1, as real and imaginary parts, each correctly rounded: [count, 2]."""
    out = np.empty((count, 2))
    with localcontext(Context(prec=DIGITS)):
        step, at = _unit(-2 * pi() / turns), (Decimal(1), Decimal(0))
        for k in range(count):
            out[k] = [float(x) if abs(x) > _NOTHING else 0.0 for x in at]
            at = at[0] * step[0] - at[1] * step[1], at[0] * step[1] + at[1] * step[0]
    return out


def _unit(angle: Decimal) -> tuple[Decimal, Decimal]:
    """(cos, sin) of an angle in radians, by their Taylor series."""
    parts = [Decimal(1), angle]
    term, k = angle, 1
    while abs(term) > Decimal(10) ** -(DIGITS + 5):
        k += 1
        term = term * angle / k
        parts[k % 2] += -term if k % 4 in (2, 3) else term
    return parts[0], parts[1]


_LN2 = (0.693147180369123816490, 1.90821492927058770002e-10)  # the first has 20 trailing zero bits: e * it is exact
_SQRT_HALF = 0.7071067811865476


def ln_of(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln x of an array of positive normal numbers, elementwise, within 1e-15 of its size.

    x = 2^e m, m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh z = 2 (z + z^3 / 3 + z^5 / 5 + ...), z = (m - 1) / (m + 1)."""
    m, e = np.frexp(x)  # m in [1/2, 1), exactly
    small = m < _SQRT_HALF
    m, e = np.where(small, m + m, m), e - small
    z = (m - 1.0) / (m + 1.0)
    square = z * z
    series = np.zeros_like(z)
    for k in range(23, 1, -2):  # |z| < 0.172, so the first term left out is below 1e-19 of the sum
        series = (series + 1.0 / k) * square
    return e * _LN2[0] + (e * _LN2[1] + 2.0 * (z + z * series))


def exp_of(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e^x of an array of numbers of size up to 700, elementwise, within 1e-15 of its size.

    x = n ln 2 + r, |r| <= ln 2 / 2; e^x = 2^n (1 + r (1 + r / 2 (1 + r / 3 (...))))."""
    n = np.rint(x / (_LN2[0] + _LN2[1]))
    r = (x - n * _LN2[0]) - n * _LN2[1]
    series = np.ones_like(r)
    for k in range(17, 0, -1):  # the first term left out is below 1e-23
        series = 1.0 + series * r / k
    return np.ldexp(series, n.astype(np.int64))


def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over the last axis: the second half is added to the first until one element is left.

    numpy's own sum adds in an order that may change with its version and the processor."""
    while (n := values.shape[-1]) > 1:
        half = n - n // 2
        left = values[..., :half].copy()
        left[..., : n // 2] += values[..., half:]
        values = left
    return values[..., 0] if values.shape[-1] else np.zeros(values.shape[:-1])

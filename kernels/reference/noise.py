"""The definition of normal noise (`kernels.noise`), in numpy: fp64 operations in one written order.

kernels/cpu/native/noise.cpp makes the same operations in the same order, so that the two give equal bits (tested). The
inverse of the normal distribution function is Wichura's PPND16 (1988, Applied Statistics 37, AS 241), whose relative
error is about 1e-16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.exact import ln_of
from kernels.reference.backend import GOLDEN

Array = NDArray[np.float64]

STEP = float.fromhex("0x1p-53")
"""Between neighbouring p."""

CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125,
     1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867, 5394.1960214247511077,
     687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
"""Coefficients of numerator and denominator, the highest power first, for p within 0.425 of 1/2."""
TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
"""Beyond, down to p = e^-25."""
FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip
"""Beyond that."""


def normal(key: Tensor, count: int) -> Tensor:
    """As `kernels.noise.normal`, of checked arguments."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    words = _splitmix64(key.numpy().view(np.uint64)[:, None] + counter)
    p = ((words >> np.uint64(11) & np.uint64(0xFFFFFFFFFFFFF)).astype(np.float64) + 0.5) * STEP
    z = lower_quantile(p).astype(np.float32)
    return torch.from_numpy(np.where(words >> np.uint64(63) == 1, -z, z))


def lower_quantile(p: Array) -> Array:
    """The number that a standard normal variable is below with probability p, 0 < p <= 1/2: at most 0."""
    q = p - 0.5
    square = 0.180625 - q * q
    centre = q * _ratio(square, CENTRE)
    r = np.sqrt(-ln_of(p))
    tail = np.where(r <= 5.0, _ratio(r - 1.6, TAIL), _ratio(r - 5.0, FAR))
    return np.where(q >= -0.425, centre, -tail)


def _ratio(x: Array, coefficients: tuple[Sequence[float], Sequence[float]]) -> Array:
    upper, lower = (np.full_like(x, part[0]) for part in coefficients)
    for a, b in zip(*(part[1:] for part in coefficients), strict=True):
        upper, lower = upper * x + a, lower * x + b
    return upper / lower


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As `kernels.ops.logprob` names it."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

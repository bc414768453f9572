"""The definition of a normal number, in numpy: fp64 operations in one written order, rounded to fp32 once.

kernels/cpu/native/noise.cpp makes the same operations in the same order, so that the two give equal bits (tested, fp64
included). No library's logarithm, product or sum is called.

    h = splitmix64(key + (i + 1) * 0x9E3779B97F4A7C15)          the counter of `kernels.ops.sample`
    q = (m + 1/2) / 2^53, m the upper 53 bits of h as a two's complement number
    z = Phi^-1(1/2 + q)

1/2 + q is never formed: near 1 it would lose what q holds. The sign of q becomes that of z, and the tail's mass is
p = 1/2 - |q|, in [2^-54, 1/2). Both q and p are odd multiples of 2^-54 below 2^53 of them, so both are exact: the two
tails are mirror images, z is never 0 and |z| at most 8.29.

Phi^-1 is algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988, 477-484): a ratio of polynomials of degree 7
in q^2 where |q| <= 0.425, else in r = sqrt(-ln p), of relative error about 1e-16. ln is `kernels.exact.ln_of`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.exact import ln_of
from kernels.reference.backend import GOLDEN, _mix

Coefficients = tuple[float, ...]  # of ascending powers

CENTRE: tuple[Coefficients, Coefficients] = (
    (3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
     45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727),
    (1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
     21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610),
)  # fmt: skip
"""Numerator and denominator where |q| <= 0.425, in 0.180625 - q^2: Wichura's a and b."""
TAIL: tuple[Coefficients, Coefficients] = (
    (1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
     1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
     0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
"""Where r <= 5, in r - 1.6: c and d."""
FAR: tuple[Coefficients, Coefficients] = (
    (6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
     0.0265321895265761230930, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip
"""Where r > 5, so p < 1.4e-11, in r - 5: e and f."""


def normal(key: Tensor, count: int) -> Tensor:
    """As `kernels.noise.normal`, of keys on the CPU."""
    counter = torch.arange(1, count + 1) * (GOLDEN - 2**64)
    return torch.from_numpy(of_words(_mix(key[:, None] + counter)).astype(np.float32))


def of_words(word: Tensor) -> NDArray[np.float64]:
    """h, the bits of uint64 held as int64 -> z, fp64 of the same shape."""
    q = ((word.numpy() >> 10) | 1).astype(np.float64) / 2**54
    square = 0.180625 - q * q
    z = q * _polynomial(CENTRE[0], square) / _polynomial(CENTRE[1], square)
    outside = np.abs(q) > 0.425
    z[outside] = np.copysign(_tail(0.5 - np.abs(q[outside])), q[outside])
    return z


def _tail(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """-Phi^-1(p) of p in (0, 0.075]."""
    r = np.sqrt(-ln_of(p))
    near, far = r - 1.6, r - 5.0
    return np.where(
        r <= 5.0,
        _polynomial(TAIL[0], near) / _polynomial(TAIL[1], near),
        _polynomial(FAR[0], far) / _polynomial(FAR[1], far),
    )


def _polynomial(coefficients: Coefficients, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Horner's rule, from the highest power down."""
    total = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total

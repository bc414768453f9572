"""The fast Fourier transform in one written order, of numpy arrays of fp64.

X[k] = sum_n x[n] e^(-2 pi i k n / N) by Stockham's passes of radix 2, 4 and 5 (Van Loan 1992, Computational Frameworks
for the Fast Fourier Transform): after each pass the numbers lie in order, so there is no reordering at the end.
Only elementwise + - * are used, on separate real and imaginary parts (numpy's complex product may fuse operations), so
every machine gives the same bits, and no column depends on the others.

kernels/cpu/native/dmel.cpp does the same operations in the same order: change both or neither.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.exact import roots_of_unity

Array = NDArray[np.float64]
Complex = tuple[Array, Array]  # real and imaginary parts


def long_roots(coarse: int, fine: int) -> Array:
    """e^(-2 pi i k / N), N = coarse * fine, as [N, 2], within 4e-16: products of two correctly rounded roots. For
    tables that `roots_of_unity` would take seconds to make."""
    (a, b), (c, d) = roots_of_unity(coarse, coarse).T[:, :, None], roots_of_unity(coarse * fine, fine).T
    return np.stack((a * c - b * d, a * d + b * c), -1).reshape(-1, 2)


def fft(x: Complex, radices: tuple[int, ...], roots: Array) -> Complex:
    """x [N, columns] -> [N, columns], N the product of the radices; roots [N, 2], e^(-2 pi i k / N)."""
    n, stride, columns = len(roots), 1, x[0].shape[1]
    for radix in radices:
        m = n // radix
        a = [(re, im) for re, im in zip(*(part.reshape(radix, m, stride, columns) for part in x), strict=True)]
        b = _BUTTERFLY[radix](a)
        out = tuple(np.empty((m, radix, stride, columns)) for _ in x)
        for k, (re, im) in enumerate(b):
            if k and m > 1:
                c, s = (part.reshape(m, 1, 1) for part in roots[stride * k * np.arange(m)].T)
                re, im = re * c - im * s, re * s + im * c
            out[0][:, k], out[1][:, k] = re, im
        x = out[0].reshape(-1, columns), out[1].reshape(-1, columns)
        n, stride = m, stride * radix
    return x


def _two(a: list[Complex]) -> list[Complex]:
    (r0, i0), (r1, i1) = a
    return [(r0 + r1, i0 + i1), (r0 - r1, i0 - i1)]


def _four(a: list[Complex]) -> list[Complex]:
    (r0, i0), (r1, i1), (r2, i2), (r3, i3) = a
    even_r, even_i, odd_r, odd_i = r0 + r2, i0 + i2, r1 + r3, i1 + i3
    d_r, d_i, e_r, e_i = r0 - r2, i0 - i2, r1 - r3, i1 - i3
    return [
        (even_r + odd_r, even_i + odd_i),
        (d_r + e_i, d_i - e_r),
        (even_r - odd_r, even_i - odd_i),
        (d_r - e_i, d_i + e_r),
    ]


FIFTHS = roots_of_unity(5, 3)  # 1, e^(-2 pi i / 5), e^(-4 pi i / 5)


def _five(a: list[Complex]) -> list[Complex]:
    (c1, s1), (c2, s2) = FIFTHS[1], FIFTHS[2]
    (r0, i0), (r1, i1), (r2, i2), (r3, i3), (r4, i4) = a
    p_r, p_i, q_r, q_i = r1 + r4, i1 + i4, r2 + r3, i2 + i3
    d_r, d_i, e_r, e_i = r1 - r4, i1 - i4, r2 - r3, i2 - i3
    m_r, m_i = (r0 + c1 * p_r) + c2 * q_r, (i0 + c1 * p_i) + c2 * q_i
    n_r, n_i = (r0 + c2 * p_r) + c1 * q_r, (i0 + c2 * p_i) + c1 * q_i
    u_r, u_i = s1 * d_r + s2 * e_r, s1 * d_i + s2 * e_i
    v_r, v_i = s2 * d_r - s1 * e_r, s2 * d_i - s1 * e_i
    return [
        (r0 + (p_r + q_r), i0 + (p_i + q_i)),
        (m_r - u_i, m_i + u_r),
        (n_r - v_i, n_i + v_r),
        (n_r + v_i, n_i - v_r),
        (m_r + u_i, m_i - u_r),
    ]


_BUTTERFLY = {2: _two, 4: _four, 5: _five}


def real_fft(x: Array, radices: tuple[int, ...], roots: Array) -> Complex:
    """Bins 1 ... N / 2 - 1 of real columns: x [N, columns], the radices of N / 2, roots [N, 2] -> [N / 2 - 1, columns].

    Even samples as real and odd ones as imaginary parts of a transform Z half as long; with M = N / 2 and
    E = (Z[k] + conj Z[M - k]) / 2, O = (Z[k] - conj Z[M - k]) / 2i:  X[k] = E + e^(-2 pi i k / N) O."""
    z = fft((x[0::2], x[1::2]), radices, roots[0::2])
    (r, i), (mirror_r, mirror_i) = (tuple(part[1:] for part in z), tuple(part[:0:-1] for part in z))
    e_r, e_i = 0.5 * (r + mirror_r), 0.5 * (i - mirror_i)
    o_r, o_i = 0.5 * (i + mirror_i), 0.5 * (mirror_r - r)
    c, s = (part.reshape(-1, 1) for part in roots[1 : len(z[0])].T)
    return e_r + (o_r * c - o_i * s), e_i + (o_r * s + o_i * c)


def real_inverse(spectrum: Complex, radices: tuple[int, ...], roots: Array) -> Array:
    """N / 2 times the real signal whose bins are 0 at 0 and N / 2 and ``spectrum`` [N/2 - 1] between: [N].

    The steps of `real_fft` in reverse; the inverse transform is the forward one with real and imaginary parts
    exchanged."""
    (r, i), (mirror_r, mirror_i) = spectrum, (spectrum[0][::-1], spectrum[1][::-1])
    e_r, e_i, d_r, d_i = 0.5 * (r + mirror_r), 0.5 * (i - mirror_i), 0.5 * (r - mirror_r), 0.5 * (i + mirror_i)
    c, s = roots[1 : len(r) + 1].T
    o_r, o_i = d_r * c + d_i * s, d_i * c - d_r * s  # times the conjugate root
    z_r, z_i = (np.concatenate(([0.0], part)).reshape(-1, 1) for part in (e_r - o_i, e_i + o_r))
    odd, even = fft((z_i, z_r), radices, roots[0::2])
    return np.stack((even[:, 0], odd[:, 0]), 1).reshape(-1)

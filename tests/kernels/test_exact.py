"""Constants and sums: against other ways to compute them, to their stated bounds."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from kernels import exact


def test_scalars_agree_with_libm() -> None:
    """Within a unit in the last place, which is libm's own error."""
    for x in (-7.3, -0.3, 0.0, 0.1, 1.0, 2.5, 17.25):
        assert abs(exact.power_of_ten(x) - math.pow(10, x)) <= math.ulp(math.pow(10, x))
        assert abs(exact.exp(x) - math.exp(x)) <= math.ulp(math.exp(x))
        assert x <= 0 or abs(exact.ln(x) - math.log(x)) <= math.ulp(math.log(x))
    assert exact.power_of_ten(3) == 1000 and exact.power_of_ten(20, 20) == 10 and exact.exp(0) == 1 and exact.ln(1) == 0
    assert exact.power_of_ten(1, 2) == math.sqrt(10) != exact.power_of_ten(0.5000000000000001)


@pytest.mark.parametrize("turns", [5, 12, 1600, 512_000])
def test_roots_of_unity(turns: int) -> None:
    count = min(turns, 1600)
    roots = exact.roots_of_unity(turns, count)
    angle = 2 * np.pi * np.arange(count) / turns
    np.testing.assert_allclose(roots, np.stack((np.cos(angle), -np.sin(angle)), 1), rtol=0, atol=2e-15)
    # Correctly rounded numbers cannot miss the circle by more than the roundings of two coordinates do.
    for re, im in roots.tolist():
        assert abs(Fraction(re) ** 2 + Fraction(im) ** 2 - 1) <= Fraction(2, 2**53)


def test_roots_on_the_axes_and_in_the_middle_are_exact() -> None:
    roots = exact.roots_of_unity(24, 24)
    assert roots[[0, 6, 12, 18]].tolist() == [[1, 0], [0, -1], [-1, 0], [0, 1]]
    assert roots[[4, 20], 0].tolist() == [0.5, 0.5] and roots[[2, 14], 1].tolist() == [-0.5, 0.5]
    assert roots[3].tolist() == [math.sqrt(0.5), -math.sqrt(0.5)]


def test_ln_of_arrays() -> None:
    rng = np.random.default_rng(0)
    near = 1 + rng.uniform(-1e-3, 1e-3, 5000)
    x = np.concatenate((near, rng.uniform(0.3, 3.0, 5000), 10.0 ** rng.uniform(-300, 300, 5000), [2.0, 0.5, 0.75]))
    wanted = np.array([math.log(v) for v in x])
    assert (np.abs(exact.ln_of(x) - wanted) <= 1e-15 * np.abs(wanted)).all()
    assert exact.ln_of(np.array([1.0])).tolist() == [0.0]
    one_by_one = [exact.ln_of(x[i : i + 1])[0] for i in range(0, len(x), 100)]
    assert one_by_one == exact.ln_of(x)[::100].tolist()  # its place in the array does not matter


def test_total_adds_in_its_written_order() -> None:
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 7, 160, 1001):
        x = rng.standard_normal((3, n))
        for row, got in zip(x, exact.total(x), strict=True):
            values = row.tolist()
            while len(values) > 1:
                half = len(values) - len(values) // 2
                added = [a + b for a, b in zip(values, values[half:], strict=False)]
                values = added + values[len(added) : half]
            assert got == values[0]
            assert got == pytest.approx(math.fsum(row), rel=1e-12, abs=1e-13)
    assert exact.total(np.zeros((2, 0))).tolist() == [0, 0]
    x = np.array([1.0, 1e100, 1.0, -1e100])  # control: another order has another sum
    assert exact.total(x) == 2.0 and ((x[0] + x[1]) + x[2]) + x[3] == 0.0

"""Normal noise: native code against its definition, bit for bit; the definition against scipy, Wichura's check sums and
the normal distribution."""

from __future__ import annotations

import hashlib
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor

from kernels import dispatch, noise
from kernels.cpu import noise as native
from kernels.reference import noise as reference
from kernels.reference.backend import GOLDEN, _mix
from tests.kernels.contract import assert_same, generator, threads
from tests.kernels.noise import normal_words

EXTREMES = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**53, GOLDEN - 2**64, -(GOLDEN - 2**64), 2**32, -(2**31)])
KEYS = torch.cat([EXTREMES, torch.randint(-(2**63), 2**63 - 1, (27,), generator=generator(1))])
BOUND = 1e-14  # relative, of fp64


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33, 511, 512, 513, 1600, 14_401])
def test_native_code_gives_the_definitions_bits(count: int) -> None:
    """Every remainder of a vector and of a block, extreme keys among others."""
    got = native.normal(KEYS, count)
    assert got.shape == (len(KEYS), count) and got.dtype == torch.float32 and bool(got.isfinite().all())
    assert_same(got, reference.normal(KEYS, count), f"{count}")


@settings(max_examples=60, deadline=None)
@given(key=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), count=st.integers(0, 1100))
def test_native_code_gives_the_definitions_bits_for_any_key(key: list[int], count: int) -> None:
    keys = torch.tensor(key, dtype=torch.int64)
    assert torch.equal(native.normal(keys, count), reference.normal(keys, count))


def test_native_code_gives_the_definitions_bits_before_rounding() -> None:
    """fp64, where a changed operation shows: words of the centre, both tails, far out, and both edges between them."""
    word = normal_words()
    assert torch.equal(native.of_words(word), torch.from_numpy(reference.of_words(word)))


def _fused(c: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(x, c[-1])
    for a in c[-2::-1]:  # the 64-bit mantissas of long double keep what a fused operation keeps
        total = (total.astype(np.longdouble) * x + a).astype(np.float64)
    return total


def _by_powers(c: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total, power = np.full_like(x, c[0]), np.ones_like(x)
    for a in c[1:]:
        power = power * x
        total = total + a * power
    return total


def _spoilt(table: tuple[tuple[float, ...], ...], part: int, place: int, by: float) -> tuple[tuple[float, ...], ...]:
    rows = [list(row) for row in table]
    rows[part][place] *= 1 + by
    return tuple(tuple(row) for row in rows)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("_polynomial", _fused),
        ("_polynomial", _by_powers),
        ("ln_of", np.log),
        ("CENTRE", _spoilt(reference.CENTRE, 0, 4, 1e-15)),
        ("TAIL", _spoilt(reference.TAIL, 1, 2, 1e-15)),
        ("FAR", _spoilt(reference.FAR, 0, 0, 1e-15)),
    ],
)
def test_control_other_operations_have_other_bits(name: str, changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, in another order, a library's logarithm, a coefficient's last place: the check sees each."""
    monkeypatch.setattr(reference, name, changed)
    word = normal_words()
    other = torch.from_numpy(reference.of_words(word))
    assert not torch.equal(other, native.of_words(word))
    torch.testing.assert_close(other, native.of_words(word), rtol=1e-13, atol=0)


def _error(z: NDArray[np.float64], word: Tensor) -> tuple[float, float]:
    """The greatest relative errors of |z| in the centre and the tails, against scipy's quantile of the exact p."""
    q = np.abs(((word.numpy() >> 10) | 1).astype(np.float64) * 2.0**-54)
    exact = -ndtri(0.5 - q)
    error = np.abs(np.abs(z) / exact - 1)
    return float(error[q <= 0.425].max()), float(error[q > 0.425].max())


def test_definition_is_the_quantile() -> None:
    """Mirror images in sign; control: a coefficient's tenth digit."""
    word = torch.cat([normal_words(), _mix(torch.arange(200_000))])
    z = reference.of_words(word)
    assert max(_error(z, word)) < BOUND
    assert np.array_equal(reference.of_words(~word), -z)
    assert np.array_equal(z > 0, word.numpy() >= 0)
    assert np.abs(z).max() == pytest.approx(-ndtri(2.0**-54), rel=1e-15) and np.abs(z).min() > 0


@pytest.mark.parametrize(("name", "centre"), [("CENTRE", True), ("TAIL", False), ("FAR", False)])
def test_control_a_wrong_coefficient_is_not_the_quantile(
    name: str, centre: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, name, _spoilt(getattr(reference, name), 0, 1, 1e-10))
    errors = _error(reference.of_words(normal_words()), normal_words())
    assert (errors[0] > BOUND, errors[1] > BOUND) == (centre, not centre)


@pytest.mark.parametrize(
    ("name", "total"),
    [("CENTRE", 55.8831928806149014439), ("TAIL", 49.3320650330161028904), ("FAR", 47.5258331754928967163)],
)
def test_coefficients_have_wichuras_check_sums(name: str, total: float) -> None:
    """The sums of the mantissas that the paper prints; a 1, which it leaves out, begins each denominator. Control: two
    digits changed places."""

    def mantissas(table: tuple[tuple[float, ...], ...]) -> float:
        return math.fsum(float(f"{c:.17e}".partition("e")[0]) for c in (*table[0], *table[1][1:]))

    table = getattr(reference, name)
    assert table[1][0] == 1 and mantissas(table) == pytest.approx(total, abs=1e-13)
    assert mantissas(_spoilt(table, 0, 3, 1e-12)) != pytest.approx(total, abs=1e-13)


def _splitmix64(x: int) -> int:
    """In Python's integers; as int64."""
    x = (x + GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


def test_element_is_a_function_of_key_and_place() -> None:
    """The counter of `ops.sample`; the start of a longer row; whatever the rows beside it, their order and number."""
    whole = noise.normal(KEYS, 1600)
    for row, place in ((0, 0), (3, 1), (7, 1599), (20, 777)):
        word = torch.tensor([_splitmix64(int(KEYS[row]) + (place + 1) * GOLDEN)])
        assert float(whole[row, place]) == float(reference.of_words(word).astype(np.float32)[0])
    for count in (0, 1, 5, 10, 513, 1599):
        assert torch.equal(noise.normal(KEYS, count), whole[:, :count])
    assert torch.equal(noise.normal(KEYS.flip(0), 1600), whole.flip(0))
    assert torch.equal(torch.cat([noise.normal(one, 1600) for one in KEYS.split(1)]), whole)
    assert torch.equal(noise.normal(torch.stack([KEYS, KEYS], 1)[:, 0], 1600), whole)  # keys that lie apart
    assert len(whole.unique(dim=0)) == len(KEYS)


def test_threads_and_backend_do_not_matter() -> None:
    with threads(1):
        one = noise.normal(KEYS, 16_000)
    with threads(2):
        assert torch.equal(noise.normal(KEYS, 16_000), one)
    before = dispatch.backend().NAME
    try:
        dispatch.use_backend("reference")
        assert torch.equal(noise.normal(KEYS, 16_000), one)
    finally:
        dispatch.use_backend(before)


def test_golden_bits() -> None:
    """As every machine must make them. Control: the next key's."""

    def sha(key: Tensor) -> str:
        return hashlib.sha256(noise.normal(key, 1600).numpy().tobytes()).hexdigest()[:16]

    assert sha(EXTREMES) == "2ad13311fb3748f2"
    assert sha(EXTREMES + 1) != "2ad13311fb3748f2"
    assert noise.normal(torch.tensor([7]), 4)[0].tolist() == [
        0.04209444299340248,
        -0.2513786554336548,
        -1.3856277465820312,
        1.6690058708190918,
    ]


def test_is_normal() -> None:
    """A million numbers: four moments within 4 standard deviations, and Kolmogorov-Smirnov's distance below its 1e-3
    quantile. Control: 1 % wider."""
    x = noise.normal(torch.arange(100), 10_000).numpy().astype(np.float64).ravel()
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 4 * math.sqrt(variance / n), power
    assert _distance(x) < 1.95 / math.sqrt(n) < _distance(1.01 * x)
    rows = x.reshape(100, -1)  # neighbours, and neighbouring keys, have nothing to do with each other
    for product in (rows[:, 1:] * rows[:, :-1], rows[1:] * rows[:-1]):
        assert abs(float(product.mean())) < 4 / math.sqrt(n)


def _distance(x: NDArray[np.float64]) -> float:
    rank, share = np.arange(len(x) + 1) / len(x), ndtr(np.sort(x))
    return float(max((rank[1:] - share).max(), (share - rank[:-1]).max()))


@pytest.mark.parametrize(
    ("key", "count", "named"),
    [
        ([1, 2], 5, "key: expected .* got list"),
        (torch.zeros(2), 5, r"key: .*torch.float32 \[2\]"),
        (torch.zeros(2, dtype=torch.int32), 5, "key: .*torch.int32"),
        (torch.zeros(2, 1, dtype=torch.int64), 5, r"key: .*\[2, 1\]"),
        (torch.zeros((), dtype=torch.int64), 5, r"key: .*\[\]"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), 5, "key: .*meta"),
        (KEYS, -1, "count: .*got -1"),
        (KEYS, 2**62, "count: "),
        (KEYS, True, "count: .*got True"),
        (KEYS, 5.0, "count: .*got 5.0"),
        (KEYS, None, "count: .*got None"),
    ],
)
def test_wrong_arguments(key: Any, count: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        noise.normal(key, count)


def test_no_row_is_no_noise() -> None:
    assert noise.normal(KEYS[:0], 7).shape == (0, 7)
    assert noise.normal(KEYS, 0).shape == (len(KEYS), 0)


def test_without_a_native_library_the_definition_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host that is no x86-64, under a backend that does not need the library."""

    def missing(name: str, arguments: str) -> None:
        raise RuntimeError("no library")

    monkeypatch.delitem(sys.modules, "kernels.cpu.noise")
    monkeypatch.setattr("kernels.cpu.library.bind", missing)
    noise._native.cache_clear()
    assert noise._native() is reference.normal
    monkeypatch.undo()
    noise._native.cache_clear()
    assert dispatch.backend().NAME != "cpu" or noise._native() is not reference.normal

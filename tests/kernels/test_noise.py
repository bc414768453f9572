"""The sampler's Gumbel noise: exact in every range, as often as it should be, and improbable tokens come of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.cpu import library
from kernels.reference import backend as reference
from tests.kernels.contract import generator
from tests.kernels.noise import ULPS, exact_noise, noise_of_24_bits, words


def native(word: Tensor) -> Tensor:
    noise = torch.empty(len(word))
    library.bind("vec_gumbel", "ppi")(word.data_ptr(), noise.data_ptr(), len(word))
    return noise


def test_exact() -> None:
    """Ours and the definition's against decimal arithmetic, extremes included. The control's words lack 24 bits."""
    word = words()
    exact = torch.tensor([exact_noise(w) for w in word.tolist()], dtype=torch.float64)
    unit = 2.0**-24 * exact.abs().clamp(min=1)
    assert float(((reference.gumbel_of(word) - exact).abs() / unit).max()) < 2.0**-20
    got = native(word)
    assert bool(got.isfinite().all())
    assert float(((got.double() - exact).abs() / unit).max()) <= ULPS
    assert got.max() == native(torch.tensor([1]))[0] == pytest.approx(64 * math.log(2))
    assert got.min() == native(torch.tensor([-(2**63)]))[0] == pytest.approx(-math.log(64 * math.log(2)))
    cut = reference.gumbel_of(word & ~0xFFFFFF)
    assert float(((cut - exact).abs() / unit).max()) > 1e6


def test_place_in_a_vector_does_not_matter() -> None:
    word = words()[:77]
    assert torch.equal(native(word), torch.cat([native(one) for one in word.split(1)]))


def test_as_often_as_it_should() -> None:
    """P(noise > t) = 1 - exp(-exp(-t)) over 2^26 words, within 5 standard deviations: 56 of them exceed 14. The control
    leaves out the top bit, which doubles the number of great values and takes the small ones away."""
    thresholds = (-2.0, -1.0, 0.0, 5.0, 10.0, 14.0)
    total, piece = 2**26, 2**22
    counts, control = torch.zeros(2, len(thresholds), dtype=torch.float64)
    for first in range(0, total, piece):
        word = reference._mix(torch.arange(first, first + piece))
        for found, used in ((counts, word), (control, word & (2**63 - 1))):
            noise = native(used)
            found += torch.tensor([int((noise > t).sum()) for t in thresholds])
    for t, count, other in zip(thresholds, counts.tolist(), control.tolist(), strict=True):
        p = -math.expm1(-math.exp(-t))
        bound = 5 * math.sqrt(total * p * (1 - p))
        assert abs(count - total * p) < bound < abs(other - total * p), t


@pytest.mark.parametrize("vocab", [1000, pytest.param(201_024, marks=pytest.mark.slow)])
def test_groups_of_tokens_follow_the_distribution(vocab: int) -> None:
    """Chi-square of 3,000 draws over 8 groups of tokens, from a few of 30 % to most of them, of 1 %, below the
    1 - 1e-6 quantile for 7 degrees of freedom (about 41). The control draws at another temperature."""
    mass = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.04, 0.01], dtype=torch.float64)
    ends = torch.logspace(0, math.log10(vocab), 9, dtype=torch.float64).round().long()
    ends[0] = 0
    size, draws = ends.diff(), 3_000
    group = torch.repeat_interleave(torch.arange(8), size)
    group = group[torch.randperm(vocab, generator=generator(1))]
    logits = torch.log(mass / size)[group].float()

    def chi_square(temperature: float) -> float:
        count = torch.zeros(8)
        for key in torch.arange(draws).split(100):
            count += group[drawn(logits, temperature, key)].bincount(minlength=8)
        return float(((count - mass * draws) ** 2 / (mass * draws)).sum())

    assert chi_square(1.0) < 41 < chi_square(1.25)


@pytest.mark.slow
def test_tail_is_drawn() -> None:
    """201,024 tokens, all but one of which share 1e-3: 20,000 draws give them about 20 times, within 4 standard
    deviations. The control is noise of 24 bits, whose greatest value is 25 ln 2: it gives them once at most."""
    vocab, tail, draws = 201_024, 1e-3, 20_000
    top, lead = vocab // 2, math.log((1 - tail) / tail * (vocab - 1))
    logits = torch.zeros(vocab)
    logits[top] = lead
    keys = torch.randint(-(2**63), 2**63 - 1, (draws,), generator=generator(1))

    def as_expected(count: int) -> bool:
        return abs(count - draws * tail) < 4 * math.sqrt(draws * tail * (1 - tail))

    assert as_expected(sum(int((drawn(logits, 1.0, key) != top).sum()) for key in keys.split(100)))
    possible = keys[noise_of_24_bits(keys, torch.tensor(top)) + lead < 25 * math.log(2)]
    count = sum(int((logits + noise_of_24_bits(key, torch.arange(vocab))).argmax()) != top for key in possible)
    assert len(possible) < draws / 100 and not as_expected(count)


def drawn(logits: Tensor, temperature: float, key: Tensor) -> Tensor:
    """Tokens of the keys, all from one row of logits [V]."""
    allowed, zero = torch.ones(1, len(logits), dtype=torch.bool), torch.zeros(len(key), dtype=torch.int64)
    return ops.sample(logits.expand(len(key), -1).contiguous(), temperature, key, allowed, zero)[0]

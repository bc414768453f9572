"""Normal noise: the native code has the definition's bits, the definition is the normal distribution."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import ndtri

from kernels.cpu.noise import normal as native
from kernels.noise import normal
from kernels.reference import noise as reference
from tests.kernels.contract import generator, threads

KEYS = torch.cat((torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)]), torch.arange(20) * 0x1234567_89ABCDEF))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 511, 512, 513, 1600])
def test_native_code_gives_the_definitions_bits(count: int) -> None:
    assert torch.equal(native(KEYS, count), reference.normal(KEYS, count))


def test_a_number_depends_on_its_key_and_place_only() -> None:
    together = normal(KEYS, 3000)
    for i in range(len(KEYS)):
        assert torch.equal(normal(KEYS[i : i + 1], 1700)[0], together[i, :1700])
    with threads(3):
        assert torch.equal(normal(KEYS, 3000), together)
    assert len(together.unique()) > 0.99 * together.numel()


def test_bits_of_every_machine() -> None:
    drawn = normal(torch.tensor([0, 1, -1]), 1000)
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16] == "b88f2708cfe3c78f"


def test_quantiles_agree_with_scipys() -> None:
    """In the middle, in the tails and where the formula changes. Control: a coefficient that is wrong by 1e-9."""
    p = np.concatenate((np.geomspace(2.0**-54, 0.5 - 2.0**-53, 100_000), 0.075 + np.linspace(-1e-9, 1e-9, 99)))
    wanted = ndtri(p)

    def error() -> float:
        return float(np.abs(reference.lower_quantile(p) / wanted - 1).max())

    assert error() < 3e-15
    with pytest.MonkeyPatch.context() as patch:
        (first, *rest), lower = reference.TAIL
        patch.setattr(reference, "TAIL", ((first, *rest[:-1], rest[-1] * (1 + 1e-9)), lower))
        assert error() > 1e-11


def test_it_is_normal() -> None:
    """A million numbers by the test of Kolmogorov and Smirnov. Control: sums of twelve uniform numbers, which have the
    right mean and variance."""
    drawn = normal(torch.arange(1000), 1000).numpy().ravel()
    assert stats.kstest(drawn, "norm").pvalue > 0.01 and abs(stats.kurtosis(drawn)) < 0.02
    sums = torch.rand(1_000_000, 12, generator=generator(0)).sum(1).numpy() - 6
    assert stats.kstest(sums, "norm").pvalue < 0.001 and abs(stats.kurtosis(sums)) > 0.05


@pytest.mark.parametrize(
    ("key", "count", "says"),
    [
        (KEYS.int(), 3, "key is torch.int32"),
        (KEYS[None], 3, r"key is torch.int64 \[1, 25\]"),
        (KEYS, -1, "count is -1"),
    ],
)
def test_what_is_refused(key: torch.Tensor, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        normal(key, count)

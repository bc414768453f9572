"""gelu on each backend: row contract, oracle on both tails, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels.reference import backend as reference
from tests.kernels.backend import ROWS, examples, ops, small
from tests.kernels.contract import DTYPES, SEEDS, assert_gradients, assert_row_contract, normal

STEP = small(4_999, 400_009)  # between the fp32 numbers that are tried; prime, so that all last digits occur


def sweep(sign: int) -> Tensor:
    """fp32 [1, N]: every so many finite numbers of one sign, from 0 to the greatest, and densely what is near 1."""
    spread = torch.arange(0, 0x7F800000, STEP, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return sign * torch.cat([spread, torch.linspace(0, 15, small(500_000, 5_000))])[None]


def exact(x: Tensor) -> Tensor:
    """x Phi(x) in float64, by erfc, which loses nothing where Phi is small."""
    wide = x.double()
    return wide * 0.5 * torch.special.erfc(wide * -(0.5**0.5))


def exact_slope(x: Tensor) -> Tensor:
    """Phi(x) + x phi(x) in float64."""
    wide = x.double()
    density = torch.exp(-wide * wide / 2) / (2 * torch.pi) ** 0.5
    return 0.5 * torch.special.erfc(wide * -(0.5**0.5)) + wide * density.where(wide.abs() < 40, 0)


def ulps(got: Tensor, wanted: Tensor) -> Tensor:
    """Errors in units of the last place of the fp32 nearest to what is wanted; 0 where that is beyond fp32's range."""
    nearest = wanted.float().abs()
    unit = torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest
    return ((got.double() - wanted).abs() / unit.double()).nan_to_num(0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, width=st.sampled_from([1, 7, 8, 17, 61, 128]), seed=SEEDS)
@examples(15)
def test_row_contract(rows: int, width: int, seed: int, dtype: torch.dtype) -> None:
    assert_row_contract(ops.gelu, (3 * normal(seed, rows, width, dtype=dtype),), seed)


def test_gradient_keeps_the_row_contract() -> None:
    def dx(x: Tensor, grad: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(ops.gelu(x), x, grad)[0]

    assert_row_contract(dx, (3 * normal(1, 40, 61), normal(2, 40, 61)), 3)


def test_control_scaled_by_the_batch() -> None:
    """The check sees an input that is scaled by the greatest value of all rows, as a quantised layer's is."""
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(lambda x: ops.gelu(x / x.abs().max()), (normal(1, 40, 64),), 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_oracle(sign: int) -> None:
    """Within 2 units in the last place, from the smallest denormal to the greatest number, and so where gelu(-5) is
    -1.4e-6 and where results are denormal."""
    x = sweep(sign)
    assert float(ulps(ops.gelu(x), exact(x)).max()) <= 2
    narrow = x[x.abs() < 1e38].bfloat16()[None]
    error = (ops.gelu(narrow).double() - exact(narrow)).abs()
    half = 1.001 * (2.0**-8 * exact(narrow).abs() + 2.0**-134)  # of a unit of bf16, and of a denormal's
    assert bool((error <= half).all())


def test_control_one_plus_erf_loses_the_tail() -> None:
    """The measure sees what the plain formula does: at -5, 1 + erf has a few digits left, if any."""
    x = torch.linspace(-5, -4, 1000)[None]
    plain = x * 0.5 * (1 + torch.erf(x * 0.5**0.5))
    assert float(ulps(plain, exact(x)).max()) > 10_000
    assert float((ops.gelu(x).double() / exact(x) - 1).abs().max()) <= 2.0**-22


def test_is_torchs() -> None:
    x = 3 * normal(1, 50, 61)
    assert torch.allclose(ops.gelu(x).double(), F.gelu(x.double()), rtol=1e-6, atol=1e-14)
    assert torch.allclose(reference.gelu(x), ops.gelu(x), rtol=1e-6, atol=0)
    assert not torch.allclose(ops.gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)  # the other GELU


def test_ends() -> None:
    """Limits, and what is not a number in torch: -inf times 0; of the derivative inf times 0."""
    x = torch.tensor([[0.0, 20.0, -20.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]])
    assert torch.equal(ops.gelu(x).nan_to_num(7), torch.tensor([[0, 20, 0, 3e38, 0, torch.inf, 7, 7]]).nan_to_num(7))
    assert torch.equal(slope(x).nan_to_num(7), torch.tensor([[0.5, 1, 0, 1, 0, 7, 7, 7]]))


def slope(x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(ops.gelu(leaf), leaf, torch.ones_like(x))[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_slope_oracle(sign: int) -> None:
    """The derivative within 2^-22 of its greatest values, 1; and, beyond its zero at -0.75, within 4 units in the last
    place."""
    x = sweep(sign)
    got, wanted = slope(x), exact_slope(x)
    assert float((got.double() - wanted).abs().max()) <= 2.0**-22
    assert float(ulps(got, wanted)[x.abs() > 1.5].max()) <= 4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gradients(dtype: torch.dtype, bound: float) -> None:
    assert_gradients(ops.gelu, reference.gelu, (3 * normal(1, 100, 29, dtype=dtype),), 2, bound)
    assert_gradients(ops.gelu, F.gelu, (3 * normal(1, 100, 29, dtype=dtype),), 2, bound)


def test_control_gradient_of_the_other_gelu() -> None:
    with pytest.raises(AssertionError):
        assert_gradients(ops.gelu, lambda x: F.gelu(x, approximate="tanh"), (3 * normal(1, 100, 29),), 2, 1e-6)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"gelu: x is \(3, 5, 2\), not \[T, N\]"):
        ops.gelu(normal(1, 3, 5, 2))
    with pytest.raises(ValueError, match=r"gelu: x is torch\.float64"):
        ops.gelu(normal(1, 3, 4).double())
    with pytest.raises(ValueError, match=r"strides \(1, 4\); need float32 or bfloat16 with adjacent columns"):
        ops.gelu(normal(1, 3, 4).T)

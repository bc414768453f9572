"""Sums over whole tensors and AdamW's update: one answer on every backend, for any number of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.layout import AdamWStep
from kernels.reference import backend as reference
from tests.kernels.backend import native_only, ops, small
from tests.kernels.contract import normal, threads

SIZES = [1, 7, 8, 9, 4095, 4096, 4097, small(100_003, 9_000)]


@pytest.mark.parametrize("size", SIZES)
def test_dot_is_the_definition_bit_for_bit(size: int) -> None:
    a, b = normal(1, size), normal(2, size)
    got = ops.dot(a, b)
    assert got.dtype == torch.float64 and got.shape == ()
    assert torch.equal(got, reference.dot(a, b))
    exact = math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert float(got) == pytest.approx(exact, rel=1e-12, abs=1e-12)


@native_only
def test_dot_does_not_see_threads() -> None:
    a, b = normal(1, 300_001), normal(2, 300_001)
    with threads(1):
        one = ops.dot(a, b)
    for count in (2, 3, 4):
        with threads(count):
            assert torch.equal(ops.dot(a, b), one)


def test_control_another_order_gives_another_sum() -> None:
    """Terms whose sum in fp64 depends on the order for certain: 1 and many halves of its last place."""
    a = torch.full((4096,), 2.0**-27)
    a[0] = 1.0
    b = a.clone()  # products 1 and 2^-54, half of half of the last place of 1
    whole = float(ops.dot(a, b))
    chain = 0.0
    for x in a.tolist():
        chain += x * x
    assert chain == 1.0 != whole
    assert whole == float(reference.dot(a, b)) and abs(whole - math.fsum(x * x for x in a.tolist())) < 1e-12


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3), torch.zeros(4), "a has 3 elements, b 4"),
        (torch.zeros(3).double(), torch.zeros(3), "a is torch.float64"),
        (torch.zeros(3), torch.zeros(6)[::2], "b is .*strides"),
    ],
)
def test_dot_refuses(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.dot(a, b)


def state(size: int) -> list[torch.Tensor]:
    return [normal(1, size), normal(2, size) * 3, normal(3, size) / 10, normal(4, size).square()]


NUMBERS = AdamWStep.build(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.02, taken=6)


@pytest.mark.parametrize("size", SIZES)
def test_adamw_is_the_definition_bit_for_bit(size: int) -> None:
    ours, wanted = state(size), state(size)
    ops.adamw(*ours, NUMBERS)
    reference.adamw(*wanted, NUMBERS)
    for got, right in zip(ours, wanted, strict=True):
        assert torch.equal(got, right)


def test_adamw_is_torchs_up_to_rounding() -> None:
    """Twelve updates of torch.optim.AdamW in fp64."""
    weight = normal(5, 500)
    oracle = weight.double().requires_grad_()
    plain = torch.optim.AdamW([oracle], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02)
    first, second = torch.zeros(500), torch.zeros(500)
    for taken in range(12):
        gradient = normal(10 + taken, 500)
        oracle.grad = gradient.double()
        plain.step()
        numbers = AdamWStep.build(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.02, taken=taken)
        ops.adamw(weight, gradient, first, second, numbers)
    assert float((weight.double() - oracle.detach()).abs().max()) < 4e-6  # a unit in the last place of 2 at each update


def test_control_a_root_rounded_otherwise_is_another_update() -> None:
    """The second moment's roots one unit in the last place off: some weights change."""
    ours, other = state(4096), state(4096)
    ops.adamw(*ours, NUMBERS)
    weight, gradient, first, second = (x.numpy() for x in other)
    f = np.float32
    first = first + (gradient - first) * f(NUMBERS.new1)
    second = second * f(NUMBERS.old2) + gradient * gradient * f(NUMBERS.new2)
    root = np.nextafter(np.sqrt(second), f(np.inf))
    wrong = weight * f(NUMBERS.keep) - first / (root / f(NUMBERS.root) + f(NUMBERS.eps)) * f(NUMBERS.rate)
    assert not torch.equal(ours[0], torch.from_numpy(wrong))


def test_adamw_leaves_no_negative_zero_in_a_moment() -> None:
    """A state gathered from ranks by adding zeros keeps its bits only without them."""
    weight, first, second = torch.ones(9), torch.full((9,), -0.0), torch.zeros(9)
    ops.adamw(weight, torch.full((9,), -0.0), first, second, NUMBERS)
    assert not torch.signbit(first).any() and not torch.signbit(second).any()


def test_adamw_refuses_other_types_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"adamw: gradient is torch.float32, 4 elements"):
        ops.adamw(torch.zeros(3), torch.zeros(4), torch.zeros(3), torch.zeros(3), NUMBERS)
    with pytest.raises(ValueError, match=r"adamw: first is torch.bfloat16"):
        ops.adamw(torch.zeros(3), torch.zeros(3), torch.zeros(3).bfloat16(), torch.zeros(3), NUMBERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_its_gradient(dtype: torch.dtype) -> None:
    x, factor = normal(1, 70, 33, dtype=dtype).requires_grad_(), torch.tensor([1.25], dtype=dtype, requires_grad=True)
    upstream = normal(2, 70, 33, dtype=dtype)
    out = ops.scale(x, factor)
    assert torch.equal(out, x * factor)
    dx, dfactor = torch.autograd.grad(out, (x, factor), upstream)
    assert torch.equal(dx, upstream * factor)
    exact = float((x.detach().double() * upstream.double()).sum())
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert dfactor.shape == (1,) and float(dfactor) == pytest.approx(exact, rel=rounding)


@native_only
def test_scales_gradient_does_not_see_threads() -> None:
    """Large enough that torch's own sum would be split (above 32,768 elements)."""
    x, upstream = normal(1, 400, 512), normal(2, 400, 512)

    def gradient() -> torch.Tensor:
        factor = torch.ones(1, requires_grad=True)
        return torch.autograd.grad(ops.scale(x, factor), factor, upstream)[0]

    with threads(1):
        one = gradient()
    for count in (2, 3, 4):
        with threads(count):
            assert torch.equal(gradient(), one)

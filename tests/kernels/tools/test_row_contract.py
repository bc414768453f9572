"""The checks of the row contract on a device: they hold for the ops of this machine, and see what breaks it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.tools import device_rows
from kernels.tools.row_contract import (
    attention_differences,
    convolution_differences,
    gradient_differences,
    row_differences,
    same,
)
from tests.kernels.contract import normal

X = normal(0, 40, 16)


def test_every_op_on_this_machine() -> None:
    report = device_rows.run(device_rows.GROUPS, device_rows.DRY)
    assert len(report["rows"]) == 41 and not any(report["rows"].values())
    assert len(report["controls"]) == 2 and all(report["controls"].values())


def test_bits_not_values() -> None:
    assert same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert same(torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize(
    "op, seen",
    [
        (lambda x: x * (1 + (len(x) == 17)), "17 rows from 0"),
        (lambda x: x.cumsum(0), "another order"),
        (lambda x: x + (x.abs().max() > 1.5 * X.abs().max()), "among other rows"),
        (lambda x: x + (x.stride(0) > 16), "rows that do not adjoin"),
    ],
)
def test_control_rows(op: Any, seen: str) -> None:
    assert seen in row_differences(op, (X,), strides=True)
    assert row_differences(lambda x: 2 * x, (X,), strides=True) == []


def test_control_gradients() -> None:
    class Uneven(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * (1 + torch.finfo(torch.float32).eps * (len(grad) > 17))

    assert gradient_differences(Uneven.apply, (X,)) == [f"{n} rows from {f}" for n in (1, 3, 17) for f in places(n)]
    assert gradient_differences(lambda x, w: x * w, (X,), (normal(1, 16),)) == []


def places(count: int) -> list[int]:
    return [0, (40 - count) // 3, 40 - count]


def test_control_attention() -> None:
    """Another result with a cache, and for a sequence that has another one beside it."""
    inputs = [normal(2, 70, heads, 32) for heads in (4, 2, 2)] + [normal(3, 70, 4, 16)]
    bias, how = 0.02 * normal(4, 16, 512), (1 / 32, None, ((70,), (5, 1, 2)))
    assert attention_differences(inputs, bias, *how) == []
    real = ops.attention

    def cached(*args: Tensor, **named: Any) -> Tensor:
        return real(*args, **named) * (1 if named["cache"] is None else 1 + 2**-23)  # type: ignore[arg-type]

    def beside(*args: Any, **named: Any) -> Tensor:
        return real(*args, **named) * (1 + 2**-20 * (len(args[0]) == 105))

    with mock.patch.object(ops, "attention", cached):
        assert attention_differences(inputs, bias, *how) == ["cache, 70 rows from 0", "cache, 5 rows from 0"]
    with mock.patch.object(ops, "attention", beside):
        assert attention_differences(inputs, bias, *how) == ["gradients beside another sequence"]


def test_control_convolution() -> None:
    x, taps, cut = normal(5, 9, 32), normal(6, 32, 4), (1, 2, 6)
    assert convolution_differences(x, taps, cut) == []
    real = ops.short_conv

    def forgetful(x: Tensor, weight: Tensor, segments: Any, state: Tensor | None = None) -> Tensor:
        out = real(x, weight, segments, state)
        if state is not None:
            state[:, 0] = 0
        return out

    with mock.patch.object(ops, "short_conv", forgetful):
        assert convolution_differences(x, taps, cut) == ["state, 6 rows from 3"]


def test_a_check_that_raises_is_a_difference_and_a_control_that_raises_is_not_caught() -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no such kernel")

    with mock.patch.object(ops, "linear", broken):
        report = device_rows.run(("products", "controls"), device_rows.DRY)
    linear = [found for name, found in report["rows"].items() if name.startswith("linear")]
    assert linear and all("no such kernel" in found[0] for found in linear)
    assert not any(report["controls"].values())

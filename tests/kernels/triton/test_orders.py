"""Orders of reduction that `kernels.triton.tiles` states: an expert's two forms are one, chains are the reference's."""

from __future__ import annotations

import pytest
import torch

from kernels.layout import Segments
from kernels.reference import backend as reference
from kernels.triton import launch
from kernels.triton.experts import expert_product
from kernels.triton.linear import weight_of
from tests.kernels.backend import device, ops
from tests.kernels.contract import DTYPES, normal
from tests.kernels.test_experts import EXPERTS, FAN_OUT, chosen, groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 23])
def test_both_forms_of_experts(rows: int, dtype: torch.dtype) -> None:
    weight = weight_of(ops.pack_experts(*groups(1, 50, 61, dtype)), "test")
    x, expert = launch.aligned(normal(2, rows, 61, dtype=dtype).to(device())), chosen(3, rows * FAN_OUT).to(device())
    forms = {}
    for form in ("gather", "grouped"):
        forms[form] = x.new_full((rows * FAN_OUT, 50), torch.nan)
        expert_product(x, weight, expert, FAN_OUT, forms[form], weight.shape[2], (1, weight.stride(1)), form)
    assert torch.equal(forms["gather"], forms["grouped"])
    other = torch.full_like(forms["gather"], torch.nan)  # control
    expert_product(x, weight, (expert + 1) % EXPERTS, FAN_OUT, other, weight.shape[2], (1, weight.stride(1)), "gather")
    assert not torch.equal(other, forms["grouped"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_forms_of_the_input_gradient(dtype: torch.dtype) -> None:
    weight = weight_of(ops.pack_experts(*groups(1, 50, 61, dtype)), "test")
    grad, expert = launch.aligned(normal(2, 40, 50, dtype=dtype).to(device())), chosen(3, 40).to(device())
    out = [grad.new_empty(40, 61, dtype=torch.float32) for _ in range(2)]
    for form, rows in zip(("gather", "grouped"), out, strict=True):
        expert_product(grad, weight, expert, 1, rows, 50, (weight.stride(1), 1), form)
    assert torch.equal(*out)


@pytest.mark.skipif(not launch.INTERPRET, reason="a GPU's units fuse or truncate as they please, alike for every row")
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_the_references(dtype: torch.dtype) -> None:
    """In the interpreter a product is a chain over k in ascending order over all tiles: the reference's bits."""
    w, x = normal(1, 70, 300, dtype=dtype), normal(2, 20, 300, dtype=dtype)
    expected = reference.linear(x, reference.pack_linear((w,)), torch.float32)
    assert torch.equal(ops.linear(x, ops.pack_linear(w), torch.float32), expected)
    backwards = ops.linear(x.flip(1).contiguous(), ops.pack_linear(w.flip(1).contiguous()), torch.float32)  # control
    assert not torch.equal(backwards, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chains_are_the_references(dtype: torch.dtype) -> None:
    """Products and sums rounded one by one in a stated order: the reference's bits on every device."""
    y, share = normal(1, 50 * 8, 64, dtype=dtype), normal(2, 50, 8)
    expected = reference.moe_combine(y, share)
    assert torch.equal(ops.moe_combine(y, share), expected)
    backwards = y.view(50, 8, 64).flip(1).reshape(-1, 64), share.flip(1).contiguous()  # control
    assert not torch.equal(ops.moe_combine(*backwards), expected)
    taps, x, segments = normal(1, 61, 4), normal(2, 60, 61, dtype=dtype), Segments.build([0, 1], [0, 0], [3, 57])
    assert torch.equal(ops.short_conv(x, taps, segments), reference.short_conv(x, taps, segments, None))

"""Strides, distances and alignment."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from tests.kernels.contract import DTYPES, strided
from tests.kernels.faults.cases import (
    BY_NAME,
    CASES,
    DIFFERENTIABLE,
    HEADS,
    WRITTEN,
    Inputs,
    attend,
    attention_inputs,
    call,
    gradients,
    same,
)


def _layouts(x: Tensor) -> list[Tensor]:
    """With a column between its columns, transposed in memory, and its first row over and over in one place."""
    wide, turned = torch.stack([x, x], -1)[..., 0], x.transpose(0, -1).contiguous().transpose(0, -1)
    return [wide, turned, x[:1].expand_as(x)]


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_is_right_or_refused(name: str, dtype: torch.dtype) -> None:
    """Each input in turn; what is written to is refused when two of its elements share memory."""
    inputs = CASES[name].make(3, 9, 13, dtype)
    refused = 0
    for key, x in inputs.items():
        for layout in _layouts(x):
            expected = call(name, inputs | {key: layout.contiguous()})
            try:
                got = CASES[name].call(inputs | {key: layout})
            except ValueError:
                refused += 1
            else:
                same(got, expected, f"{name}: {key} strides {layout.stride()}")
                assert key not in WRITTEN or layout.is_contiguous()
    assert refused > 0


@DIFFERENTIABLE
@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradients_of_any_layout(name: str, dtype: torch.dtype) -> None:
    """As `sum().backward()` gives them: one number over and over in one place; and strided ones."""
    inputs = CASES[name].make(3, 9, 13, dtype)
    makers = [lambda x: x.new_ones(()).expand_as(x), *(lambda x, i=i: _layouts(x.cos())[i] for i in range(3))]
    for make in makers:
        expected = gradients(name, inputs, lambda x, make=make: make(x).contiguous())
        same(tuple(gradients(name, inputs, make)), tuple(expected), name)


def moved(x: Tensor, by: int) -> Tensor:
    """A copy that begins ``by`` bytes past a boundary of 64 bytes."""
    size = x.element_size()
    memory = bytearray(x.numel() * size + 192)
    base = torch.frombuffer(memory, dtype=torch.uint8)
    offset = -base.data_ptr() % 64 + by
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    base[offset : offset + x.numel() * size] = x.contiguous().view(-1).view(torch.uint8)
    assert copy.data_ptr() % 64 == by
    return copy


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_off(name: str, dtype: torch.dtype) -> None:
    """As in a slice: aligned for an element and for no vector."""
    inputs = CASES[name].make(5, 11, 19, dtype)
    slid = {key: moved(x, x.element_size()) for key, x in inputs.items()}
    same(CASES[name].call(slid), call(name, inputs), name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
def test_huge_strides(name: str) -> None:
    """Rows more than 2^31 elements apart, in memory that is reserved and, but for the rows, never touched."""
    case = CASES[name]
    inputs = case.make(7, 2, 33, torch.float32)
    expected = call(name, inputs)
    far: Inputs = {}
    for key in case.rows:
        x = inputs[key].to(torch.uint8) if name == "embedding_sum" else inputs[key]
        apart = 2**31 + 5
        size = (apart + x[0].numel()) * x.element_size()
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for
        memory = mmap.mmap(-1, size, flags=private)
        far[key] = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (apart, *x.stride()[1:]))
        far[key].copy_(x)
    same(call(name, inputs | far), expected, name)


def test_strided_heads() -> None:
    """attention's rows may lie apart; its heads may not."""
    inputs = attention_inputs(3, 40, 16, torch.float32)
    expected = attend(inputs)
    apart = {key: strided(inputs[key].flatten(1)).unflatten(1, inputs[key].shape[1:]) for key in HEADS}
    same(attend(inputs | apart), expected, "rows apart")

"""swiglu, moe_combine and embedding_sum in Triton: row contract, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.triton.elementwise import moe_combine, swiglu
from kernels.triton.embedding import embedding_sum
from tests.kernels.contract import (
    DTYPES,
    SEEDS,
    assert_gradients,
    assert_row_contract,
    generator,
    normal,
    relative_error,
    uneven_sum,
)
from tests.kernels.triton.device import device, there

ROWS, WIDTHS = st.integers(1, 100), st.sampled_from([1, 7, 64, 130])
BINS, FAN_OUT = 16, 3


# ---- swiglu ----


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, half=WIDTHS, seed=SEEDS)
@settings(max_examples=6)
def test_swiglu_row_contract(rows: int, half: int, seed: int, dtype: torch.dtype) -> None:
    assert_row_contract(there(swiglu), (normal(seed, rows, 2 * half, dtype=dtype),), seed)


def test_swiglu_oracle() -> None:
    """A GPU's exp errs by 2 units and by the rounding of its argument times log2 e; at the ends limits 0, g u."""
    x = normal(1, 100, 2 * 61) * 10
    gate, up = x.double().chunk(2, dim=1)
    exact = gate * torch.sigmoid(gate) * up
    bound = (6 + 2 * gate.abs()) * 2.0**-23 * exact.abs()
    assert bool(((there(swiglu)(x).double() - exact).abs() <= bound).all())
    ends = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 3.0, 4.0]])
    assert there(swiglu)(ends).tolist() == [[0.0, 600.0, 0.0]]
    narrow = x.bfloat16()
    gate, up = narrow.double().chunk(2, dim=1)
    assert relative_error(there(swiglu)(narrow), gate * torch.sigmoid(gate) * up) <= 2.0**-8


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_swiglu_gradients(dtype: torch.dtype, bound: float) -> None:
    assert_gradients(there(swiglu), reference.swiglu, (normal(1, 50, 2 * 29, dtype=dtype),), 2, bound)


def test_swiglu_errors() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\), not \[T, 2I\]"):
        swiglu(normal(1, 3, 5).to(device()))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        swiglu(normal(1, 3, 4).to(device()).double())


# ---- moe_combine ----


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, width=WIDTHS, seed=SEEDS)
@settings(max_examples=6)
def test_combine_row_contract(rows: int, width: int, seed: int, dtype: torch.dtype) -> None:
    y = normal(seed, rows, FAN_OUT * width, dtype=dtype)

    def op(y: Tensor, weight: Tensor) -> Tensor:
        return moe_combine(y.contiguous().view(-1, width), weight.contiguous())

    assert_row_contract(there(op), (y, normal(seed + 1, rows, FAN_OUT)), seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_equals_reference(dtype: torch.dtype) -> None:
    """Ascending experts, every product and sum rounded: the reference's bits; another order of the sum gives others."""
    y, weight = normal(1, 50 * 8, 64, dtype=dtype), normal(2, 50, 8)
    got = there(moe_combine)(y, weight)
    assert torch.equal(got, reference.moe_combine(y, weight))
    backwards = y.view(50, 8, 64).flip(1).reshape(-1, 64)
    assert not torch.equal(got, there(moe_combine)(backwards, weight.flip(1).contiguous()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [61, 2100])
def test_combine_gradients(width: int, dtype: torch.dtype, bound: float) -> None:
    inputs = (normal(1, 10 * FAN_OUT, width, dtype=dtype), normal(2, 10, FAN_OUT))
    assert_gradients(there(moe_combine), reference.moe_combine, inputs, 3, bound)


def test_combine_errors() -> None:
    with pytest.raises(ValueError, match=r"y is \(5, 4\), not \[2 \* 3, D\]"):
        moe_combine(normal(1, 5, 4).to(device()), normal(2, 2, 3).to(device()))
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16"):
        moe_combine(normal(1, 6, 4).to(device()), normal(2, 2, 3).bfloat16().to(device()))


# ---- embedding_sum ----


def some_codes(seed: int, rows: int, channels: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, BINS, (rows, channels), generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, channels=st.sampled_from([1, 5, 12]), width=WIDTHS, seed=SEEDS)
@settings(max_examples=4)
def test_embedding_row_contract(rows: int, channels: int, width: int, seed: int, dtype: torch.dtype) -> None:
    table = normal(seed, channels * BINS, width, dtype=dtype).to(device())
    codes = some_codes(seed, rows, channels)
    assert_row_contract(there(lambda codes: embedding_sum(codes, table, BINS)), (codes,), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_embedding_equals_reference(code_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Only additions, in a stated order: the reference's bits exactly."""
    codes, table = some_codes(1, 20, 30, code_dtype), normal(2, 30 * BINS, 130, dtype=dtype)
    assert torch.equal(there(embedding_sum)(codes, table, BINS), reference.embedding_sum(codes, table, BINS))


def test_embedding_control_order_of_channels() -> None:
    codes, table = some_codes(1, 40, 20), normal(2, 20 * BINS, 64)
    backwards, rows = table.view(20, BINS, 64).flip(0).reshape(-1, 64), table.view(20, BINS, 64)
    op = there(embedding_sum)
    assert not torch.equal(op(codes, table, BINS), op(codes.flip(1), backwards, BINS))
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda codes: uneven_sum(rows[torch.arange(20), codes.long()].transpose(1, 2), len(codes)), (codes,), 0
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bins", [16, 20])
def test_embedding_gradient(bins: int, dtype: torch.dtype, bound: float) -> None:
    codes = some_codes(1, 70, 4)
    assert_gradients(
        there(lambda table: embedding_sum(codes.to(device()), table, bins)),
        lambda table: reference.embedding_sum(codes, table, bins),
        (normal(2, 4 * bins, 61, dtype=dtype),),
        3,
        bound,
    )


def test_embedding_errors() -> None:
    codes, table = some_codes(1, 4, 5).to(device()), normal(2, 5 * BINS, 8).to(device())
    assert embedding_sum(codes[:0], table, BINS).shape == (0, 8)
    for dtype, wrong in ((torch.uint8, 16), (torch.int16, -1), (torch.int64, 2**40)):
        bad = codes.to(dtype)
        bad[2, 3] = wrong
        with pytest.raises(ValueError, match=rf"codes\[2, 3\] is {wrong}, outside 0\.\.15"):
            embedding_sum(bad, table, BINS)
    with pytest.raises(ValueError, match=r"codes is \(4, 4\)"):
        embedding_sum(codes[:, 1:], table, BINS)
    with pytest.raises(ValueError, match=r"codes is torch\.float32"):
        embedding_sum(codes.float(), table, BINS)

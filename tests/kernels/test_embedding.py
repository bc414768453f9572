"""embedding_sum on each backend: row contract, oracle, gradient, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import backend as reference
from tests.kernels.backend import ROWS, examples, ops, small
from tests.kernels.contract import (
    DTYPES,
    SEEDS,
    assert_gradients,
    assert_row_contract,
    generator,
    normal,
    telling,
    uneven_sum,
)

BINS = 16


def some_codes(seed: int, rows: int, channels: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, BINS, (rows, channels), generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, channels=st.sampled_from([1, 5, small(80, 12)]), width=st.sampled_from([1, 7, 61, 128]), seed=SEEDS)
@examples(20, 3)
def test_row_contract(rows: int, channels: int, width: int, seed: int, dtype: torch.dtype) -> None:
    table = normal(seed, channels * BINS, width, dtype=dtype)
    assert_row_contract(lambda codes: ops.embedding_sum(codes, table, BINS), (some_codes(seed, rows, channels),), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_equals_reference(code_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Only additions, in a stated order: the reference's bits exactly, which is the oracle here."""
    codes, table = some_codes(1, 20, 30, code_dtype), normal(2, 30 * BINS, 130, dtype=dtype)
    assert torch.equal(ops.embedding_sum(codes, table, BINS), reference.embedding_sum(codes, table, BINS))


def test_control_order_of_channels() -> None:
    """Channel 0 gives 1, each of the others 2^-24, whatever the code."""
    codes, table = some_codes(1, 40, 80), telling(64, 80).repeat_interleave(BINS, 1).T.contiguous()
    backwards = table.view(80, BINS, 64).flip(0).reshape(-1, 64)
    assert not torch.equal(ops.embedding_sum(codes, table, BINS), ops.embedding_sum(codes.flip(1), backwards, BINS))
    rows = table.view(80, BINS, 64)
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda codes: uneven_sum(rows[torch.arange(80), codes.long()].transpose(1, 2), len(codes)), (codes,), 0
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bins", [16, 20])
def test_gradient(bins: int, dtype: torch.dtype, bound: float) -> None:
    codes = some_codes(1, small(300, 70), 4)
    assert_gradients(
        lambda table: ops.embedding_sum(codes, table, bins),
        lambda table: reference.embedding_sum(codes, table, bins),
        (normal(2, 4 * bins, 61, dtype=dtype),),
        3,
        bound,
    )


def test_errors() -> None:
    codes, table = some_codes(1, 4, 5), normal(2, 5 * BINS, 8)
    assert ops.embedding_sum(codes[:0], table, BINS).shape == (0, 8)
    for dtype, wrong in ((torch.uint8, 16), (torch.int16, -1), (torch.int64, 2**40)):
        bad = codes.to(dtype)
        bad[2, 3] = wrong
        with pytest.raises(ValueError, match=rf"codes\[2, 3\] is {wrong}, outside 0\.\.15"):
            ops.embedding_sum(bad, table, BINS)
    with pytest.raises(ValueError, match=r"codes is \(4, 4\)"):
        ops.embedding_sum(codes[:, 1:], table, BINS)
    with pytest.raises(ValueError, match=r"codes is torch\.float32"):
        ops.embedding_sum(codes.float(), table, BINS)

"""The wrong ops of the controls are wrong by IEEE 754 alone: on every machine, and by what they say."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.contract import DTYPES, FEW_ROWS, assert_row_contract, normal, telling, uneven, uneven_sum


@pytest.mark.parametrize("width", [8, 80, 128])
def test_orders_of_a_sum(width: int) -> None:
    x = telling(3, width)
    assert uneven_sum(x, 1).tolist() == [1.0] * 3
    assert uneven_sum(x, 3).tolist() == uneven_sum(x, 2).tolist() == [1.0 + width // 2 * 2.0**-24] * 3
    with pytest.raises(AssertionError, match=r"a row alone: 1 of 1 rows differ"):
        assert_row_contract(lambda x: uneven_sum(x, len(x)), (x,), 0)
    assert_row_contract(lambda x: uneven_sum(x, 2), (x,), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_many_rows_moves(dtype: torch.dtype) -> None:
    x = normal(1, FEW_ROWS, 1000, dtype=dtype)
    same = uneven(lambda x: x)
    assert bool((same(x) != x).all()) and torch.equal(same(x[1:]), x[1:])
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(same, (x,), 0)

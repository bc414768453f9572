"""Odd sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.contract import DTYPES, SEEDS
from tests.kernels.faults.cases import BY_NAME, CASES, DIFFERENTIABLE, F64, WIDTHS, call, gradients, oracle


@BY_NAME
@given(rows=st.sampled_from([0, 1, 2, 17, 70]), width=WIDTHS, dtype=st.sampled_from(DTYPES), seed=SEEDS)
@settings(max_examples=25)
def test_odd_sizes(name: str, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    """No rows, one column, widths that fill no vector and no tile: close to float64 where an oracle is apt; finite."""
    inputs = CASES[name].make(seed, rows, width, dtype)
    outputs = call(name, inputs)
    assert all(torch.isfinite(x).all() for x in outputs)
    if name in F64:
        exact = oracle(name, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()})
        # Loose on purpose: wrong memory or a wrong column is far off. Exact bounds are each op's own test's.
        assert torch.allclose(outputs[0].double(), exact, rtol=0.05, atol=0.05 * max(1.0, width**0.5))


@DIFFERENTIABLE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37])
def test_gradients_of_no_rows(name: str, dtype: torch.dtype, width: int) -> None:
    """No rows give the weights a gradient of exactly 0, not the memory that happened to be there."""
    inputs = CASES[name].make(5, 0, width, dtype)
    for gradient in gradients(name, inputs, torch.ones_like):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["linear", "expert_linear", "swiglu", "gelu", "moe_combine", "short_conv", "embedding_sum"]
)
def test_no_columns(name: str, dtype: torch.dtype) -> None:
    """Vectors of no elements: a product over none is 0; other results have no elements either."""
    outputs = call(name, CASES[name].make(5, 7, 0, dtype))
    assert not outputs[0].any()
    assert outputs[0].shape[0] == (14 if name == "expert_linear" else 7)

"""rms_norm on each backend: row contract, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import backend as reference
from tests.kernels.backend import ROWS, examples, ops, small
from tests.kernels.contract import (
    DTYPES,
    SEEDS,
    assert_gradients,
    assert_row_contract,
    normal,
    relative_error,
    strided,
    telling,
    uneven_sum,
)

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, width=st.sampled_from([1, 5, 16, 32, 61, 128, 200]), seed=SEEDS)
@examples(25, 5)
def test_row_contract(rows: int, width: int, seed: int, dtype: torch.dtype) -> None:
    weight = normal(seed + 1, width, dtype=dtype)
    assert_row_contract(lambda x: ops.rms_norm(x, weight, EPS), (normal(seed, rows, width, dtype=dtype),), seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_equal_rows(dtype: torch.dtype) -> None:
    """x [T, H, D], a view into a fused projection, gives the bits of its rows [T * H, D]; wherever they lie."""
    weight, fused = normal(1, 32, dtype=dtype), normal(2, 50, 320, dtype=dtype)
    heads = fused[:, 64:192].view(50, 4, 32)
    got = ops.rms_norm(heads, weight, EPS)
    assert got.shape == (50, 4, 32)
    assert torch.equal(got.view(200, 32), ops.rms_norm(heads.reshape(200, 32), weight, EPS))
    assert torch.equal(got, ops.rms_norm(strided(heads), weight, EPS))
    assert torch.equal(got[7:8], ops.rms_norm(heads[7:8], weight, EPS))


def test_control_sum_by_row_count() -> None:
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda x: x / torch.sqrt(uneven_sum(x * x, len(x)) / 128 + EPS)[:, None], (telling(40, 128, 1, 2**-12),), 0
        )


def test_wide_rows() -> None:
    """5000 columns, which Triton takes in pieces: the row contract holds over them."""
    x, weight = normal(1, 3, 5000), normal(2, 5000)
    got = ops.rms_norm(x, weight, EPS)
    assert relative_error(got, reference.rms_norm(x.double(), weight.double(), EPS)) <= 1e-6
    assert torch.equal(got[1:2], ops.rms_norm(x[1:2], weight, EPS))


@pytest.mark.parametrize("width", [1, 61, 1000])
def test_float64_oracle(width: int) -> None:
    """n / 16 sequential steps, four of the tree and a few roundings, half of which the square root halves."""
    x, weight = normal(1, small(200, 40), width), normal(2, width)
    oracle = reference.rms_norm(x.double(), weight.double(), EPS)
    bound = (width / 16 + 12) * 2.0**-24
    assert bool(((ops.rms_norm(x, weight, EPS).double() - oracle).abs() <= bound * oracle.abs()).all())


def test_bf16_rounds_the_normed_value_first() -> None:
    """As in Inkling: round(x / rms), then times the weight and rounded again; equal to the reference in nearly every
    element (the fp32 sums differ in the last bit at times), and never off by more than those two roundings."""
    x, weight = normal(1, small(500, 100), 128, dtype=torch.bfloat16), normal(2, 128, dtype=torch.bfloat16)
    got, expected = ops.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)
    assert (got == expected).float().mean() > 0.999
    assert relative_error(got, expected) <= 2.0**-7
    rounded_once = (weight.float() * reference.rms_norm(x.float(), torch.ones(128), EPS)).bfloat16()
    assert not torch.equal(got, rounded_once)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 61), (small(300, 70), 128), (20, 4, 32), (2, 2100)])
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    inputs = (normal(1, *shape, dtype=dtype), normal(2, shape[-1], dtype=dtype))
    assert_gradients(lambda x, w: ops.rms_norm(x, w, EPS), lambda x, w: reference.rms_norm(x, w, EPS), inputs, 3, bound)


def test_extremes() -> None:
    assert ops.rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).tolist() == [[0.0] * 8] * 2
    assert ops.rms_norm(normal(1, 0, 8), torch.ones(8), EPS).shape == (0, 8)
    small = torch.full((1, 8), 1e-20)
    assert relative_error(ops.rms_norm(small, torch.ones(8), EPS), small.double() / EPS**0.5) <= 1e-6


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"x is \(3, 8\), weight \(7,\)"):
        ops.rms_norm(normal(1, 3, 8), torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"weight torch\.bfloat16"):
        ops.rms_norm(normal(1, 3, 8), torch.ones(8).bfloat16(), EPS)
    with pytest.raises(ValueError, match="adjacent columns"):
        ops.rms_norm(normal(1, 8, 3).T, torch.ones(8), EPS)

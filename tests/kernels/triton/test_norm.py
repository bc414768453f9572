"""rms_norm in Triton: row contract, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.triton.launch import norm_tile
from kernels.triton.norm import rms_norm
from tests.kernels.contract import (
    DTYPES,
    SEEDS,
    assert_gradients,
    assert_row_contract,
    normal,
    relative_error,
    strided,
    uneven_sum,
)
from tests.kernels.triton.device import device, there

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 50), width=st.sampled_from([1, 5, 16, 61, 128, 200]), seed=SEEDS)
@settings(max_examples=6)
def test_row_contract(rows: int, width: int, seed: int, dtype: torch.dtype) -> None:
    weight = normal(seed + 1, width, dtype=dtype).to(device())
    assert_row_contract(there(lambda x: rms_norm(x, weight, EPS)), (normal(seed, rows, width, dtype=dtype),), seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_equal_rows(dtype: torch.dtype) -> None:
    """x [T, H, D], a view into a fused projection, gives the bits of its rows [T * H, D]; wherever they lie."""
    weight, fused = normal(1, 32, dtype=dtype).to(device()), normal(2, 50, 320, dtype=dtype).to(device())
    heads = fused[:, 64:192].view(50, 4, 32)
    got = rms_norm(heads, weight, EPS)
    assert got.shape == (50, 4, 32)
    assert torch.equal(got.view(200, 32), rms_norm(heads.reshape(200, 32), weight, EPS))
    assert torch.equal(got, rms_norm(strided(heads), weight, EPS))


def test_wider_than_a_tile() -> None:
    """5000 columns are taken in pieces; the row contract holds over them."""
    assert norm_tile(5000).n < 5000
    x, weight = normal(1, 3, 5000), normal(2, 5000)
    got = there(lambda x, w: rms_norm(x, w, EPS))(x, weight)
    assert relative_error(got, reference.rms_norm(x.double(), weight.double(), EPS)) <= 1e-6
    assert torch.equal(got[1:2], there(lambda x, w: rms_norm(x, w, EPS))(x[1:2], weight))


def test_control_sum_by_row_count() -> None:
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda x: x / torch.sqrt(uneven_sum(x * x, len(x)) / 128 + EPS)[:, None], (normal(1, 40, 128),), 0
        )


@pytest.mark.parametrize("width", [1, 61, 1000])
def test_float64_oracle(width: int) -> None:
    """A tree over at most 2048 lanes is 11 sums deep; a few more roundings, half of which the square root halves."""
    x, weight = normal(1, 40, width), normal(2, width)
    oracle = reference.rms_norm(x.double(), weight.double(), EPS)
    got = there(lambda x, w: rms_norm(x, w, EPS))(x, weight)
    assert bool(((got.double() - oracle).abs() <= 20 * 2.0**-24 * oracle.abs()).all())


def test_bf16_rounds_the_normed_value_first() -> None:
    """As in Inkling: round(x / rms), then times the weight and rounded again; equal to the reference in nearly every
    element (the fp32 sums differ in the last bit at times), and never off by more than those two roundings."""
    x, weight = normal(1, 100, 128, dtype=torch.bfloat16), normal(2, 128, dtype=torch.bfloat16)
    got, expected = there(lambda x, w: rms_norm(x, w, EPS))(x, weight), reference.rms_norm(x, weight, EPS)
    assert (got == expected).float().mean() > 0.999
    assert relative_error(got, expected) <= 2.0**-7


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 61), (70, 128), (20, 4, 32), (2, 2100)])
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    inputs = (normal(1, *shape, dtype=dtype), normal(2, shape[-1], dtype=dtype))
    op, oracle = there(lambda x, w: rms_norm(x, w, EPS)), lambda x, w: reference.rms_norm(x, w, EPS)
    assert_gradients(op, oracle, inputs, 3, bound)


def test_extremes() -> None:
    ones = torch.ones(8, device=device())
    assert rms_norm(torch.zeros(2, 8, device=device()), ones, EPS).tolist() == [[0.0] * 8] * 2
    assert rms_norm(normal(1, 0, 8).to(device()), ones, EPS).shape == (0, 8)
    small = torch.full((1, 8), 1e-20, device=device())
    assert relative_error(rms_norm(small, ones, EPS), small.double() / EPS**0.5) <= 1e-6


def test_errors() -> None:
    x, ones = normal(1, 3, 8).to(device()), torch.ones(8, device=device())
    with pytest.raises(ValueError, match=r"x is \(3, 8\), weight \(7,\)"):
        rms_norm(x, ones[1:], EPS)
    with pytest.raises(ValueError, match=r"weight torch\.bfloat16"):
        rms_norm(x, ones.bfloat16(), EPS)
    with pytest.raises(ValueError, match="adjacent columns"):
        rms_norm(normal(1, 8, 3).to(device()).T, ones, EPS)

"""linear on each backend: row contract, float64 oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.layout import PackedLinear
from kernels.reference import backend as reference
from tests.kernels.backend import NATIVE, ROWS, examples, native_only, ops, small
from tests.kernels.contract import (
    DTYPES,
    SEEDS,
    assert_gradients,
    assert_row_contract,
    assert_same,
    normal,
    relative_error,
    threads,
    uneven_sum,
)

SHAPES = st.sampled_from(
    [(128, (128,)), (128, (256, 64)), (61, (50, 23)), (7, (1,)), (1, (17,)), (300, (33, 95)), (512, (160,))]
)


def weights(seed: int, cols: int, rows: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [normal(seed + i, n, cols, dtype=dtype) for i, n in enumerate(rows)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, shape=SHAPES, seed=SEEDS)
@examples(20)
def test_row_contract(rows: int, shape: tuple[int, tuple[int, ...]], seed: int, dtype: torch.dtype) -> None:
    cols, parts = shape
    packed = ops.pack_linear(*weights(seed, cols, parts, dtype))
    x = normal(seed + 9, rows, cols, dtype=dtype)
    assert_row_contract(lambda x: ops.linear(x, packed), (x,), seed)
    assert_row_contract(lambda x: ops.linear(x, packed, torch.float32), (x,), seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_row_count(dtype: torch.dtype) -> None:
    """Every way to cut rows into tiles, and the first block's edge, against the rows one by one."""
    packed = ops.pack_linear(*weights(1, 96, (200,), dtype))
    x = normal(2, 130, 96, dtype=dtype)
    alone = torch.cat([ops.linear(row[None], packed) for row in x])
    for rows in small([*range(1, 60), 95, 96, 97, 101, 130], [1, 2, 15, 16, 17, 63, 64, 65, 130]):
        assert_same(ops.linear(x[:rows], packed), alone[:rows], f"{rows} rows")


@native_only
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 2, 255, 256, 257, 511, 513])
def test_every_cut_of_k(cols: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Many rows take k in stretches and in blocks of rows; single ones take it whole."""
    packed = ops.pack_linear(*weights(1, cols, (37,), dtype))
    x = normal(2, 401, cols, dtype=dtype)
    alone = torch.cat([ops.linear(row[None], packed, out_dtype) for row in x])
    for rows in (23, 24, 25, 192, 193, 401):
        assert_same(ops.linear(x[:rows], packed, out_dtype), alone[:rows], f"{rows} rows")


def test_control_rows_in_the_sum() -> None:
    """The check sees an op whose order of summation follows the row count: any sum, and this op with K split where
    there are many rows. Of 512 terms the first is 1, two of the second half are 2^-24, farther apart than a tile of K
    is long: in ascending order both are rounded away, whatever the order within a tile, and not if they meet first."""
    w, x = torch.ones(40, 512), torch.zeros(31, 512)
    x[:, 0], x[:, 256], x[:, 384] = 1.0, 2.0**-24, 2.0**-24

    def split_k(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return ops.linear(x, ops.pack_linear(w))
        (a, b), pack = x.chunk(2, dim=1), ops.pack_linear(w[:, :256].contiguous())
        return ops.linear(a, pack) + ops.linear(b, pack)

    with pytest.raises(AssertionError, match=r"a row alone: .* differ"):
        assert_row_contract(split_k, (x,), 0)
    with pytest.raises(AssertionError, match=r"a row alone: .* differ"):
        assert_row_contract(lambda x: uneven_sum(x[:, None] * w, len(x)), (x,), 0)


def test_control_one_weight() -> None:
    """One weight changed changes its column, once repacked and not before."""
    w = normal(1, 32, 64)
    packed, x = ops.pack_linear(w), normal(2, 5, 64)
    before = ops.linear(x, packed)
    packed.parts[0][3, 4] += 0.01
    assert torch.equal(ops.linear(x, packed), before)
    ops.repack(packed)
    after = ops.linear(x, packed)
    assert (after != before).any(0).nonzero()[:, 0].tolist() == [3]
    assert torch.equal(after, ops.linear(x, ops.pack_linear(*packed.parts)))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", small([1, 5, 200], [1, 70]))
def test_float64_oracle(rows: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """A chain of K fused steps errs by at most K u sum |x||w|, u = 2^-24; with each product and each sum rounded by
    twice that, and matrix units may cut off where an adder rounds: twice again. Rounding to bf16 adds 2^-8 |y|."""
    cols = 300
    parts, x = weights(3, cols, (40, 41), dtype), normal(4, rows, cols, dtype=dtype)
    w = torch.cat(parts).double()
    y = x.double() @ w.T
    bound = (1.01 if NATIVE else 4) * cols * 2.0**-24 * (x.double().abs() @ w.abs().T)
    if out_dtype == torch.bfloat16:
        bound = bound * (1 + 2.0**-8) + 2.0**-8 * y.abs()
    got = ops.linear(x, ops.pack_linear(*parts), out_dtype)
    assert got.dtype == out_dtype
    assert bool(((got.double() - y).abs() <= bound).all())


@native_only
def test_is_one_fma_chain() -> None:
    """The bits are those of the chain acc = fma(x_k, w_k, acc): float64 holds a product and a sum of fp32 so exactly
    that rounding it to fp32 is the fused step, for these values."""
    x, w = normal(5, 3, 50), normal(6, 20, 50)
    chain = torch.zeros(3, 20)
    for k in range(50):
        chain = (x[:, k, None].double() * w[:, k].double() + chain.double()).float()
    assert torch.equal(ops.linear(x, ops.pack_linear(w)), chain)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", small([1, 37, 700], [1, 37]))
def test_gradients(rows: int, dtype: torch.dtype, bound: float) -> None:
    inputs = (normal(1, rows, 61, dtype=dtype), *weights(2, 61, (50, 23), dtype))
    for out_dtype in DTYPES:
        assert_gradients(
            lambda x, *parts: ops.linear(x, ops.pack_linear(*parts), out_dtype),  # noqa: B023
            lambda x, *parts: reference.linear(x, reference.pack_linear(parts), x.dtype),
            inputs,
            3,
            1e-2 if out_dtype == torch.bfloat16 else bound,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_gradient_keeps_the_row_contract(dtype: torch.dtype) -> None:
    packed = ops.pack_linear(*weights(1, 61, (50,), dtype))

    def dx(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(ops.linear(x, packed), x, grad)[0]

    assert_row_contract(dx, (normal(2, 40, 61, dtype=dtype), normal(3, 40, 50, dtype=dtype)), 4)


def test_gradient_follows_repack() -> None:
    """The panels of the transpose, made by the first backward, are refreshed with the others."""
    w = normal(1, 32, 64).requires_grad_()
    packed, x = ops.pack_linear(w), normal(2, 5, 64).requires_grad_()
    for step in range(2):
        with torch.no_grad():
            packed.parts[0].add_(step)
        ops.repack(packed)
        (dx,) = torch.autograd.grad(ops.linear(x, packed).sum(), x)
        assert relative_error(dx, packed.parts[0].detach().cpu().double().sum(0).expand(5, -1)) <= 1e-5


def test_gradient_only_where_asked() -> None:
    a, b = normal(1, 8, 16).requires_grad_(), normal(2, 8, 16)
    x = normal(3, 4, 16)
    ops.linear(x, ops.pack_linear(a, b)).sum().backward()
    assert a.grad is not None and b.grad is None
    assert not ops.linear(x, ops.pack_linear(b)).requires_grad


@pytest.mark.parametrize("rows", small([0, 1, 200], [0, 1, 70]))
def test_empty_and_single(rows: int) -> None:
    packed = ops.pack_linear(normal(1, 1, 3))
    assert ops.linear(normal(2, rows, 3), packed).shape == (rows, 1)
    w = normal(1, 2, 3).requires_grad_()
    ops.linear(normal(2, rows, 3), ops.pack_linear(w)).sum().backward()
    assert w.grad is not None and (rows > 0 or not w.grad.any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype) -> None:
    packed, x = ops.pack_linear(*weights(1, 61, (40,), dtype)), normal(2, 20, 61, dtype=dtype)
    clean = ops.linear(x, packed)
    x[3, 60], x[7, 0] = torch.nan, torch.inf
    got = ops.linear(x, packed)
    assert got[3].isnan().all() and got[7].isinf().all()
    kept = [r for r in range(20) if r not in (3, 7)]
    assert torch.equal(got[kept], clean[kept])


def test_broadcast_rows_and_columns_slice() -> None:
    """Rows may repeat (stride 0) or be a slice of a wider tensor."""
    packed, x = ops.pack_linear(*weights(1, 32, (48,), torch.float32)), normal(2, 1, 96)
    part = x[:, 32:64]
    once = ops.linear(part.contiguous(), packed)
    with threads(2):
        assert torch.equal(ops.linear(part.expand(9, -1), packed), once.expand(9, -1))


def test_errors() -> None:
    packed = ops.pack_linear(normal(1, 8, 16))
    x = normal(2, 4, 16)
    with pytest.raises(ValueError, match=r"x is \(4, 15\), not \[T, 16\]"):
        ops.linear(x[:, 1:], packed)
    with pytest.raises(ValueError, match=r"x is \(16,\)"):
        ops.linear(x[0], packed)
    with pytest.raises(ValueError, match=r"x is torch.bfloat16, the weights torch.float32"):
        ops.linear(x.bfloat16(), packed)
    with pytest.raises(ValueError, match="adjacent columns"):
        ops.linear(normal(2, 16, 16).T, packed)
    with pytest.raises(ValueError, match=r"out_dtype is torch\.float64"):
        ops.linear(x, packed, torch.float64)
    with pytest.raises(ValueError, match="packed was made by another backend"):
        ops.linear(x, PackedLinear((normal(1, 8, 16),), 8, 16))
    with pytest.raises(ValueError, match="parts is empty"):
        ops.pack_linear()
    with pytest.raises(ValueError, match=r"parts\[1\] is \(8, 15\)"):
        ops.pack_linear(normal(1, 8, 16), normal(1, 8, 15))
    with pytest.raises(ValueError, match=r"parts\[1\] is torch.bfloat16"):
        ops.pack_linear(normal(1, 8, 16), normal(1, 8, 16).bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        ops.pack_linear(normal(1, 16, 8).T)

"""linear in Triton: row contract, float64 oracle, gradients, errors, and the launch that may not know the row count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.layout import PackedLinear
from kernels.triton import launch
from kernels.triton import linear as module
from kernels.triton.linear import fill_linear, linear, pack_linear
from tests.kernels.contract import DTYPES, SEEDS, assert_gradients, assert_row_contract, normal, strided, uneven_sum
from tests.kernels.triton.device import device, there

ROWS = st.one_of(st.integers(1, 20), st.integers(1, 80))  # few: the interpreter is slow
SHAPES = st.sampled_from([(128, (128,)), (61, (50, 23)), (7, (1,)), (1, (17,)), (300, (33, 35))])


def packed_weights(seed: int, cols: int, rows: tuple[int, ...], dtype: torch.dtype) -> PackedLinear:
    return pack_linear(tuple(normal(seed + i, n, cols, dtype=dtype).to(device()) for i, n in enumerate(rows)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, shape=SHAPES, seed=SEEDS)
@settings(max_examples=4)
def test_row_contract(rows: int, shape: tuple[int, tuple[int, ...]], seed: int, dtype: torch.dtype) -> None:
    cols, parts = shape
    packed = packed_weights(seed, cols, parts, dtype)
    x = normal(seed + 9, rows, cols, dtype=dtype)
    assert_row_contract(there(lambda x: linear(x, packed, dtype)), (x,), seed)


def test_control_rows_in_the_sum() -> None:
    """The check sees a kernel that splits the reduction over programs by the row count: split-K on this kernel."""
    w = normal(1, 40, 128).to(device())

    def split_k(x: Tensor) -> Tensor:
        pieces = 1 + len(x) % 3
        packs = [pack_linear((part.contiguous(),)) for part in w.chunk(pieces, dim=1)]
        parts = [linear(a, pack, torch.float32) for a, pack in zip(x.chunk(pieces, dim=1), packs, strict=True)]
        return torch.stack(parts).sum(0)

    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(there(split_k), (normal(2, 31, 128),), 0)
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(lambda x: uneven_sum(x[:, None] * w.cpu(), len(x)), (normal(2, 31, 128),), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_memory(dtype: torch.dtype) -> None:
    """Wherever rows lie, the same kernel runs on them: a copy is made of what is not aligned."""
    packed, x = packed_weights(1, 64, (48,), dtype), normal(2, 9, 64, dtype=dtype).to(device())
    once = linear(x, packed, dtype)
    assert torch.equal(linear(strided(x), packed, dtype), once)
    shifted = x.new_empty(9 * 64 + 1)[1:].view(9, 64).copy_(x)
    assert shifted.data_ptr() % launch.ALIGN and torch.equal(linear(shifted, packed, dtype), once)
    wide = torch.cat([x, x], dim=1)[:, 64:]
    assert wide.data_ptr() == launch.aligned(wide).data_ptr() and torch.equal(linear(wide, packed, dtype), once)
    assert torch.equal(linear(x[:1].expand(9, -1), packed, dtype), once[:1].expand(9, -1))


def test_control_one_weight() -> None:
    """One weight changed changes its column, once repacked and not before."""
    w, x = normal(1, 32, 64).to(device()), normal(2, 5, 64).to(device())
    packed = pack_linear((w,))
    before = linear(x, packed, torch.float32)
    w[3, 4] += 0.01
    assert torch.equal(linear(x, packed, torch.float32), before)
    fill_linear(packed)
    assert (linear(x, packed, torch.float32) != before).any(0).nonzero()[:, 0].tolist() == [3]


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_float64_oracle(rows: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """A chain of K steps errs by at most 2 K u sum |x||w|, u = 2^-24, each product and each sum rounded (matrix units
    cut off where an adder rounds: twice that); rounding to bf16 adds 2^-8 |y|."""
    cols = 300
    packed, x = packed_weights(3, cols, (40, 41), dtype), normal(4, rows, cols, dtype=dtype)
    w = torch.cat(packed.parts).cpu().double()
    y = x.double() @ w.T
    bound = 4 * cols * 2.0**-24 * (x.double().abs() @ w.abs().T)
    if out_dtype == torch.bfloat16:
        bound = bound * (1 + 2.0**-8) + 2.0**-8 * y.abs()
    got = there(lambda x: linear(x, packed, out_dtype))(x)
    assert got.dtype == out_dtype
    assert bool(((got.double() - y).abs() <= bound).all())


@pytest.mark.skipif(not launch.INTERPRET, reason="a GPU's units fuse or truncate as they please, alike for every row")
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_is_the_references(dtype: torch.dtype) -> None:
    """In the interpreter a product is a chain over k in ascending order over all tiles: the reference's bits."""
    packed, x = packed_weights(1, 300, (70,), dtype), normal(2, 20, 300, dtype=dtype)
    expected = reference.linear(x, reference.pack_linear(packed.parts), torch.float32)
    assert torch.equal(linear(x, packed, torch.float32), expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 40])
def test_gradients(rows: int, dtype: torch.dtype, bound: float) -> None:
    for out_dtype in DTYPES:
        assert_gradients(
            there(lambda x, *parts: linear(x, pack_linear(parts), out_dtype)),  # noqa: B023
            lambda x, *parts: reference.linear(x, reference.pack_linear(parts), x.dtype),
            (normal(1, rows, 61, dtype=dtype), normal(2, 50, 61, dtype=dtype), normal(3, 23, 61, dtype=dtype)),
            3,
            max(bound, 1e-2 if out_dtype == torch.bfloat16 else 0),
        )


def test_gradient_only_where_asked() -> None:
    a, b, x = (normal(i, 8, 16).to(device()) for i in range(3))
    a.requires_grad_()
    linear(x, pack_linear((a, b)), torch.float32).sum().backward()
    assert a.grad is not None and b.grad is None
    assert not linear(x, pack_linear((b,)), torch.float32).requires_grad


@pytest.mark.parametrize("rows", [0, 1, 70])
def test_empty_and_single(rows: int) -> None:
    w, x = normal(1, 2, 3).to(device()).requires_grad_(), normal(2, rows, 3).to(device())
    out = linear(x, pack_linear((w,)), torch.float32)
    assert out.shape == (rows, 2)
    out.sum().backward()
    assert w.grad is not None and (rows > 0 or not w.grad.any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype) -> None:
    packed, x = packed_weights(1, 61, (40,), dtype), normal(2, 20, 61, dtype=dtype)
    clean = there(lambda x: linear(x, packed, dtype))(x)
    x[3, 60], x[7, 0] = torch.nan, torch.inf
    got = there(lambda x: linear(x, packed, dtype))(x)
    assert got[3].isnan().all() and got[7].isinf().all()
    kept = [r for r in range(20) if r not in (3, 7)]
    assert torch.equal(got[kept], clean[kept])


def test_launch_does_not_know_the_row_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over row counts every launch has one kernel, one tile and one set of strides; only the number of programs and the
    row count itself, which is not specialised on, differ."""
    launches: list[tuple[Any, ...]] = []

    def record(
        kernel: Any, grid: Any, device: Any, tile: Any, a: Any, b: Any, c: Any, rows: int, *rest: int, **constants: int
    ) -> None:
        launches.append((kernel, tile, a.data_ptr() % launch.ALIGN, rest, tuple(constants.items())))

    monkeypatch.setattr(module, "run", record)
    for dtype in DTYPES:
        launches.clear()
        packed = packed_weights(1, 64, (48,), dtype)
        for rows in [*range(2, 40), 63, 64, 65, 1000, 4096]:
            linear(normal(2, rows, 64, dtype=dtype).to(device()), packed, dtype)
        assert len(set(launches)) == 1


def test_errors() -> None:
    packed, x = packed_weights(1, 16, (8,), torch.float32), normal(2, 4, 16).to(device())
    with pytest.raises(ValueError, match=r"x is \(4, 15\), not \[T, 16\]"):
        linear(x[:, 1:], packed, x.dtype)
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 on .*, the weights torch.float32"):
        linear(x.bfloat16(), packed, x.dtype)
    with pytest.raises(ValueError, match="adjacent columns"):
        linear(normal(2, 16, 16).to(device()).T, packed, x.dtype)
    with pytest.raises(ValueError, match=r"out_dtype is torch\.float64"):
        linear(x, packed, torch.float64)
    with pytest.raises(ValueError, match=r"x is torch\.float16"):
        linear(x.half(), packed, x.dtype)
    with pytest.raises(ValueError, match="x is on meta"):
        linear(x.to("meta"), packed, x.dtype)
    with pytest.raises(ValueError, match="packed was made by another backend"):
        linear(x, PackedLinear((x,), 8, 16), x.dtype)
    with pytest.raises(ValueError, match="parts is empty"):
        pack_linear(())
    with pytest.raises(ValueError, match=r"parts\[1\] is \(4, 15\)"):
        pack_linear((x, x[:, 1:]))
    with pytest.raises(ValueError, match=r"parts\[1\] is torch.bfloat16"):
        pack_linear((x, x.bfloat16()))
    with pytest.raises(ValueError, match="contiguous"):
        pack_linear((normal(1, 16, 8).to(device()).T,))

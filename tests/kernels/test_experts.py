"""expert_linear, swiglu and moe_combine on each backend: row contract, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import backend as reference
from tests.kernels.backend import NATIVE, ROWS, examples, ops, small
from tests.kernels.contract import (
    DTYPES,
    SEEDS,
    assert_gradients,
    assert_row_contract,
    generator,
    normal,
    relative_error,
    telling,
    uneven_sum,
)

EXPERTS, FAN_OUT = 9, 3


def groups(seed: int, n: int, k: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], ...]:
    """Eight experts of one tensor, a shared one of two."""
    half = n // 2
    shared = (normal(seed + 1, 1, half, k, dtype=dtype), normal(seed + 2, 1, n - half, k, dtype=dtype))
    return (normal(seed, EXPERTS - 1, n, k, dtype=dtype),), shared


def chosen(seed: int, rows: int, experts: int = EXPERTS) -> Tensor:
    return torch.randint(0, experts, (rows,), generator=generator(seed)).to(torch.int32)


# ---- expert_linear ----


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, shape=st.sampled_from([(128, 64), (33, 61), (1, 5), (130, 128)]), crowd=st.booleans(), seed=SEEDS)
@examples(25)
def test_row_contract(rows: int, shape: tuple[int, int], crowd: bool, seed: int, dtype: torch.dtype) -> None:
    """A row's bits do not tell how many rows share its expert, spread over nine or crowded on two, nor whether they
    were gathered or grouped: row counts lie on both sides of that choice."""
    packed = ops.pack_experts(*groups(seed, *shape, dtype))
    expert = chosen(seed, rows * FAN_OUT, 2 if crowd else EXPERTS).view(rows, FAN_OUT)

    def op(x: Tensor, expert: Tensor) -> Tensor:
        return ops.expert_linear(x, packed, expert.contiguous().view(-1), FAN_OUT)

    assert_row_contract(op, (normal(seed + 5, rows, shape[1], dtype=dtype), expert), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", small([1, 4, 100], [1, 4, 40]))
def test_equals_linear(rows: int, dtype: torch.dtype) -> None:
    """Gather + GEMV, grouped GEMM and plain linear give the same bits."""
    whole = groups(1, 50, 61, dtype)
    x, expert = normal(2, rows, 61, dtype=dtype), chosen(3, rows * FAN_OUT)
    got = ops.expert_linear(x, ops.pack_experts(*whole), expert, FAN_OUT)
    for e in expert.unique().tolist():
        parts = [part[e] for part in whole[0]] if e < EXPERTS - 1 else [part[0] for part in whole[1]]
        mine = (expert == e).nonzero()[:, 0]
        assert torch.equal(got[mine], ops.linear(x[mine // FAN_OUT], ops.pack_linear(*parts)))


def test_float64_oracle() -> None:
    whole, expert, x = groups(1, 32, 64, torch.float32), chosen(3, 27), normal(2, 9, 64)
    oracle = reference.pack_experts(tuple(tuple(part.double() for part in group) for group in whole))
    got = ops.expert_linear(x, ops.pack_experts(*whole), expert, FAN_OUT)
    assert relative_error(got, reference.expert_linear(x.double(), oracle, expert, FAN_OUT)) <= 1e-6


def test_control_another_expert() -> None:
    """Sending one row to another expert changes that row and no other."""
    packed, x = ops.pack_experts(*groups(1, 32, 64, torch.float32)), normal(2, 10, 64)
    expert = torch.zeros(10, dtype=torch.int32)
    before = ops.expert_linear(x, packed, expert)
    expert[4] = 8
    assert (ops.expert_linear(x, packed, expert) != before).any(1).nonzero()[:, 0].tolist() == [4]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", small([1, 150], [1, 40]))
def test_gradients(rows: int, dtype: torch.dtype, bound: float) -> None:
    (a,), (b, c) = groups(1, 40, 61, dtype)
    expert = chosen(4, rows * FAN_OUT, 6)  # experts 6 and 7 get no row: their gradient is zero
    expert[0] = 8
    assert_gradients(
        lambda x, a, b, c: ops.expert_linear(x, ops.pack_experts((a,), (b, c)), expert, FAN_OUT),
        lambda x, a, b, c: reference.expert_linear(x, reference.pack_experts(((a,), (b, c))), expert, FAN_OUT),
        (normal(5, rows, 61, dtype=dtype), a, b, c),
        6,
        bound,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_gradient_keeps_the_row_contract(dtype: torch.dtype) -> None:
    """Few rows of the whole are gathered, all of them grouped, so both forms meet here too."""
    packed, expert = ops.pack_experts(*groups(1, 50, 61, dtype)), chosen(3, 30 * FAN_OUT).view(30, FAN_OUT)

    def dx(x: Tensor, expert: Tensor, grad: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ops.expert_linear(x, packed, expert.contiguous().view(-1), FAN_OUT)
            return torch.autograd.grad(out, x, grad.reshape(-1, 50))[0]

    grad = normal(4, 30, FAN_OUT * 50, dtype=dtype)
    assert_row_contract(dx, (normal(2, 30, 61, dtype=dtype), expert, grad), 5)


def test_repack() -> None:
    packed, x = ops.pack_experts(*groups(1, 32, 64, torch.float32)), normal(2, 9, 64)
    expert = torch.arange(9, dtype=torch.int32)
    before = ops.expert_linear(x, packed, expert)
    packed.groups[0][0].mul_(1.5), packed.groups[1][1].mul_(2)
    assert torch.equal(ops.expert_linear(x, packed, expert), before)
    ops.repack(packed)
    after = ops.expert_linear(x, packed, expert)
    assert (after != before).any(1).all()
    assert torch.equal(after, ops.expert_linear(x, ops.pack_experts(*packed.groups), expert))


def test_no_rows() -> None:
    packed = ops.pack_experts(*groups(1, 32, 64, torch.float32))
    assert ops.expert_linear(normal(1, 0, 64), packed, chosen(1, 0), FAN_OUT).shape == (0, 32)


def test_expert_errors() -> None:
    whole = groups(1, 32, 64, torch.float32)
    packed, x = ops.pack_experts(*whole), normal(2, 4, 64)
    expert = torch.tensor([0, 3, 9, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expert\[2\] is 9, outside 0\.\.8"):
        ops.expert_linear(x, packed, expert)
    with pytest.raises(ValueError, match=r"expert is torch.int64"):
        ops.expert_linear(x, packed, expert.long())
    with pytest.raises(ValueError, match=r"not contiguous int32 \[8\]"):
        ops.expert_linear(x, packed, expert, 2)
    with pytest.raises(ValueError, match=r"x is \(4, 63\)"):
        ops.expert_linear(x[:, 1:], packed, expert)
    with pytest.raises(ValueError, match=r"groups\[1\] has other rows"):
        ops.pack_experts(whole[0], whole[1][:1])
    with pytest.raises(ValueError, match=r"groups\[1\]\[0\] is \(1, 32, 60\)"):
        ops.pack_experts(whole[0], (normal(1, 1, 32, 60),))


# ---- swiglu ----


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, half=st.sampled_from([1, 7, 8, 61, 128]), seed=SEEDS)
@examples(15)
def test_swiglu_row_contract(rows: int, half: int, seed: int, dtype: torch.dtype) -> None:
    assert_row_contract(ops.swiglu, (normal(seed, rows, 2 * half, dtype=dtype),), seed)


def test_control_swiglu_scaled_by_the_batch() -> None:
    """The check sees a gate that is scaled by the greatest value of all rows, as a quantised layer's is."""
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(lambda x: ops.swiglu(x / x.abs().max()), (normal(1, 40, 64),), 0)


def test_swiglu_oracle() -> None:
    """Few roundings: 4 units in the last place; a GPU's exp errs by 2 and by the rounding of its argument times log2 e;
    at the ends the limits 0 and g * u."""
    x = normal(1, 100, 2 * 61) * 10
    gate, up = x.double().chunk(2, dim=1)
    exact = gate * torch.sigmoid(gate) * up
    units = torch.full_like(gate, 4) if NATIVE else 6 + 2 * gate.abs()
    assert bool(((ops.swiglu(x).double() - exact).abs() <= units * 2.0**-23 * exact.abs()).all())
    ends = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 3.0, 4.0]])
    assert ops.swiglu(ends).tolist() == [[0.0, 600.0, 0.0]]
    narrow = x.bfloat16()
    gate, up = narrow.double().chunk(2, dim=1)
    assert relative_error(ops.swiglu(narrow), gate * torch.sigmoid(gate) * up) <= 2.0**-8


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_swiglu_gradients(dtype: torch.dtype, bound: float) -> None:
    assert_gradients(ops.swiglu, reference.swiglu, (normal(1, 100, 2 * 29, dtype=dtype),), 2, bound)


def test_swiglu_errors() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\), not \[T, 2I\]"):
        ops.swiglu(normal(1, 3, 5))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        ops.swiglu(normal(1, 3, 4).double())


# ---- moe_combine ----


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=ROWS, width=st.sampled_from([1, 7, 61, 128]), seed=SEEDS)
@examples(15)
def test_combine_row_contract(rows: int, width: int, seed: int, dtype: torch.dtype) -> None:
    y = normal(seed, rows, FAN_OUT * width, dtype=dtype)

    def op(y: Tensor, weight: Tensor) -> Tensor:
        return ops.moe_combine(y.contiguous().view(-1, width), weight.contiguous())

    assert_row_contract(op, (y, normal(seed + 1, rows, FAN_OUT)), seed)


def test_control_combine_order() -> None:
    """Ascending experts: another order of the sum gives other bits, and one following the row count is seen."""
    y, weight = telling(50, 8).repeat_interleave(64, 1), torch.ones(50, 8)
    backwards = y.view(50, 8, 64).flip(1).reshape(-1, 64)
    assert not torch.equal(
        ops.moe_combine(y.view(-1, 64), weight), ops.moe_combine(backwards, weight.flip(1).contiguous())
    )
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda y, w: uneven_sum((y.view(-1, 8, 64) * w[:, :, None]).transpose(1, 2), len(y)), (y, weight), 0
        )


def test_combine_oracle() -> None:
    """Eight products and eight sums."""
    y, weight = normal(1, 50 * 8, 64), normal(2, 50, 8)
    assert relative_error(ops.moe_combine(y, weight), reference.moe_combine(y.double(), weight.double())) <= 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [61, 2100])
def test_combine_gradients(width: int, dtype: torch.dtype, bound: float) -> None:
    y, weight = normal(1, 10 * FAN_OUT, width, dtype=dtype), normal(2, 10, FAN_OUT)
    assert_gradients(ops.moe_combine, reference.moe_combine, (y, weight), 3, bound)


def test_combine_errors() -> None:
    with pytest.raises(ValueError, match=r"y is \(5, 4\), not \[2 \* 3, D\]"):
        ops.moe_combine(normal(1, 5, 4), normal(2, 2, 3))
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16"):
        ops.moe_combine(normal(1, 6, 4), normal(2, 2, 3).bfloat16())

"""expert_linear in Triton: gather + GEMV equals grouped GEMM equals linear, row contract, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.triton import experts, launch
from kernels.triton.experts import expert_linear, expert_product, fill_experts, pack_experts
from kernels.triton.linear import linear, pack_linear, weight_of
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

EXPERTS, FAN_OUT = 9, 3


def groups(seed: int, n: int, k: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], ...]:
    """Eight experts of one tensor, a shared one of two."""
    half = n // 2
    whole, one, two = ((EXPERTS - 1, n, k), (1, half, k), (1, n - half, k))
    a, b, c = (normal(seed + i, *shape, dtype=dtype).to(device()) for i, shape in enumerate((whole, one, two)))
    return (a,), (b, c)


def chosen(seed: int, rows: int, experts: int = EXPERTS) -> Tensor:
    return torch.randint(0, experts, (rows,), generator=generator(seed)).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.one_of(st.integers(1, 6), st.integers(22, 40)),
    shape=st.sampled_from([(70, 64), (33, 61), (1, 5)]),
    crowd=st.booleans(),
    seed=SEEDS,
)
@settings(max_examples=4)
def test_row_contract(rows: int, shape: tuple[int, int], crowd: bool, seed: int, dtype: torch.dtype) -> None:
    """Row counts lie on both sides of the choice of form (64 rows), so gathered rows meet grouped ones."""
    packed = pack_experts(groups(seed, *shape, dtype))
    expert = chosen(seed, rows * FAN_OUT, 2 if crowd else EXPERTS).view(rows, FAN_OUT)

    def op(x: Tensor, expert: Tensor) -> Tensor:
        return expert_linear(x, packed, expert.contiguous().view(-1), FAN_OUT)

    assert_row_contract(there(op), (normal(seed + 5, rows, shape[1], dtype=dtype), expert), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_both_forms_equal_linear(rows: int, dtype: torch.dtype) -> None:
    """Gather + GEMV, grouped GEMM and plain linear give the same bits."""
    whole = groups(1, 50, 61, dtype)
    packed = pack_experts(whole)
    weight, x = weight_of(packed, "test"), launch.aligned(normal(2, rows, 61, dtype=dtype).to(device()))
    expert = chosen(3, rows * FAN_OUT).to(device())
    forms = {}
    for form in ("gather", "grouped"):
        forms[form] = x.new_full((rows * FAN_OUT, 50), torch.nan)
        expert_product(x, weight, expert, FAN_OUT, forms[form], weight.shape[2], (1, weight.stride(1)), form)
    assert torch.equal(forms["gather"], forms["grouped"])
    for e in expert.unique().tolist():
        parts = tuple(part[e] for part in whole[0]) if e < EXPERTS - 1 else tuple(part[0] for part in whole[1])
        mine = (expert == e).nonzero()[:, 0]
        plain = linear(x[mine // FAN_OUT][:, :61], pack_linear(parts), dtype)
        assert torch.equal(forms["grouped"][mine], plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_forms_of_the_input_gradient(dtype: torch.dtype) -> None:
    weight = weight_of(pack_experts(groups(1, 50, 61, dtype)), "test")
    grad, expert = launch.aligned(normal(2, 40, 50, dtype=dtype).to(device())), chosen(3, 40).to(device())
    out = [grad.new_empty(40, 61, dtype=torch.float32) for _ in range(2)]
    for form, rows in zip(("gather", "grouped"), out, strict=True):
        expert_product(grad, weight, expert, 1, rows, 50, (weight.stride(1), 1), form)
    assert torch.equal(*out)


def test_controls() -> None:
    """A row sent to another expert changes, alone; a sum that follows the row count is seen."""
    packed, x = pack_experts(groups(1, 32, 64, torch.float32)), normal(2, 10, 64).to(device())
    expert = torch.zeros(10, dtype=torch.int32, device=device())
    before = expert_linear(x, packed, expert, 1)
    expert[4] = 8
    assert (expert_linear(x, packed, expert, 1) != before).any(1).nonzero()[:, 0].tolist() == [4]
    w = normal(1, 40, 128)
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(lambda x: uneven_sum(x[:, None] * w, len(x)), (normal(2, 31, 128),), 0)


def test_form_and_tile_over_row_counts() -> None:
    """The form follows the row count, the tile does not."""
    forms = [launch.expert_form(rows) for rows in range(1, 200)]
    assert forms == ["gather"] * launch.GATHER_ROWS + ["grouped"] * (199 - launch.GATHER_ROWS)
    for dtype in DTYPES:
        weight = torch.empty(EXPERTS, 4, 16, dtype=dtype)
        assert {experts._tile(torch.empty(rows, 16, dtype=dtype), weight) for rows in range(1, 200)} == {
            launch.product_tile(dtype)
        }


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 40])
def test_gradients(rows: int, dtype: torch.dtype, bound: float) -> None:
    (a,), (b, c) = ((part.cpu() for part in group) for group in groups(1, 40, 61, dtype))
    expert = chosen(4, rows * FAN_OUT, 6)  # experts 6 and 7 get no row: their gradient is zero
    expert[0] = 8
    assert_gradients(
        there(lambda x, a, b, c: expert_linear(x, pack_experts(((a,), (b, c))), expert.to(device()), FAN_OUT)),
        lambda x, a, b, c: reference.expert_linear(x, reference.pack_experts(((a,), (b, c))), expert, FAN_OUT),
        (normal(5, rows, 61, dtype=dtype), a, b, c),
        6,
        bound,
    )


def test_oracle_and_repack() -> None:
    whole, expert = groups(1, 32, 64, torch.float32), chosen(3, 27)
    packed, x = pack_experts(whole), normal(2, 9, 64)
    oracle = reference.pack_experts(tuple(tuple(part.cpu().double() for part in group) for group in whole))
    op = there(lambda x, expert: expert_linear(x, packed, expert, FAN_OUT))
    before = op(x, expert)
    assert relative_error(before, reference.expert_linear(x.double(), oracle, expert, FAN_OUT)) <= 1e-6
    whole[0][0].mul_(1.5), whole[1][1].mul_(2)
    assert torch.equal(op(x, expert), before)
    fill_experts(packed)
    assert torch.equal(op(x, expert), there(lambda x, e: expert_linear(x, pack_experts(whole), e, FAN_OUT))(x, expert))
    assert not torch.equal(op(x, expert), before)


def test_no_rows() -> None:
    packed = pack_experts(groups(1, 32, 64, torch.float32))
    empty = chosen(1, 0).to(device())
    assert expert_linear(normal(1, 0, 64).to(device()), packed, empty, FAN_OUT).shape == (0, 32)


def test_errors() -> None:
    whole = groups(1, 32, 64, torch.float32)
    packed, x = pack_experts(whole), normal(2, 4, 64).to(device())
    expert = torch.tensor([0, 3, 9, 1], dtype=torch.int32, device=device())
    with pytest.raises(ValueError, match=r"expert\[2\] is 9, outside 0\.\.8"):
        expert_linear(x, packed, expert, 1)
    with pytest.raises(ValueError, match=r"expert is torch.int64"):
        expert_linear(x, packed, expert.long(), 1)
    with pytest.raises(ValueError, match=r"not contiguous int32 \[8\]"):
        expert_linear(x, packed, expert, 2)
    with pytest.raises(ValueError, match=r"x is \(4, 63\)"):
        expert_linear(x[:, 1:], packed, expert, 1)
    with pytest.raises(ValueError, match=r"groups\[1\] has other rows"):
        pack_experts((whole[0], whole[1][:1]))
    with pytest.raises(ValueError, match=r"groups\[1\]\[0\] is \(1, 32, 60\)"):
        pack_experts((whole[0], (normal(1, 1, 32, 60).to(device()),)))

"""short_conv on each backend: chunk cuts, neighbours, state, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.layout import Segments
from kernels.reference import backend as reference
from tests.kernels.backend import examples, ops, small
from tests.kernels.contract import DTYPES, SEEDS, assert_gradients, assert_same, generator, normal, strided, threads

LENGTHS = st.lists(st.one_of(st.integers(1, 6), st.integers(1, small(300, 25))), min_size=1, max_size=small(8, 4))
WIDTHS = st.sampled_from([1, 61, 64, 130])


def from_start(lengths: list[int]) -> Segments:
    return Segments.build(list(range(len(lengths))), [0] * len(lengths), lengths)


def in_chunks(x: list[Tensor], weight: Tensor, sizes: list[int], seed: int) -> list[Tensor]:
    """Every sequence through a state, the next ``sizes`` entry of rows at a time, in random company and slots."""
    rng = generator(seed)
    slots = torch.randperm(len(x) + 3, generator=rng)[: len(x)].tolist()
    state = normal(seed, len(x) + 3, 3, weight.shape[0], dtype=x[0].dtype)  # what an earlier owner left
    done, out = [0] * len(x), [[] for _ in x]
    turn = 0
    while any(at < len(rows) for at, rows in zip(done, x, strict=True)):
        left = [s for s in range(len(x)) if done[s] < len(x[s])]
        keep = torch.rand(len(left), generator=rng) < 0.7
        batch = [s for s, kept in zip(left, keep.tolist(), strict=True) if kept] or left[:1]
        size = [min(sizes[(turn + s) % len(sizes)], len(x[s]) - done[s]) for s in batch]
        segments = Segments.build([slots[s] for s in batch], [done[s] for s in batch], size)
        rows = torch.cat([x[s][done[s] : done[s] + n] for s, n in zip(batch, size, strict=True)])
        for s, n, y in zip(batch, size, ops.short_conv(rows, weight, segments, state).split(size), strict=True):
            out[s].append(y)
            done[s] += n
        turn += 1
    return [torch.cat(pieces) for pieces in out]


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=LENGTHS, width=WIDTHS, sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), seed=SEEDS)
@examples(12, 4)
def test_chunks_and_company(lengths: list[int], width: int, sizes: list[int], seed: int, dtype: torch.dtype) -> None:
    """One call = each sequence alone = any cut into chunks with a state, whoever else is in the call."""
    weight = normal(seed, width, 4)
    x = [normal(seed + 1 + s, n, width, dtype=dtype) for s, n in enumerate(lengths)]
    with threads(2):
        whole = ops.short_conv(torch.cat(x), weight, from_start(lengths))
    assert_same(ops.short_conv(strided(torch.cat(x)), weight, from_start(lengths)), whole, "strided")
    alone = torch.cat([ops.short_conv(rows, weight, from_start([len(rows)])) for rows in x])
    assert_same(alone, whole, "alone")
    assert_same(torch.cat(in_chunks(x, weight, sizes, seed)), whole, "in chunks")


def test_control_state_forgotten() -> None:
    """A chunk whose state is another's comes out different, in its first three rows and no later."""
    weight, x = normal(1, 16, 4), normal(2, 20, 16)
    whole = ops.short_conv(x, weight, from_start([20]))
    state = normal(3, 2, 3, 16)
    late = ops.short_conv(x[10:], weight, Segments.build([1], [10], [10]), state)
    assert (late != whole[10:]).any(1).nonzero()[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_holds_the_last_inputs(dtype: torch.dtype) -> None:
    weight, x = normal(1, 5, 4), normal(2, 6, 5, dtype=dtype)
    state = normal(3, 3, 3, 5, dtype=dtype)
    others = state[[0, 2]].clone()
    ops.short_conv(x[:2], weight, Segments.build([1], [0], [2]), state)
    assert torch.equal(state[1], torch.cat([torch.zeros(1, 5, dtype=dtype), x[:2]]))
    ops.short_conv(x[2:3], weight, Segments.build([1], [2], [1]), state)
    assert torch.equal(state[1], x[:3])
    ops.short_conv(x[3:], weight, Segments.build([1], [3], [3]), state)
    assert torch.equal(state[1], x[3:])
    assert torch.equal(state[[0, 2]], others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_oracle(dtype: torch.dtype) -> None:
    """Four products and five sums, at most six roundings of a term: 6 u (|x| + sum |w||x|), u = 2^-24; rounding to bf16
    adds 2^-8 |y|."""
    lengths = [1, 2, 3, 4, 50]
    weight, x = normal(1, 61, 4), normal(2, 60, 61, dtype=dtype)
    segments = from_start(lengths)
    exact = reference.short_conv(x.double(), weight.double(), segments, None)
    bound = 6 * 2.0**-24 * reference.short_conv(x.double().abs(), weight.double().abs(), segments, None)
    if dtype == torch.bfloat16:
        bound = bound * 1.01 + 2.0**-8 * exact.abs()
    assert bool(((ops.short_conv(x, weight, segments).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_addend_is_added_as_torch_adds(dtype: torch.dtype) -> None:
    """By the bit, rounded first and then added; with a state, strided, and under autograd."""
    segments, weight = Segments.build([1, 0], [3, 0], [4, 30]), normal(1, 61, 4)
    x, addend = normal(2, 34, 61, dtype=dtype), normal(3, 34, 61, dtype=dtype) * 3
    state = normal(4, 2, 3, 61, dtype=dtype)
    past, wide = state.clone(), state.clone().float()
    wanted = addend + ops.short_conv(x, weight, segments, past)
    got = ops.short_conv(x, weight, segments, state, strided(addend))
    assert torch.equal(got, wanted) and torch.equal(state, past)
    once = (addend.float() + ops.short_conv(x.float(), weight, segments, wide)).to(dtype)
    assert torch.equal(once, wanted) == (dtype == torch.float32)  # the control: rounded once, bf16 is another sum
    leaves = [t.clone().requires_grad_() for t in (x, weight, addend)]
    ops.short_conv(leaves[0], leaves[1], from_start([4, 30]), None, leaves[2]).backward(addend)
    others = [t.clone().requires_grad_() for t in (x, weight, addend)]
    (others[2] + ops.short_conv(others[0], others[1], from_start([4, 30]))).backward(addend)
    for a, b in zip(leaves, others, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients(dtype: torch.dtype, bound: float) -> None:
    segments = from_start([1, 2, 3, 4, 50])
    assert_gradients(
        lambda x, w: ops.short_conv(x, w, segments),
        lambda x, w: reference.short_conv(x, w, segments, None),
        (normal(1, 60, 61, dtype=dtype), normal(2, 61, 4)),
        3,
        bound,
    )


def test_errors() -> None:
    weight, x = normal(1, 8, 4), normal(2, 5, 8)
    with pytest.raises(ValueError, match=r"x is \(4, 8\), not \[5, C\]"):
        ops.short_conv(x[1:], weight, from_start([5]))
    with pytest.raises(ValueError, match="segment 1 starts at 3, but there is no state"):
        ops.short_conv(x, weight, Segments.build([0, 1], [0, 3], [2, 3]))
    with pytest.raises(ValueError, match="segment 0 has slot 7 of 2"):
        ops.short_conv(x, weight, Segments.build([7], [0], [5]), torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match=r"state is torch.float32 \(2, 3, 7\)"):
        ops.short_conv(x, weight, from_start([5]), torch.zeros(2, 3, 7))
    for addend in (x[1:], x.bfloat16()):
        with pytest.raises(ValueError, match=r"addend is torch.*, not torch.float32 \[5, 8\]"):
            ops.short_conv(x, weight, from_start([5]), None, addend)
    for rows, addend in ((x.clone().requires_grad_(), None), (x, x.clone().requires_grad_())):
        with pytest.raises(ValueError, match="with state there is no gradient"):
            ops.short_conv(rows, weight, from_start([5]), torch.zeros(1, 3, 8), addend)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(7, 4\)"):
        ops.short_conv(x.detach(), weight[1:], from_start([5]))

"""attention that keeps the first keys in sight besides a window, on each backend: what is seen, where, at what cost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

from kernels.layout import SPLIT_TOKENS, Segments
from kernels.reference import backend as reference
from tests.kernels.attention_cases import (
    FIRST,
    LENGTHS,
    SHAPE,
    SHAPES,
    WINDOW,
    Rows,
    Shape,
    attend,
    empty_pages,
    pack,
    proj,
    replace,
    sequence,
)
from tests.kernels.backend import NATIVE, examples, ops, small
from tests.kernels.contract import DTYPES, SEEDS, assert_gradients, assert_same, threads

LENGTH, NEAR = small((300, 40), (110, 20))
"""Rows of a sequence, and a window, such that rows past SPLIT_TOKENS + NEAR have keys out of sight on both sides."""


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=LENGTHS, shape=SHAPE, window=WINDOW, first=FIRST, seed=SEEDS)
@examples(20)
def test_contract(
    lengths: list[int], shape: Shape, window: int | None, first: int, seed: int, dtype: torch.dtype
) -> None:
    """Chunks through pages that lie anywhere, among other sequences, equal whole sequences alone; pages of keys that no
    row to come sees are given away meanwhile."""
    rng = random.Random(seed)
    parts = [sequence(seed + 10 * n, length, shape, dtype) for n, length in enumerate(lengths)]
    whole = [attend(part, shape, window, first=first) for part in parts]
    places = list(range(20))
    rng.shuffle(places)
    table = torch.tensor([places[4 * n : 4 * n + 4] for n in range(4)], dtype=torch.int32)
    cache, done = empty_pages(20, shape, dtype, table), [0] * len(parts)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        live = [n for n in range(len(parts)) if done[n] < lengths[n]]
        rng.shuffle(live)
        step = [min(lengths[n] - done[n], rng.choice(small([1, 5, 63, 200], [5, 37, 63, 80]))) for n in live]
        for n in live if window is not None else ():
            oldest = max(done[n] - (window or 0) + 1, 0) // SPLIT_TOKENS
            table[n, first // SPLIT_TOKENS : max(oldest, first // SPLIT_TOKENS)] = -1
        rows = pack([parts[n][done[n] : done[n] + m] for n, m in zip(live, step, strict=True)])
        segments = Segments.build(live, [done[n] for n in live], step)
        with threads(rng.choice([1, 2])):
            got = attend(rows, shape, window, segments, cache, first).split(step)
        for n, m, out in zip(live, step, got, strict=True):
            assert_same(out, whole[n][done[n] : done[n] + m], f"sequence {n} from {done[n]}, {m} rows")
            done[n] += m


def test_what_is_seen() -> None:
    """The last of the first keys counts however far it is, the key after it does not: NaN in one shows in every row
    beyond, in the other in those that have it in their window."""
    shape, x = SHAPES[0], sequence(5, LENGTH, SHAPES[0])
    expected = attend(x, shape, NEAR, first=SPLIT_TOKENS)
    position = torch.arange(LENGTH)
    for key in small((0, 63, 64, 71, LENGTH - 1), (63, 64, 71)):
        k, v = x.k.clone(), x.v.clone()
        k[key] = v[key] = torch.nan
        spoilt = attend(replace(x, k=k, v=v), shape, NEAR, first=SPLIT_TOKENS).isnan().flatten(1)
        sees = (position >= key) & ((position - key < NEAR) | (key < SPLIT_TOKENS))
        assert torch.equal(spoilt.all(1), sees) and torch.equal(spoilt.any(1), sees), key
    assert not expected.isnan().any()


def test_control_of_first() -> None:
    """Up to where the window covers the first keys nothing changes, from there on every row does; first 0, and first
    without a window, change nothing at all."""
    shape, x = SHAPES[0], sequence(6, LENGTH, SHAPES[0])
    without, kept = attend(x, shape, NEAR), attend(x, shape, NEAR, first=SPLIT_TOKENS)
    assert_same(kept[:NEAR], without[:NEAR], "rows whose window reaches key 0")
    assert bool((kept != without).flatten(1).any(1)[NEAR:].all())
    whole = attend(x, shape, None)
    assert_same(attend(x, shape, None, first=SPLIT_TOKENS), whole, "no window")
    assert_same(attend(x, shape, LENGTH, first=SPLIT_TOKENS), whole, "a window over all")
    assert_same(attend(x, shape, 1, first=5 * SPLIT_TOKENS), whole, "all among the first")
    longer = attend(x, shape, NEAR, first=2 * SPLIT_TOKENS)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(longer, kept, "one page more")


def test_what_is_not_seen_is_not_read() -> None:
    """A row far out costs no more than its first keys and its window: no page is named for the keys between. A first
    page that is not there raises, and nothing is written."""
    shape, far = SHAPES[0], 64 * 4096
    x, last = sequence(7, 10, shape), far // SPLIT_TOKENS
    table = torch.full((1, last + 1), -1, dtype=torch.int32)
    table[0, 0], table[0, last - 1], table[0, last] = 2, 0, 1
    cache = empty_pages(3, shape, torch.float32, table)
    attend(sequence(8, SPLIT_TOKENS, shape), shape, NEAR, cache=cache, first=SPLIT_TOKENS)
    before = sequence(9, SPLIT_TOKENS, shape)
    cache.key[0], cache.value[0] = before.k.permute(1, 2, 0), before.v.transpose(0, 1)
    segments = Segments.build([0], [far], [10])
    got = attend(x, shape, NEAR, segments, cache, first=SPLIT_TOKENS)
    assert not got.isnan().any()
    assert not torch.equal(got, attend(x, shape, NEAR, segments, cache))  # control: the first page counts
    table[0, 0], written = -1, cache.key.nan_to_num(9.0)
    with pytest.raises(ValueError, match=r"sees positions 0 to 63, but cache\.table"):
        attend(replace(x, k=2 * x.k), shape, NEAR, segments, cache, first=SPLIT_TOKENS)
    assert torch.equal(cache.key.nan_to_num(9.0), written)


def test_bad_first() -> None:
    shape, x = SHAPES[0], sequence(1, 10, SHAPES[0])
    for first in (-64, 1, 65):
        with pytest.raises(ValueError, match=f"first is {first}; need 0 or a multiple of 64"):
            attend(x, shape, 8, first=first)


def _in(segments: Segments, shape: Shape, window: int, first: int, tau: Tensor) -> Callable[..., Tensor]:
    scale = shape.width**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, rel_proj: Tensor) -> Tensor:
        if q.dtype == torch.float64:
            return reference.attention(q, k, v, rel, rel_proj, segments, scale, window, first, tau.double(), None)
        return ops.attention(q, k, v, rel, rel_proj, segments, scale=scale, window=window, first=first, tau=tau)

    return call


SEEN = small([(s, w, f) for s in SHAPES[:3] for w, f in ((40, 64), (1, 64), (30, 128))], [(SHAPES[0], 20, 64)])


@pytest.mark.parametrize(
    ("dtype", "bound", "gradient_bound"), [(torch.float32, 150 * 2.0**-24, 1e-5), (torch.bfloat16, 2.0**-8, 2e-2)]
)
@pytest.mark.parametrize(("shape", "window", "first"), SEEN)
def test_float64_oracle_and_gradients(
    shape: Shape,
    window: int,
    first: int,
    dtype: torch.dtype,
    bound: float,
    gradient_bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients against the definition and its autograd in float64; bounds as in test_attention_numbers."""
    if not NATIVE:
        monkeypatch.setattr("kernels.triton.attention_backward.PASS_TILES", 2)
    lengths = small([200, 2, 90], [100, 2])
    x = pack([sequence(10 * n, length, shape, dtype) for n, length in enumerate(lengths)])
    segments = Segments.build(list(range(len(lengths))), [0] * len(lengths), lengths)
    call = _in(segments, shape, window, first, x.tau)
    inputs = (x.q, x.k, x.v, x.rel, proj(shape, dtype))
    got, oracle = call(*inputs), call(*(t.double() for t in inputs))
    assert float((got - oracle).abs().max()) <= bound * float(x.v.abs().max())
    assert_gradients(call, call, inputs, 3, gradient_bound)


def test_gradients_of_a_sequence_are_its_own() -> None:
    """dq, dk, dv and drel of a sequence have the same bits alone and beside others; without its first keys others."""
    shape, lengths = SHAPES[0], [9, small(200, 90)]
    parts = [sequence(10 * n, length, shape) for n, length in enumerate(lengths)]

    def gradients(x: Rows, segments: Segments, first: int = SPLIT_TOKENS) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.rel)]
        how = {"scale": 0.25, "window": 7, "first": first}
        out = ops.attention(*leaves, proj(shape), segments, tau=x.tau, **how)
        return list(torch.autograd.grad(out.square().sum(), leaves))

    both = gradients(pack(parts), Segments.build([0, 1], [0, 0], lengths))
    one = Segments.build([0], [0], [lengths[1]])
    alone, other = gradients(parts[1], one), gradients(parts[1], one, 0)
    for name, got, expected, without in zip(("dq", "dk", "dv", "drel"), both, alone, other, strict=True):
        assert_same(got[9:], expected, name)
        assert not torch.equal(without, expected), name

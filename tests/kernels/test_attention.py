"""attention on the CPU: the row contract over neighbours, chunk cuts, pages and forks; oracle, gradients, errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels import ops, reference
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from tests.kernels.contract import DTYPES, SEEDS, assert_gradients, assert_same, normal, strided, threads

EXTENT = 70


@dataclass(frozen=True)
class Shape:
    heads: int
    key_heads: int
    width: int
    channels: int


SHAPES = [Shape(4, 2, 32, 16), Shape(3, 3, 20, 5), Shape(4, 1, 16, 8), Shape(6, 1, 8, 3), Shape(2, 2, 9, 1)]
SHAPE = st.sampled_from(SHAPES)
WINDOW = st.sampled_from([None, 1, 33, 64, 128])


@dataclass(frozen=True)
class Rows:
    """Rows of one sequence, or of several one after another."""

    q: Tensor  # [T, H, D]
    k: Tensor  # [T, H_kv, D]
    v: Tensor  # [T, H_kv, D]
    rel: Tensor  # [T, H, C]
    tau: Tensor  # [T]

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.q[rows], self.k[rows], self.v[rows], self.rel[rows], self.tau[rows])


def sequence(seed: int, length: int, shape: Shape, dtype: torch.dtype = torch.float32) -> Rows:
    return Rows(
        normal(seed, length, shape.heads, shape.width, dtype=dtype),
        normal(seed + 1, length, shape.key_heads, shape.width, dtype=dtype),
        normal(seed + 2, length, shape.key_heads, shape.width, dtype=dtype),
        normal(seed + 3, length, shape.heads, shape.channels, dtype=dtype) / 2,
        1 + normal(seed + 4, length).abs() / 4,
    )


def pack(parts: list[Rows]) -> Rows:
    return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("q", "k", "v", "rel", "tau")))


def proj(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(99, shape.channels, EXTENT, dtype=dtype) / 2


def attend(
    x: Rows, shape: Shape, window: int | None, segments: Segments | None = None, cache: PagedKV | None = None
) -> Tensor:
    if segments is None:
        segments = Segments.build([0], [0], [len(x.q)])
    scale = shape.width**-0.5
    return ops.attention(
        x.q, x.k, x.v, x.rel, proj(shape, x.q.dtype), segments, scale=scale, window=window, tau=x.tau, cache=cache
    )


def empty_pages(count: int, shape: Shape, dtype: torch.dtype, table: Tensor) -> PagedKV:
    """Pages full of NaN: whatever is read before it is written, or beyond what is held, shows."""
    heads, width = shape.key_heads, shape.width
    nan = float("nan")
    key = torch.full((count, heads, width, SPLIT_TOKENS), nan, dtype=dtype)
    return PagedKV(key, torch.full((count, heads, SPLIT_TOKENS, width), nan, dtype=dtype), table)


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=st.lists(st.integers(1, 250), min_size=1, max_size=4), shape=SHAPE, window=WINDOW, seed=SEEDS)
@settings(max_examples=15)
def test_neighbours(lengths: list[int], shape: Shape, window: int | None, seed: int, dtype: torch.dtype) -> None:
    """A sequence's rows are the same alone, among others in any order, and cut off after any row; 1 and 2 threads."""
    parts = [sequence(seed + 10 * n, length, shape, dtype) for n, length in enumerate(lengths)]
    alone = [attend(part, shape, window) for part in parts]
    order = list(range(len(parts)))
    random.Random(seed).shuffle(order)
    segments = Segments.build(order, [0] * len(parts), [lengths[n] for n in order])
    for count in (1, 2):
        with threads(count):
            together = attend(pack([parts[n] for n in order]), shape, window, segments)
        assert_same(together, torch.cat([alone[n] for n in order]), f"{count} threads, order {order}")
    cut = random.Random(seed).randint(1, lengths[0])
    assert_same(attend(parts[0][:cut], shape, window), alone[0][:cut], f"the first {cut} rows")


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3), shape=SHAPE, window=WINDOW, seed=SEEDS)
@settings(max_examples=15)
def test_chunk_cuts(lengths: list[int], shape: Shape, window: int | None, seed: int, dtype: torch.dtype) -> None:
    """Sessions fed in any chunks through pages that lie anywhere equal whole sequences without a cache."""
    rng = random.Random(seed)
    parts = [sequence(seed + 10 * n, length, shape, dtype) for n, length in enumerate(lengths)]
    whole = [attend(part, shape, window) for part in parts]
    places = list(range(20))
    rng.shuffle(places)
    table = torch.tensor([places[4 * n : 4 * n + 4] for n in range(4)], dtype=torch.int32)
    slots = rng.sample(range(4), len(parts))
    cache = empty_pages(20, shape, dtype, table)
    done = [0] * len(parts)
    with threads(rng.choice([1, 2])):
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            left = [n for n in range(len(parts)) if done[n] < lengths[n]]
            live = rng.sample(left, rng.randint(1, len(left)))
            step = [min(lengths[n] - done[n], rng.choice([1, 1, 5, 63, 200])) for n in live]
            segments = Segments.build([slots[n] for n in live], [done[n] for n in live], step)
            rows = pack([parts[n][done[n] : done[n] + m] for n, m in zip(live, step, strict=True)])
            got = attend(rows, shape, window, segments, cache).split(step)
            for n, m, out in zip(live, step, got, strict=True):
                assert_same(out, whole[n][done[n] : done[n] + m], f"sequence {n} from {done[n]}, {m} rows")
                done[n] += m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("prefix", [64, 100, 128])
def test_fork(prefix: int, window: int | None, dtype: torch.dtype) -> None:
    """Two sessions that share the full pages of a prefix equal two separate sequences; so with recycled pages."""
    shape, steps = SHAPES[0], 40
    start, tails = sequence(1, prefix, shape, dtype), [sequence(seed, steps, shape, dtype) for seed in (20, 30)]
    table = torch.tensor([[0, 1, 2, 3], [-1, -1, -1, -1]], dtype=torch.int32)
    cache = empty_pages(8, shape, dtype, table)
    attend(start, shape, window, cache=cache)
    shared = prefix // SPLIT_TOKENS
    table[1] = torch.tensor([n if n < shared else n + 4 for n in range(4)])
    cache.key[shared + 4], cache.value[shared + 4] = cache.key[shared], cache.value[shared]
    if window is not None:
        table[:, : (prefix - window + 1) // SPLIT_TOKENS] = -1  # out of everyone's sight: the pages may be anyone's
    got = []
    for n in range(steps):
        segments = Segments.build([1, 0], [prefix + n] * 2, [1, 1])
        got.append(attend(pack([tail[n : n + 1] for tail in tails]), shape, window, segments, cache))
    for n, tail in enumerate(tails):
        whole = attend(pack([start, tail]), shape, window)
        assert_same(torch.stack(got)[:, n], whole[prefix:], f"fork {n}")


def test_control_library_attention() -> None:
    """torch's scaled_dot_product_attention gives a decoded row other bits than the same row of a prefill."""
    q, k, v = (normal(n, 1, 4, 300, 32) for n in range(3))
    prefill = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    decoded = [
        F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]) for i in range(300)
    ]
    with pytest.raises(AssertionError, match="differ"):
        assert_same(torch.cat(decoded, 2)[0, 0], prefill[0, 0], "scaled_dot_product_attention")


def test_control_splits_from_the_chunk() -> None:
    """Splits counted from where a chunk starts, and not from position 0, make the chunk's cut change bits."""
    q, k, v = (normal(n, 300, 32) for n in range(3))

    def last_row(first_split: int) -> Tensor:
        bounds = [0, *range(first_split % SPLIT_TOKENS or SPLIT_TOKENS, 300, SPLIT_TOKENS), 300]
        weight = torch.exp(_chain(q[-1] * k) / 8)
        parts = [(weight[a:b], v[a:b]) for a, b in pairwise(bounds)]
        out = _chain(torch.stack([_chain((w[:, None] * x).t()) for w, x in parts], 1))
        return out / _chain(torch.stack([_chain(w[None]) for w, _ in parts], 1))

    assert torch.equal(last_row(0), last_row(SPLIT_TOKENS))
    with pytest.raises(AssertionError, match="differ"):
        assert_same(last_row(0)[:, None], last_row(37)[:, None], "splits from position 37 on")


def _chain(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0])
    for term in x.unbind(1):
        total = total + term
    return total


@pytest.mark.parametrize("window", [1, 50, 64, 65])
def test_window(window: int) -> None:
    """A key inside the window counts, the next farther one does not, even when it holds NaN."""
    shape, x = SHAPES[0], sequence(5, 200, SHAPES[0])
    expected = attend(x, shape, window)
    for far, same in ((window, True), (window - 1, False)):
        k, v = x.k.clone(), x.v.clone()
        k[199 - far] = v[199 - far] = float("nan")
        got = attend(Rows(x.q, k, v, x.rel, x.tau), shape, window)
        assert torch.equal(got[199], expected[199]) == same


def test_later_rows_do_not_leak() -> None:
    """Rows are taken in tiles; a NaN or an infinity in one must not reach an earlier one."""
    shape, x = SHAPES[0], sequence(6, 150, SHAPES[0])
    expected = attend(x, shape, None)
    for at in (1, 7, 64, 149):
        for value in (float("nan"), float("inf")):
            dirty = [t.clone() for t in (x.q, x.k, x.v, x.rel)]
            for t in dirty:
                t[at:] = value
            assert_same(attend(Rows(*dirty, x.tau), shape, None)[:at], expected[:at], f"{value} from row {at} on")


def test_strided_rows() -> None:
    shape, x = SHAPES[0], sequence(7, 90, SHAPES[0])
    fused = torch.cat([t.flatten(1) for t in (x.q, x.k, x.v, x.rel)], 1)
    q, k, v, rel = fused.split([128, 64, 64, 64], 1)
    views = Rows(q.view(90, 4, 32), k.view(90, 2, 32), v.view(90, 2, 32), rel.view(90, 4, 16), x.tau)
    assert_same(attend(views, shape, 33), attend(x, shape, 33), "views of a fused projection")


def _in(dtype: torch.dtype, segments: Segments, shape: Shape, window: int | None) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, rel_proj: Tensor, tau: Tensor) -> Tensor:
        backend = reference.attention if q.dtype == torch.float64 else None
        tau = tau.detach()
        if backend is not None:
            return backend(q, k, v, rel, rel_proj, segments, shape.width**-0.5, window, tau, None)
        tau = tau.to(torch.float32)
        return ops.attention(q, k, v, rel, rel_proj, segments, scale=shape.width**-0.5, window=window, tau=tau)

    return call


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 40])
def test_float64_oracle(shape: Shape, window: int | None) -> None:
    """Scores are chains of C + D terms of size about 1 and move a weight by as much as they are off; the weighted sums
    add about 64 more roundings: 150 * 2^-24 of the largest value bounds both with room."""
    lengths = [131, 1, 20]
    x = pack([sequence(n, length, shape) for n, length in enumerate(lengths)])
    segments = Segments.build([2, 0, 1], [0, 0, 0], lengths)
    inputs = (x.q, x.k, x.v, x.rel, proj(shape), x.tau)
    call = _in(torch.float32, segments, shape, window)
    got, oracle = call(*inputs), call(*(t.double() for t in inputs))
    assert float((got - oracle).abs().max()) <= 150 * 2.0**-24 * float(x.v.abs().max())


def test_great_scores() -> None:
    """Scores of ±1000: weights of exactly 1 and 0, no NaN."""
    q = torch.full((80, 1, 8), 30.0)
    k = torch.where(torch.arange(80)[:, None, None] == 3, 5.0, -5.0).expand(80, 1, 8).contiguous()
    v = normal(1, 80, 1, 8)
    segments = Segments.build([0], [0], [80])
    got = ops.attention(q, k, v, torch.zeros(80, 1, 1), torch.zeros(1, 4), segments, scale=1.0)
    assert torch.equal(got[3:], v[3:4].expand(77, 1, 8))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 50])
def test_gradients(shape: Shape, window: int | None, dtype: torch.dtype, bound: float) -> None:
    """Against float64 autograd of the definition: about 100 terms a sum, relative to the greatest gradient; in bf16 the
    output's and the gradients' own rounding (2^-9 each) rules."""
    lengths = [70, 2, 33]
    x = pack([sequence(10 * n, length, shape, dtype) for n, length in enumerate(lengths)])
    segments = Segments.build([0, 1, 2], [0, 0, 0], lengths)
    call = _in(dtype, segments, shape, window)

    def without_tau(*inputs: Tensor) -> Tensor:
        return call(*inputs, x.tau.to(inputs[0].dtype) if inputs[0].dtype == torch.float64 else x.tau)

    assert_gradients(without_tau, without_tau, (x.q, x.k, x.v, x.rel, proj(shape, dtype)), 3, bound)


def test_no_rows() -> None:
    shape = SHAPES[0]
    assert attend(sequence(1, 0, shape), shape, None, Segments.build([], [], [])).shape == (0, 4, 32)


def _replace(x: Rows, **changed: Tensor) -> Rows:
    fields = {name: getattr(x, name) for name in ("q", "k", "v", "rel", "tau")}
    return Rows(**(fields | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(9, 2, 32)}, r"k is \(9, 2, 32\)"),
        ({"v": torch.zeros(10, 2, 31)}, "do not fit together"),
        ({"q": torch.zeros(10, 3, 32)}, "do not fit together"),
        ({"rel": torch.zeros(10, 4, 15)}, "rel_proj"),
        ({"v": torch.zeros(10, 2, 32, dtype=torch.float64)}, "v is torch.float64"),
        ({"q": strided(torch.zeros(10, 4, 32))}, "q has strides"),
        ({"tau": torch.zeros(9)}, "tau is"),
    ],
)
def test_bad_arguments(changed: dict[str, Tensor], message: str) -> None:
    shape = SHAPES[0]
    with pytest.raises(ValueError, match=message):
        attend(_replace(sequence(1, 10, shape), **changed), shape, None)


def test_bad_window_and_start() -> None:
    shape, x = SHAPES[0], sequence(1, 10, SHAPES[0])
    with pytest.raises(ValueError, match="window is 0"):
        attend(x, shape, 0)
    with pytest.raises(ValueError, match="segment 0 starts at position 5"):
        attend(x, shape, None, Segments.build([0], [5], [10]))


def test_missing_page() -> None:
    """A page that is not there: slot and positions named, nothing written; out of sight it may be missing."""
    shape, x = SHAPES[0], sequence(1, 10, SHAPES[0])
    cache = empty_pages(3, shape, torch.float32, torch.tensor([[0, 1, 2], [-1, 2, -1]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"slot 1 \(segment 1\) sees positions 128 to 191"):
        attend(pack([x, x]), shape, 30, Segments.build([0, 1], [0, 124], [10, 10]), cache)
    assert bool(cache.key.isnan().all())
    for start in (190, 60):  # beyond the table; and its first page still in sight
        with pytest.raises(ValueError, match="names no page"):
            attend(x, shape, 30, Segments.build([1], [start], [10]), cache)
    attend(x, shape, 30, Segments.build([1], [100], [10]), cache)
    with pytest.raises(ValueError, match="no gradient through a cache"):
        attend(_replace(x, q=x.q.clone().requires_grad_()), shape, 30, Segments.build([0], [0], [10]), cache)

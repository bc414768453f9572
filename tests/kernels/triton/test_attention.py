"""attention in Triton: row contract over neighbours, chunk cuts, pages and forks; poison, oracle, gradients, errors."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.triton import attention
from kernels.triton.attention import TILES, sizes, tiles_of
from tests.kernels.contract import DTYPES, SEEDS, assert_gradients, assert_same, normal
from tests.kernels.test_attention import EXTENT, Rows, Shape, _replace, empty_pages, pack, proj, sequence
from tests.kernels.triton.device import device, there

run = there(attention.attention)

SHAPES = [Shape(2, 1, 16, 2), Shape(2, 2, 20, 1), Shape(3, 1, 8, 1)]
"""Two heads a key head, one (of a width that is no power of 2), and three, which a tile pads to four."""

SHAPE = st.sampled_from(SHAPES)
WINDOW = st.sampled_from([None, 1, 33, 64])


def attend(
    x: Rows, shape: Shape, window: int | None, segments: Segments | None = None, cache: PagedKV | None = None
) -> Tensor:
    if segments is None:
        segments = Segments.build([0], [0], [len(x.q)])
    rel_proj = proj(shape, x.q.dtype)
    return run(x.q, x.k, x.v, x.rel, rel_proj, segments, shape.width**-0.5, window, x.tau, cache)


def pages(count: int, shape: Shape, dtype: torch.dtype, table: Tensor) -> PagedKV:
    cache = empty_pages(count, shape, dtype, table)
    return PagedKV(cache.key.to(device()), cache.value.to(device()), table.to(device()))


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=2), shape=SHAPE, window=WINDOW, seed=SEEDS)
@settings(max_examples=2)
def test_neighbours(lengths: list[int], shape: Shape, window: int | None, seed: int, dtype: torch.dtype) -> None:
    """A sequence's rows are the same alone, among others in any order, and cut off after any row."""
    parts = [sequence(seed + 10 * n, length, shape, dtype) for n, length in enumerate(lengths)]
    alone = [attend(part, shape, window) for part in parts]
    order = list(range(len(parts)))
    random.Random(seed).shuffle(order)
    segments = Segments.build(order, [0] * len(parts), [lengths[n] for n in order])
    together = attend(pack([parts[n] for n in order]), shape, window, segments)
    assert_same(together, torch.cat([alone[n] for n in order]), f"order {order}")
    cut = random.Random(seed).randint(1, lengths[0])
    assert_same(attend(parts[0][:cut], shape, window), alone[0][:cut], f"the first {cut} rows")


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=st.lists(st.integers(1, 80), min_size=1, max_size=2), shape=SHAPE, window=WINDOW, seed=SEEDS)
@settings(max_examples=2)
def test_chunk_cuts(lengths: list[int], shape: Shape, window: int | None, seed: int, dtype: torch.dtype) -> None:
    """Sessions fed in any chunks through pages that lie anywhere equal whole sequences without a cache."""
    rng = random.Random(seed)
    parts = [sequence(seed + 10 * n, length, shape, dtype) for n, length in enumerate(lengths)]
    whole = [attend(part, shape, window) for part in parts]
    places = list(range(12))
    rng.shuffle(places)
    table = torch.tensor([places[2 * n : 2 * n + 2] for n in range(4)], dtype=torch.int32)
    slots = rng.sample(range(4), len(parts))
    cache = pages(12, shape, dtype, table)
    done = [0] * len(parts)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        left = [n for n in range(len(parts)) if done[n] < lengths[n]]
        live = rng.sample(left, rng.randint(1, len(left)))
        step = [min(lengths[n] - done[n], rng.choice([1, 5, 37, 63, 80])) for n in live]
        segments = Segments.build([slots[n] for n in live], [done[n] for n in live], step)
        rows = pack([parts[n][done[n] : done[n] + m] for n, m in zip(live, step, strict=True)])
        got = attend(rows, shape, window, segments, cache).split(step)
        for n, m, out in zip(live, step, got, strict=True):
            assert_same(out, whole[n][done[n] : done[n] + m], f"sequence {n} from {done[n]}, {m} rows")
            done[n] += m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("prefix", "window"), [(64, None), (100, 24)])
def test_fork(prefix: int, window: int | None, dtype: torch.dtype) -> None:
    """Two sessions that share the full pages of a prefix, decoded row by row, equal two separate sequences; so with
    recycled pages."""
    shape, steps = SHAPES[0], 3
    start, tails = sequence(1, prefix, shape, dtype), [sequence(seed, steps, shape, dtype) for seed in (20, 30)]
    table = torch.tensor([[0, 1], [-1, -1]], dtype=torch.int32)
    cache = pages(6, shape, dtype, table)
    attend(start, shape, window, cache=cache)
    shared = prefix // SPLIT_TOKENS
    cache.table[1] = torch.tensor([n if n < shared else n + 4 for n in range(2)])
    cache.key[shared + 4], cache.value[shared + 4] = cache.key[shared], cache.value[shared]
    if window is not None:
        cache.table[:, : (prefix - window + 1) // SPLIT_TOKENS] = -1  # out of everyone's sight: pages may be anyone's
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


def test_control_tiles_from_the_chunk() -> None:
    """Parts counted from where a window begins, and not from position 0, change bits: the same keys, shifted by one."""
    shape, x = SHAPES[0], sequence(3, 60, SHAPES[0])
    shifted = pack([sequence(4, 1, shape), x])
    window = 30  # no row from 30 on sees the row put before it
    expected, got = attend(x, shape, window), attend(shifted, shape, window)[1:]
    assert torch.allclose(got[30:], expected[30:], atol=1e-5)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(got[30:], expected[30:], "keys in other places of their parts")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_follow_the_model_alone(dtype: torch.dtype) -> None:
    """No row count enters a tile; tiles are aligned by position, and parts of keys are parts of a page."""
    size = sizes(dtype, 32, 8, 128)
    assert SPLIT_TOKENS % size["KEYS"] == 0 and size["KEYS"] == TILES[dtype].n
    queries = size["ROWS"] // size["GROUP_PAD"]
    for start, length in ((0, 1), (5, 1), (0, 1000), (777, 3), (4096, 64)):
        tiles = tiles_of(Segments.build([0], [start], [length]), torch.tensor([0]), queries)
        assert (tiles[:, 4] % queries == 0).all()
        assert tiles[0, 4] <= start and tiles[-1, 4] + queries >= start + length
        assert len(tiles) == (start + length - 1) // queries - start // queries + 1


@pytest.mark.parametrize("window", [1, 50])
def test_window(window: int) -> None:
    """A key inside the window counts, the next farther one does not, even when it holds NaN."""
    shape, x = SHAPES[0], sequence(5, 70, SHAPES[0])
    expected = attend(x, shape, window)
    for far, same in ((window, True), (window - 1, False)):
        k, v = x.k.clone(), x.v.clone()
        k[69 - far] = v[69 - far] = float("nan")
        got = attend(Rows(x.q, k, v, x.rel, x.tau), shape, window)
        assert torch.equal(got[69], expected[69]) == same


def test_later_rows_do_not_leak() -> None:
    """Rows are taken in tiles; a NaN or an infinity in one must not reach an earlier one."""
    shape, x = SHAPES[0], sequence(6, 70, SHAPES[0])
    expected = attend(x, shape, None)
    for at, value in ((1, float("inf")), (7, float("nan")), (64, float("-inf")), (69, float("nan"))):
        dirty = [t.clone() for t in (x.q, x.k, x.v, x.rel)]
        for t in dirty:
            t[at:] = value
        assert_same(attend(Rows(*dirty, x.tau), shape, None)[:at], expected[:at], f"{value} from row {at} on")


def test_infinite_values() -> None:
    """+inf and -inf of values reach the rows that see them as they are; both together, or NaN, make a NaN."""
    shape, x = SHAPES[0], sequence(8, 40, SHAPES[0])
    v = x.v.clone()
    v[3, 0, 0], v[19, 0, 0], v[5, 0, 2], v[30, 0, 1] = float("inf"), float("-inf"), float("-inf"), float("nan")
    met = torch.cumsum(torch.where(v.isfinite(), 0.0, v), 0).expand(40, 2, 16)  # adds as IEEE 754 does
    got = attend(_replace(x, v=v), shape, None)
    assert torch.equal(got.isnan(), met.isnan()) and bool(met.isnan().any())
    assert torch.equal(got[met.isinf()], met[met.isinf()]) and bool(met.isinf().any())
    assert torch.equal(got[met == 0], attend(x, shape, None)[met == 0])


def test_strided_rows() -> None:
    shape, x = SHAPES[0], sequence(7, 40, SHAPES[0])
    fused = torch.cat([t.flatten(1) for t in (x.q, x.k, x.v, x.rel)], 1)
    q, k, v, rel = fused.split([32, 16, 16, 4], 1)
    views = Rows(q.view(40, 2, 16), k.view(40, 1, 16), v.view(40, 1, 16), rel.view(40, 2, 2), x.tau)
    assert_same(attend(views, shape, 33), attend(x, shape, 33), "views of a fused projection")


def _in(segments: Segments, shape: Shape, window: int | None, tau: Tensor) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, rel_proj: Tensor) -> Tensor:
        op, factor = (reference.attention, tau.double()) if q.dtype == torch.float64 else (run, tau)
        return op(q, k, v, rel, rel_proj, segments, shape.width**-0.5, window, factor, None)

    return call


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 150 * 2.0**-24), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize(("shape", "window"), [(SHAPES[0], None), (SHAPES[1], 40)])
def test_float64_oracle(shape: Shape, window: int | None, dtype: torch.dtype, bound: float) -> None:
    """fp32: scores are chains of C + D terms of size about 1, the weighted sums add about 64 more roundings. bf16: the
    one rounding of the result, 2^-9 of the largest value, and room for as much again."""
    lengths = [70, 1, 9]
    x = pack([sequence(n, length, shape, dtype) for n, length in enumerate(lengths)])
    call = _in(Segments.build([2, 0, 1], [0, 0, 0], lengths), shape, window, x.tau)
    inputs = (x.q, x.k, x.v, x.rel, proj(shape, dtype))
    got, oracle = call(*inputs), call(*(t.double() for t in inputs))
    assert float((got - oracle).abs().max()) <= bound * float(x.v.abs().max())


def test_great_scores() -> None:
    """Scores of ±1000: weights of exactly 1 and 0, no NaN."""
    q = torch.full((70, 1, 8), 30.0)
    k = torch.where(torch.arange(70)[:, None, None] == 3, 5.0, -5.0).expand(70, 1, 8).contiguous()
    v, segments = normal(1, 70, 1, 8), Segments.build([0], [0], [70])
    got = run(q, k, v, torch.zeros(70, 1, 1), torch.zeros(1, 4), segments, 1.0, None, None, None)
    assert torch.equal(got[3:], v[3:4].expand(67, 1, 8))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("shape", "window"), [(SHAPES[0], 20), (SHAPES[1], None), (SHAPES[2], None)])
def test_gradients(
    shape: Shape, window: int | None, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 autograd of the definition, over several passes of tiles: about 100 terms a sum, relative to the
    greatest gradient; in bf16 the output's and the gradients' own rounding (2^-9 each) rules."""
    monkeypatch.setattr("kernels.triton.attention_backward.PASS_TILES", 2)
    lengths = [36, 2, 7]
    x = pack([sequence(10 * n, length, shape, dtype) for n, length in enumerate(lengths)])
    call = _in(Segments.build([0, 1, 2], [0, 0, 0], lengths), shape, window, x.tau)
    assert_gradients(call, call, (x.q, x.k, x.v, x.rel, proj(shape, dtype)), 3, bound)


def test_gradients_of_a_sequence_are_its_own() -> None:
    """dq, dk, dv and drel of a sequence have the same bits alone and beside others."""
    shape, lengths = SHAPES[0], [21, 26]
    parts = [sequence(10 * n, length, shape) for n, length in enumerate(lengths)]
    dout = normal(5, 47, 2, 16)

    def gradients(x: Rows, segments: Segments, upstream: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.rel)]
        out = run(*leaves, proj(shape), segments, 0.25, 15, x.tau, None)
        return list(torch.autograd.grad(out, leaves, upstream))

    both = gradients(pack(parts), Segments.build([0, 1], [0, 0], lengths), dout)
    alone = gradients(parts[1], Segments.build([0], [0], [26]), dout[21:])
    for name, got, expected in zip(("dq", "dk", "dv", "drel"), both, alone, strict=True):
        assert_same(got[21:], expected, name)


def test_no_rows() -> None:
    shape = SHAPES[0]
    assert attend(sequence(1, 0, shape), shape, None, Segments.build([], [], [])).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(9, 1, 16)}, r"k is \(9, 1, 16\)"),
        ({"v": torch.zeros(10, 1, 15)}, "do not fit together"),
        ({"k": torch.zeros(10, 3, 16), "v": torch.zeros(10, 3, 16)}, "do not fit together"),
        ({"rel": torch.zeros(10, 2, 3)}, "rel_proj"),
        ({"v": torch.zeros(10, 1, 16, dtype=torch.float64)}, r"v is torch\.float64"),
        ({"v": torch.zeros(10, 1, 16, dtype=torch.bfloat16)}, r"v is torch\.bfloat16; q is torch\.float32"),
        ({"tau": torch.zeros(9)}, r"tau is \(9,\)"),
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
    cache = pages(3, shape, torch.float32, torch.tensor([[0, 1, 2], [-1, 2, -1]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"slot 1 \(segment 1\) sees positions 128 to 191"):
        attend(pack([x, x]), shape, 30, Segments.build([0, 1], [0, 124], [10, 10]), cache)
    assert bool(cache.key.isnan().all())
    for start in (190, 60):  # beyond the table; and its first page still in sight
        with pytest.raises(ValueError, match="names no page"):
            attend(x, shape, 30, Segments.build([1], [start], [10]), cache)
    with pytest.raises(ValueError, match="names no page"):
        attend(x, shape, 30, Segments.build([2], [0], [10]), cache)  # a slot beyond the table
    attend(x, shape, 30, Segments.build([1], [100], [10]), cache)
    with pytest.raises(ValueError, match="no gradient through a cache"):
        attend(_replace(x, q=x.q.clone().requires_grad_()), shape, 30, Segments.build([0], [0], [10]), cache)


def test_rel_bias_reaches_its_extent_and_no_farther() -> None:
    """The bias of distance EXTENT - 1 moves a row, and a NaN of a row's own channels stays with keys in the extent."""
    shape, x = SHAPES[0], sequence(9, EXTENT + 1, SHAPES[0])
    changed = proj(shape).clone()
    changed[:, -1] += 100.0
    before = attend(x, shape, None)
    args = (x.q, x.k, x.v, x.rel, changed, Segments.build([0], [0], [EXTENT + 1]), 0.25, None, x.tau, None)
    after = run(*args)
    assert torch.equal(after[: EXTENT - 1], before[: EXTENT - 1])
    assert not torch.equal(after[EXTENT - 1], before[EXTENT - 1])

"""attention on each backend: the row contract over neighbours, chunk cuts, pages and forks."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from torch import Tensor

from kernels.layout import SPLIT_TOKENS, Segments
from tests.kernels.attention_cases import (
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
    sequence,
)
from tests.kernels.backend import examples, ops, small
from tests.kernels.contract import DTYPES, SEEDS, assert_same, normal, telling, threads, uneven_sum


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=LENGTHS, shape=SHAPE, window=WINDOW, seed=SEEDS)
@examples(15)
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
@given(lengths=LENGTHS, shape=SHAPE, window=WINDOW, seed=SEEDS)
@examples(15)
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
            step = [min(lengths[n] - done[n], rng.choice(small([1, 1, 5, 63, 200], [1, 5, 37, 63, 80]))) for n in live]
            segments = Segments.build([slots[n] for n in live], [done[n] for n in live], step)
            rows = pack([parts[n][done[n] : done[n] + m] for n, m in zip(live, step, strict=True)])
            got = attend(rows, shape, window, segments, cache).split(step)
            for n, m, out in zip(live, step, got, strict=True):
                assert_same(out, whole[n][done[n] : done[n] + m], f"sequence {n} from {done[n]}, {m} rows")
                done[n] += m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prefix", "window"), small([(64, None), (100, 48), (128, None), (128, 48)], [(64, None), (100, 24)])
)
def test_fork(prefix: int, window: int | None, dtype: torch.dtype) -> None:
    """Two sessions that share the full pages of a prefix equal two separate sequences; so with recycled pages."""
    shape, steps = SHAPES[0], small(40, 2)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filled", [1, 64])
def test_a_page_filled_in_the_call_that_reads_it(filled: int, dtype: torch.dtype) -> None:
    """All keys of a call are in their pages before any row attends, in whichever order the sequences stand: one that
    begins behind another's page reads the ``filled`` rows which the same call writes there. A call before finds NaN."""
    shape, steps = SHAPES[0], 3
    start, tails = sequence(1, SPLIT_TOKENS, shape, dtype), [sequence(seed, steps, shape, dtype) for seed in (20, 30)]
    whole = [attend(pack([start, tail]), shape, None) for tail in tails]
    held = SPLIT_TOKENS - filled
    origin = pack([start[held:SPLIT_TOKENS], tails[0]])
    table = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    for order in ((0, 1), (1, 0)):
        cache = empty_pages(3, shape, dtype, table)
        if held:
            attend(start[:held], shape, None, cache=cache)
        early = attend(tails[1], shape, None, Segments.build([1], [SPLIT_TOKENS], [steps]), cache)
        with pytest.raises(AssertionError, match="differ"):
            assert_same(early, whole[1][SPLIT_TOKENS:], "before the page is full")
        starts, rows = (held, SPLIT_TOKENS), (origin, tails[1])
        lengths = [len(part.q) for part in rows]
        segments = Segments.build(list(order), [starts[n] for n in order], [lengths[n] for n in order])
        got = attend(pack([rows[n] for n in order]), shape, None, segments, cache).split([lengths[n] for n in order])
        for n, out in zip(order, got, strict=True):
            assert_same(out, whole[n][starts[n] :], f"sequence {n}, order {order}")


def test_control_keys_cut_by_queries() -> None:
    """An attention that takes keys in one chain for one query and by halves for many, as a library's may, gives a
    decoded row other bits than the same row of a prefill. All scores are equal here: a row is the mean of its values.
    """
    values = telling(1, 300)[0]

    def attention(queries: int) -> Tensor:
        """Of the last ``queries`` positions, [queries, 1]."""
        position = torch.arange(300 - queries, 300)[:, None]
        return uneven_sum(torch.where(torch.arange(300) <= position, values, 0), queries)[:, None] / (position + 1)

    with pytest.raises(AssertionError, match="differ"):
        assert_same(attention(1), attention(300)[-1:], "one query, and the last of many")


def test_control_keys_in_other_places() -> None:
    """Splits and their parts counted from where a window begins, and not from position 0, would make a chunk's cut
    change bits: the same keys, one position later, do."""
    shape, x, window = SHAPES[0], sequence(3, 90, SHAPES[0]), 40
    shifted = pack([sequence(4, 1, shape), x])  # no row from 40 on sees the row put before it
    expected, got = attend(x, shape, window)[40:], attend(shifted, shape, window)[41:]
    assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(got, expected, "keys in other places of their splits")


def test_later_rows_do_not_leak() -> None:
    """Rows are taken in tiles; a NaN or an infinity in one must not reach an earlier one."""
    shape, x = SHAPES[0], sequence(6, small(150, 70), SHAPES[0])
    expected = attend(x, shape, None)
    for at, value in ((1, torch.inf), (7, torch.nan), (64, -torch.inf), (69, torch.nan)):
        dirty = [t.clone() for t in (x.q, x.k, x.v, x.rel)]
        for t in dirty:
            t[at:] = value
        assert_same(attend(Rows(*dirty, x.tau), shape, None)[:at], expected[:at], f"{value} from row {at} on")


def test_strided_rows() -> None:
    shape, x = SHAPES[0], sequence(7, 40, SHAPES[0])
    parts = (x.q, x.k, x.v, x.rel)
    fused = torch.cat([t.flatten(1) for t in parts], 1)
    pieces = fused.split([t[0].numel() for t in parts], 1)
    views = Rows(*(piece.unflatten(1, t.shape[1:]) for piece, t in zip(pieces, parts, strict=True)), x.tau)
    assert_same(attend(views, shape, 33), attend(x, shape, 33), "views of a fused projection")


def test_gradients_of_a_sequence_are_its_own() -> None:
    """dq, dk, dv and drel of a sequence have the same bits alone and beside others."""
    shape, lengths = SHAPES[0], [9, 14]
    parts = [sequence(10 * n, length, shape) for n, length in enumerate(lengths)]
    upstream = normal(5, 23, shape.heads, shape.width)

    def gradients(x: Rows, segments: Segments, upstream: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.rel)]
        out = ops.attention(*leaves, proj(shape), segments, scale=0.25, window=7, tau=x.tau)
        return list(torch.autograd.grad(out, leaves, upstream))

    both = gradients(pack(parts), Segments.build([0, 1], [0, 0], lengths), upstream)
    alone = gradients(parts[1], Segments.build([0], [0], [14]), upstream[9:])
    for name, got, expected in zip(("dq", "dk", "dv", "drel"), both, alone, strict=True):
        assert_same(got[9:], expected, name)
    moved = gradients(parts[1], Segments.build([0], [0], [14]), upstream[:14])  # control
    assert not torch.equal(moved[0], alone[0])

"""attention on each backend: float64 oracle, gradients, windows, infinities, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.layout import Segments
from kernels.reference import backend as reference
from tests.kernels.attention_cases import (
    EXTENT,
    SHAPES,
    Rows,
    Shape,
    attend,
    empty_pages,
    pack,
    proj,
    replace,
    sequence,
)
from tests.kernels.backend import NATIVE, ops, small
from tests.kernels.contract import assert_gradients, normal, strided


@pytest.mark.parametrize("window", small([1, 50, 64, 65], [1, 50]))
def test_window(window: int) -> None:
    """A key inside the window counts, the next farther one does not, even when it holds NaN."""
    last = small(199, 69)
    shape, x = SHAPES[0], sequence(5, last + 1, SHAPES[0])
    expected = attend(x, shape, window)
    for far, same in ((window, True), (window - 1, False)):
        k, v = x.k.clone(), x.v.clone()
        k[last - far] = v[last - far] = float("nan")
        got = attend(Rows(x.q, k, v, x.rel, x.tau), shape, window)
        assert torch.equal(got[last], expected[last]) == same


def test_infinite_values() -> None:
    """+inf and -inf of values reach the rows that see them as they are; both together, or NaN, make a NaN."""
    shape, x = SHAPES[0], sequence(8, 40, SHAPES[0])
    v = x.v.clone()
    v[3, :, 0], v[19, :, 0], v[5, :, 2], v[30, :, 1] = torch.inf, -torch.inf, -torch.inf, torch.nan
    met = torch.cumsum(torch.where(v.isfinite(), 0.0, v), 0)[:, :1].expand(x.q.shape)  # adds as IEEE 754 does
    got = attend(replace(x, v=v), shape, None)
    assert torch.equal(got.isnan(), met.isnan()) and bool(met.isnan().any())
    assert torch.equal(got[met.isinf()], met[met.isinf()]) and bool(met.isinf().any())
    assert torch.equal(got[met == 0], attend(x, shape, None)[met == 0])


def test_rel_bias_reaches_its_extent_and_no_farther() -> None:
    """The bias of distance EXTENT - 1 moves a row, and that of no other distance is touched."""
    shape, x = SHAPES[0], sequence(9, EXTENT + 1, SHAPES[0])
    changed = proj(shape).clone()
    changed[:, -1] += 100.0
    before, segments = attend(x, shape, None), Segments.build([0], [0], [EXTENT + 1])
    after = ops.attention(x.q, x.k, x.v, x.rel, changed, segments, scale=shape.width**-0.5, tau=x.tau)
    assert torch.equal(after[: EXTENT - 1], before[: EXTENT - 1])
    assert not torch.equal(after[EXTENT - 1], before[EXTENT - 1])


def _in(segments: Segments, shape: Shape, window: int | None, tau: Tensor) -> Callable[..., Tensor]:
    scale = shape.width**-0.5

    def call(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, rel_proj: Tensor) -> Tensor:
        if q.dtype == torch.float64:
            return reference.attention(q, k, v, rel, rel_proj, segments, scale, window, 0, tau.double(), None)
        return ops.attention(q, k, v, rel, rel_proj, segments, scale=scale, window=window, tau=tau)

    return call


WITH_WINDOWS = small(
    [(shape, window) for shape in SHAPES for window in (None, 40)], list(zip(SHAPES, (None, 20, None), strict=False))
)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 150 * 2.0**-24), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize(("shape", "window"), WITH_WINDOWS)
def test_float64_oracle(shape: Shape, window: int | None, dtype: torch.dtype, bound: float) -> None:
    """Scores are chains of C + D terms of size about 1 and move a weight by as much as they are off; the weighted sums
    add about 64 more roundings: 150 * 2^-24 of the largest value bounds both with room. In bf16 one rounding rules."""
    lengths = [small(131, 70), 1, small(20, 9)]
    x = pack([sequence(n, length, shape, dtype) for n, length in enumerate(lengths)])
    call = _in(Segments.build([2, 0, 1], [0, 0, 0], lengths), shape, window, x.tau)
    inputs = (x.q, x.k, x.v, x.rel, proj(shape, dtype))
    got, oracle = call(*inputs), call(*(t.double() for t in inputs))
    assert float((got - oracle).abs().max()) <= bound * float(x.v.abs().max())


def test_great_scores() -> None:
    """Scores of ±1000: weights of exactly 1 and 0, no NaN."""
    q = torch.full((80, 1, 8), 30.0)
    k = torch.where(torch.arange(80)[:, None, None] == 3, 5.0, -5.0).expand(80, 1, 8).contiguous()
    v = normal(1, 80, 1, 8)
    segments = Segments.build([0], [0], [80])
    got = ops.attention(q, k, v, torch.zeros(80, 1, 1), torch.zeros(1, 4), segments, scale=1.0)
    assert torch.equal(got[3:], v[3:4].expand(77, 1, 8))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("shape", "window"), WITH_WINDOWS)
def test_gradients(
    shape: Shape, window: int | None, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 autograd of the definition: about 100 terms a sum, relative to the greatest gradient; in bf16 the
    output's and the gradients' own rounding (2^-9 each) rules. Triton takes its tiles in several passes."""
    if not NATIVE:
        monkeypatch.setattr("kernels.triton.attention_backward.PASS_TILES", 2)
    lengths = small([70, 2, 33], [36, 2, 7])
    x = pack([sequence(10 * n, length, shape, dtype) for n, length in enumerate(lengths)])
    call = _in(Segments.build([0, 1, 2], [0, 0, 0], lengths), shape, window, x.tau)
    assert_gradients(call, call, (x.q, x.k, x.v, x.rel, proj(shape, dtype)), 3, bound)


def test_no_rows() -> None:
    shape = SHAPES[0]
    got = attend(sequence(1, 0, shape), shape, None, Segments.build([], [], []))
    assert got.shape == (0, shape.heads, shape.width)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(9, 2, 32)}, r"k is \(9, 2, 32\)"),
        ({"v": torch.zeros(10, 2, 31)}, "do not fit together"),
        ({"q": torch.zeros(10, 3, 32)}, "do not fit together"),
        ({"rel": torch.zeros(10, 4, 15)}, "rel_proj"),
        ({"v": torch.zeros(10, 2, 32, dtype=torch.float64)}, r"v is torch\.float64"),
        ({"v": torch.zeros(10, 2, 32, dtype=torch.bfloat16)}, r"v is torch\.bfloat16"),
        ({"q": strided(torch.zeros(10, 4, 32))}, "q has strides"),
        ({"tau": torch.zeros(9)}, "tau is"),
    ],
)
def test_bad_arguments(changed: dict[str, Tensor], message: str) -> None:
    shape = Shape(4, 2, 32, 16)
    with pytest.raises(ValueError, match=message):
        attend(replace(sequence(1, 10, shape), **changed), shape, None)


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
        attend(replace(x, q=x.q.clone().requires_grad_()), shape, 30, Segments.build([0], [0], [10]), cache)

"""What the tests of attention share: shapes, sequences of random rows, pages, and the call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from tests.kernels.backend import ops, small
from tests.kernels.contract import normal

EXTENT = 70


@dataclass(frozen=True)
class Shape:
    heads: int
    key_heads: int
    width: int
    channels: int


SHAPES = small(
    [Shape(4, 2, 32, 16), Shape(3, 3, 20, 5), Shape(4, 1, 16, 8), Shape(6, 1, 8, 3), Shape(2, 2, 9, 1)],
    [Shape(2, 1, 16, 2), Shape(2, 2, 20, 1), Shape(3, 1, 8, 1)],
)
"""One head a key head and more, of counts and widths that are powers of two and that are not."""

SHAPE = st.sampled_from(SHAPES)
WINDOW = st.sampled_from([None, 1, 33, 64, 128])
FIRST = st.sampled_from([0, 64, 128])
LENGTHS = st.lists(st.integers(1, small(250, 80)), min_size=1, max_size=small(4, 2))


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
    x: Rows,
    shape: Shape,
    window: int | None,
    segments: Segments | None = None,
    cache: PagedKV | None = None,
    first: int = 0,
) -> Tensor:
    if segments is None:
        segments = Segments.build([0], [0], [len(x.q)])
    scale = shape.width**-0.5
    bias = proj(shape, x.q.dtype)
    return ops.attention(
        x.q, x.k, x.v, x.rel, bias, segments, scale=scale, window=window, first=first, tau=x.tau, cache=cache
    )


def empty_pages(count: int, shape: Shape, dtype: torch.dtype, table: Tensor) -> PagedKV:
    """Pages full of NaN: whatever is read before it is written, or beyond what is held, shows."""
    heads, width = shape.key_heads, shape.width
    nan = float("nan")
    key = torch.full((count, heads, width, SPLIT_TOKENS), nan, dtype=dtype)
    return PagedKV(key, torch.full((count, heads, SPLIT_TOKENS, width), nan, dtype=dtype), table)


def replace(x: Rows, **changed: Tensor) -> Rows:
    fields = {name: getattr(x, name) for name in ("q", "k", "v", "rel", "tau")}
    return Rows(**(fields | changed))

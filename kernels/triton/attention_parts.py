"""What attention's forward and backward share: which rows and keys a program takes, and products at full precision.

A *query tile* is all query heads of one key head at ROWS / GROUP_PAD neighbouring positions; keys are taken KEYS at a
time, in aligned parts of a split. Both are aligned to absolute positions, so a query is in the same row of the same
tile, and is reduced over the same parts, however the sequence was cut into calls. Sizes depend on the type and the
model alone.

Products of bf16 numbers are exact in fp32; an fp32 factor, such as a softmax weight, is split into three bf16 parts
that add up to it exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.layout import SPLIT_TOKENS
from kernels.triton.tiles import PRECISION, attention_tile

NO_WINDOW = 1 << 30  # greater than any distance

Sight = tuple[int, int]
"""The window, or NO_WINDOW, and ``first`` of `kernels.ops.attention`."""

Shape = tuple[int, ...]  # heads, key heads, width, channels, extent, window, first

SPEC_SHAPES: tuple[Shape, ...] = (
    (32, 8, 128, 16, 1024, 512, 0),
    (32, 8, 128, 16, 1024, NO_WINDOW, 0),
    (32, 8, 128, 16, 1024, 4096, 64),
    (4, 2, 32, 16, 1024, 512, 0),
)
"""Shapes to compile ahead of time: those of sliding and of global layers, of global layers that keep the first keys and
a window, and a small model's."""


def is_global(shape: Shape) -> bool:
    """Whether it is a global layer's, whose scores have a factor."""
    return shape[5] == NO_WINDOW or shape[6] > 0


def title(shape: Shape) -> str:
    heads, key_heads, width, _, _, window, first = shape
    keys = "global" if window == NO_WINDOW else f"window {window}" + (f" and first {first}" if first else "")
    return f"{heads}/{key_heads} heads of {width}, {keys}"


@triton.jit
def is_visible(distance, at, WINDOW: tl.constexpr, FIRST: tl.constexpr):
    """[rows, keys]: whether a row sees a key ``distance`` before it; ``at`` [keys] are the keys' positions."""
    near = distance < WINDOW
    if FIRST > 0:
        near = near | (at < FIRST)[None, :]
    return (distance >= 0) & near


@triton.jit
def parts_skipped(first_seen, KEYS: tl.constexpr, FIRST: tl.constexpr):
    """How many parts of KEYS keys a tile need not look at: those between the first FIRST keys and its window, which
    begins with key ``first_seen``."""
    return tl.maximum(first_seen // KEYS - FIRST // KEYS, 0)


@triton.jit
def part_of(step, skipped, KEYS: tl.constexpr, FIRST: tl.constexpr):
    """The part that a tile takes at ``step``, counted from ``skipped``: the first FIRST // KEYS, then those from its
    window on."""
    part = step
    if FIRST > 0:
        part = tl.where(step - skipped < FIRST // KEYS, step - skipped, step)
    return part


@triton.jit
def width_product(
    a, a_rows, a_valid, b, b_rows, b_valid, b_step, WIDTH: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """[rows, keys]: sum_d a[a_rows[row] + d] * b[b_rows[key] + d * b_step], STEP terms at a time in ascending d."""
    total = tl.full((a_rows.shape[0], b_rows.shape[0]), 0.0, tl.float32)
    for first in range(0, WIDTH, STEP):
        d = first + tl.arange(0, STEP)
        inside = d < WIDTH
        left = tl.load(a + a_rows[:, None] + d[None, :], mask=a_valid[:, None] & inside[None, :], other=0.0)
        place = b_rows[None, :] + d[:, None] * b_step
        right = tl.load(b + place, mask=inside[:, None] & b_valid[None, :], other=0.0)
        total += tl.dot(left, right, input_precision=PRECISION)
    return total


@triton.jit
def wide_product(a, b):
    """a @ b for an fp32 ``a`` at full precision, also where b is bf16: a = high + middle + low, 8 bits each."""
    if b.dtype == tl.float32:
        result = tl.dot(a, b, input_precision=PRECISION)
    else:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        result = tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))
    return result


@triton.jit
def relative_bias(rel, rel_rows, rel_proj, distance, valid, CHANNELS: tl.constexpr, EXTENT: tl.constexpr):
    """[rows, keys]: sum_c rel[row, c] * rel_proj[c, distance], one chain over c; 0 beyond the extent.

    rel_rows [rows]: the element of ``rel`` where a row's channels start; valid [rows]."""
    near = (distance >= 0) & (distance < EXTENT) & valid[:, None]
    bias = tl.zeros(distance.shape, tl.float32)
    for c in range(CHANNELS):
        left = tl.load(rel + rel_rows + c, mask=valid, other=0.0).to(tl.float32)
        right = tl.load(rel_proj + c * EXTENT + distance, mask=near, other=0.0).to(tl.float32)
        bias += left[:, None] * right
    return tl.where(near, bias, 0.0)  # a NaN of rel stays within the extent


def sizes(dtype: torch.dtype, heads: int, key_heads: int, width: int) -> dict[str, int]:
    """Compile-time constants of a tile, from the type and the model's head counts and width alone."""
    tile, group = attention_tile(dtype), triton.next_power_of_2(heads // key_heads)
    width_pad = max(16, triton.next_power_of_2(width))  # 16 is the least that a product takes
    return {
        "ROWS": max(tile.m, group),
        "KEYS": tile.n,
        "STEP": min(tile.k, width_pad),
        "GROUP_PAD": group,
        "WIDTH_PAD": width_pad,
        "SPLIT": SPLIT_TOKENS,
    }


def shape_constants(dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Compile-time constants of a kernel over query tiles, without HAS_TAU."""
    heads, key_heads, width, channels, extent, window, first = shape
    of_model = {"HEADS": heads, "KEY_HEADS": key_heads, "WIDTH": width, "CHANNELS": channels, "EXTENT": extent}
    return {**of_model, "WINDOW": window, "FIRST": first, **sizes(dtype, heads, key_heads, width)}

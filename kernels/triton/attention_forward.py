"""Attention's forward kernels: one writes new keys and values into their pages, one attends over them.

One program takes a query tile over the keys that it sees from left to right, KEYS at a time: aligned parts of a split,
each with its own maximum, sum of exp and weighted values, combined from left to right. Why a row's bits depend on no
other row:

- tiles and parts are aligned to absolute positions (`attention_parts`);
- every part runs the same code over KEYS keys; a part that a row cannot see leaves its sums unchanged;
- the rows of a product share only the values. NaNs and infinities among those are taken out before the product and
  added afterwards to the rows that see them, because 0 * NaN would bring them into the other rows too.

Left out on purpose: splits of one sequence in several programs at once (flash decoding), which would need another
kernel for few rows than for many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.triton.attention_parts import (
    SPEC_SHAPES,
    Sight,
    is_global,
    is_visible,
    part_of,
    parts_skipped,
    relative_bias,
    shape_constants,
    sizes,
    title,
    wide_product,
    width_product,
)
from kernels.triton.launch import SHORT, CompileSpec, plain, row_stride, run
from kernels.triton.tables import tiles, whole
from kernels.triton.tiles import attention_tile


@triton.jit(do_not_specialize=["table_width", "rel_row"], do_not_specialize_on_alignment=["rel", "rel_proj"])
def attention_kernel(
    q, rel, rel_proj, tau, key, value, table, tiles, out, lse, scale, table_width, rel_row,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, HAS_TAU: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STEP: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, key heads). tiles int32 [tiles, 5]: see `tiles_of`. table int32 [S, table_width]: the pages of
    each sequence. lse fp32 [T, H]: ln of a row's sum of exp."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    tile = tiles + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    s, shift = tl.load(tile), tl.load(tile + 1)
    start, end, base = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH_PAD)
    position = base + r // GROUP_PAD
    valid = (r % GROUP_PAD < GROUP) & (position >= start) & (position < end)
    row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD  # of [T * H]
    rel_rows = (position + shift).to(tl.int64) * rel_row + (key_head * GROUP + r % GROUP_PAD) * CHANNELS
    inside = valid[:, None] & (d < WIDTH)[None, :]
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_TAU:
        factor = tl.load(tau + position + shift, mask=valid, other=1.0)

    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH_PAD), tl.float32)
    last = tl.minimum(base + ROWS // GROUP_PAD, end) - 1
    first_seen = tl.maximum(tl.maximum(base, start) - (WINDOW - 1), 0)
    skipped = parts_skipped(first_seen, KEYS, FIRST)
    for step in range(skipped, last // KEYS + 1):
        part = part_of(step, skipped, KEYS, FIRST)
        first = part * KEYS
        at = first + tl.arange(0, KEYS)
        page = tl.load(table + s.to(tl.int64) * table_width + first // SPLIT).to(tl.int64) * KEY_HEADS + key_head
        j = at % SPLIT
        values = tl.load(
            value + (page * SPLIT + j[:, None]) * WIDTH + d[None, :],
            mask=(at <= last)[:, None] & (d < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        distance = position[:, None] - at[None, :]
        visible = is_visible(distance, at, WINDOW, FIRST)
        dot = width_product(q, row * WIDTH, valid, key, page * WIDTH * SPLIT + j, at <= last, SPLIT, WIDTH, STEP)
        bias = relative_bias(rel, rel_rows, rel_proj, distance, valid, CHANNELS, EXTENT)
        score = tl.where(visible, factor[:, None] * (scale * dot + bias), float("-inf"))
        part_max = tl.max(score, 1)
        weight = tl.exp(score - tl.where(part_max == float("-inf"), 0.0, part_max)[:, None])
        weight = tl.where(visible, weight, 0.0)

        # +inf counts 1, -inf 128, NaN 16384: with at most 64 keys no count carries into the next; all are exact.
        finite = tl.abs(values.to(tl.float32)) < float("inf")
        poison = tl.zeros((ROWS, WIDTH_PAD), tl.float32)
        if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
            wide = values.to(tl.float32)
            code = tl.where(wide == float("inf"), 1.0, tl.where(wide == float("-inf"), 128.0, 16384.0))
            sight = visible.to(tl.float32).to(tl.bfloat16)  # the interpreter takes an integer's bits for a bf16's
            met = tl.dot(sight, tl.where(finite, 0.0, code).to(tl.bfloat16)).to(tl.int32)
            up, down = (met & 127) > 0, ((met >> 7) & 127) > 0
            infinite = tl.where(up, float("inf"), float("-inf"))
            poison = tl.where((met >= 16384) | (up & down), float("nan"), infinite)
            poison = tl.where(met > 0, poison, 0.0)
        values = tl.where(finite, values, tl.zeros_like(values))
        part_out = wide_product(weight, values) + poison

        # A row that sees nothing of this part keeps its sums, and the sign of their zeros.
        seen = (first + KEYS - 1 > position - WINDOW) | (first < FIRST)
        seen = (first <= position) & seen
        higher = tl.maximum(greatest, part_max)
        shown = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp(greatest - shown), tl.exp(part_max - shown)
        total = tl.where(seen, total * old + tl.sum(weight, 1) * new, total)
        result = tl.where(seen[:, None], result * old[:, None] + part_out * new[:, None], result)
        greatest = higher
    tl.store(lse + row, greatest + tl.log(total), mask=valid)
    result = tl.div_rn(result, total[:, None])
    tl.store(out + row[:, None] * WIDTH + d[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["table_width", "k_row", "v_row"], do_not_specialize_on_alignment=["k", "v"])
def write_kernel(
    k, v, key, value, table, splits, table_width, k_row, v_row,
    KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Copies new rows into their pages. Grid (splits that new rows reach, key heads); splits as `tiles_of`."""
    tile = splits + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    s, shift = tl.load(tile), tl.load(tile + 1)
    start, end, base = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    j = tl.arange(0, SPLIT)
    d = tl.arange(0, WIDTH_PAD)
    position = base + j
    fresh = ((position >= start) & (position < end))[:, None] & (d < WIDTH)[None, :]
    page = tl.load(table + s.to(tl.int64) * table_width + base // SPLIT).to(tl.int64) * KEY_HEADS + key_head
    row, column = (position + shift).to(tl.int64)[:, None], key_head * WIDTH + d[None, :]
    new_key, new_value = tl.load(k + row * k_row + column, mask=fresh), tl.load(v + row * v_row + column, mask=fresh)
    tl.store(key + (page * WIDTH + d[None, :]) * SPLIT + j[:, None], new_key, mask=fresh)
    tl.store(value + (page * SPLIT + j[:, None]) * WIDTH + d[None, :], new_value, mask=fresh)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    sight: Sight,
    tau: Tensor | None,
    cache: PagedKV,
) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values into the pages, then attends: (out [T, H, D], lse fp32 [T, H]). ``cache.table``
    [S, pages] has a row for each segment."""
    rows, heads, width = q.shape
    key_heads, tile = k.shape[1], attention_tile(q.dtype)
    size = sizes(q.dtype, heads, key_heads, width)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(rows, heads, dtype=torch.float32)
    if rows == 0:
        return out, lse
    splits = tiles(segments, SPLIT_TOKENS, q.device)
    run(
        write_kernel, (len(splits), key_heads), q.device, tile,
        k, v, cache.key, cache.value, cache.table, splits, cache.table.shape[1], row_stride(k), row_stride(v),
        KEY_HEADS=key_heads, WIDTH=width, SPLIT=SPLIT_TOKENS, WIDTH_PAD=size["WIDTH_PAD"],
    )  # fmt: skip
    queries = tiles(segments, size["ROWS"] // size["GROUP_PAD"], q.device)
    run(
        attention_kernel, (len(queries), key_heads), q.device, tile,
        plain(q), rel, rel_proj.contiguous(), lse if tau is None else plain(tau), cache.key, cache.value, cache.table,
        queries, out, lse, float(scale), cache.table.shape[1], row_stride(rel),
        HAS_TAU=tau is not None, **shape_constants(q.dtype, (heads, key_heads, width, *rel_proj.shape, *sight)),
    )  # fmt: skip
    return out, lse


def attend_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    sight: Sight,
    tau: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`forward` of whole sequences over temporary pages, of which only what was written is read: (out, lse)."""
    (table, pages), (_, key_heads, head) = whole(segments, q.device), k.shape
    cache = PagedKV(
        k.new_empty(pages, key_heads, head, SPLIT_TOKENS), v.new_empty(pages, key_heads, SPLIT_TOKENS, head), table
    )
    return forward(q, k, v, rel, rel_proj, segments, scale, sight, tau, cache)


def specs() -> list[CompileSpec]:
    out = []
    for dtype, t in SHORT.items():
        tile = attention_tile(dtype)
        pointers = dict.fromkeys(("q", "rel", "rel_proj", "key", "value", "out"), f"*{t}")
        pointers |= {"tau": "*fp32", "table": "*i32", "tiles": "*i32", "lse": "*fp32"}
        new = dict.fromkeys(("k", "v", "key", "value"), f"*{t}") | {"table": "*i32", "splits": "*i32"}
        for shape in SPEC_SHAPES:
            _, key_heads, width, *_ = shape
            constants = shape_constants(dtype, shape)
            attend = constants | {"HAS_TAU": is_global(shape)}
            signature = pointers | {"scale": "fp32", "table_width": "i32", "rel_row": "i32"}
            how = tile.warps, tile.stages
            even = tuple(name for name in pointers if name not in ("rel", "rel_proj"))
            out.append(CompileSpec(f"attention, {title(shape)}: {t}", attention_kernel, signature, attend, even, *how))
            if is_global(shape):
                continue  # pages know no window
            write = {name: constants[name] for name in ("KEY_HEADS", "WIDTH", "SPLIT", "WIDTH_PAD")}
            signature = new | {"table_width": "i32", "k_row": "i32", "v_row": "i32"}
            name = f"attention pages, {key_heads} heads of {width}: {t}"
            even = tuple(name for name in new if name not in ("k", "v"))
            out.append(CompileSpec(name, write_kernel, signature, write, even, *how))
    return out

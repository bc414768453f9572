"""Gradients of attention: dq, dk, dv, drel and drel_proj of whole sequences, without an atomic add.

With P = exp(score - lse), dP = dout . v and delta = sum of dout * out: dscore = P (dP - delta) (Dao et al. 2022, arXiv
2205.14135, appendix B). score = tau (scale q . k + bias), so the gradient of q . k is dscore * tau * scale, that of the
bias dscore * tau. Each sum is taken by one program in one order:

- dq: a program a query tile and key head, over keys from left to right;
- dk, dv: a program for KEYS keys and a key head, over query tiles from left to right;
- the bias: the program of dq also stores dscore * tau *by distance*, [row, extent], every element from the one key at
  that distance. Then drel and drel_proj are matrix products over distances and over rows. This is kept for PASS_TILES
  query tiles at a time, a pass; drel_proj is summed within a pass and a key head, then over these in order.

Sums are fp32, for bf16 too; every gradient is rounded once, to its input's type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import Segments
from kernels.triton.attention_parts import (
    SPEC_SHAPES,
    Shape,
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
from kernels.triton.launch import SHORT, CompileSpec, plain, run
from kernels.triton.tables import tiles
from kernels.triton.tiles import DISTANCES, PASS_TILES, attention_tile

ADDENDS = 256  # elements of drel_proj that one program of the last sum takes


@triton.jit
def queries_kernel(
    q, k, v, rel, rel_proj, tau, tiles, out, lse, dout, dq, delta, by_distance, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, HAS_TAU: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STEP: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """dq, delta and the bias's gradient by distance [tiles, KEY_HEADS, ROWS, EXTENT]. Grid (query tiles, key heads)."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    tile = tiles + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    shift, start, end, base = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH_PAD)
    position = base + r // GROUP_PAD
    valid = (r % GROUP_PAD < GROUP) & (position >= start) & (position < end)
    row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD
    inside = valid[:, None] & (d < WIDTH)[None, :]
    place = row[:, None] * WIDTH + d[None, :]
    upstream = tl.load(dout + place, mask=inside, other=0.0)
    result = tl.load(out + place, mask=inside, other=0.0)
    log_sum = tl.load(lse + row, mask=valid, other=0.0)
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_TAU:
        factor = tl.load(tau + position + shift, mask=valid, other=1.0)
    mean = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + row, mean, mask=valid)
    own = ((tl.program_id(0) * KEY_HEADS + key_head) * ROWS + r).to(tl.int64) * EXTENT

    total = tl.zeros((ROWS, WIDTH_PAD), tl.float32)
    last = tl.minimum(base + ROWS // GROUP_PAD, end) - 1
    first_seen = tl.maximum(tl.maximum(base, start) - (WINDOW - 1), 0)
    skipped = parts_skipped(first_seen, KEYS, FIRST)
    for step in range(skipped, last // KEYS + 1):
        part = part_of(step, skipped, KEYS, FIRST)
        at = part * KEYS + tl.arange(0, KEYS)
        source = ((at + shift).to(tl.int64) * KEY_HEADS + key_head) * WIDTH
        distance = position[:, None] - at[None, :]
        visible = is_visible(distance, at, WINDOW, FIRST) & valid[:, None]
        dot = width_product(q, row * WIDTH, valid, k, source, at <= last, 1, WIDTH, STEP)
        dweight = width_product(dout, row * WIDTH, valid, v, source, at <= last, 1, WIDTH, STEP)
        bias = relative_bias(rel, row * CHANNELS, rel_proj, distance, valid, CHANNELS, EXTENT)
        score = factor[:, None] * (scale * dot + bias)
        weight = tl.where(visible, tl.exp(score - log_sum[:, None]), 0.0)
        dscore = tl.where(visible, weight * (dweight - mean[:, None]) * factor[:, None], 0.0)
        tl.store(by_distance + own[:, None] + distance, dscore, mask=visible & (distance < EXTENT))
        held = (at <= last)[:, None] & (d < WIDTH)[None, :]
        keys = tl.load(k + source[:, None] + d[None, :], mask=held, other=0.0)
        total += wide_product(dscore * scale, keys)
    tl.store(dq + place, total.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def keys_kernel(
    q, k, v, rel, rel_proj, tau, parts, lse, dout, dk, dv, delta, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, HAS_TAU: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STEP: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS neighbouring keys. Grid (such parts, key heads); parts as `tiles_of`."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP_PAD
    tile = parts + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    shift, end, base = tl.load(tile + 1), tl.load(tile + 3), tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH_PAD)
    at = base + tl.arange(0, KEYS)
    source = ((at + shift).to(tl.int64) * KEY_HEADS + key_head) * WIDTH
    dkeys = tl.zeros((KEYS, WIDTH_PAD), tl.float32)
    dvalues = tl.zeros((KEYS, WIDTH_PAD), tl.float32)
    last = tl.minimum(base + KEYS - 1 + (WINDOW - 1), end - 1)
    if FIRST > 0:
        last = tl.where(base < FIRST, end - 1, last)
    for step in range(base // QUERIES, last // QUERIES + 1):
        position = step * QUERIES + r // GROUP_PAD
        valid = (r % GROUP_PAD < GROUP) & (position < end)
        row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD
        inside = valid[:, None] & (d < WIDTH)[None, :]
        log_sum = tl.load(lse + row, mask=valid, other=0.0)
        mean = tl.load(delta + row, mask=valid, other=0.0)
        factor = tl.full((ROWS,), 1.0, tl.float32)
        if HAS_TAU:
            factor = tl.load(tau + position + shift, mask=valid, other=1.0)
        distance = position[:, None] - at[None, :]
        visible = is_visible(distance, at, WINDOW, FIRST) & valid[:, None]
        dot = width_product(q, row * WIDTH, valid, k, source, at < end, 1, WIDTH, STEP)
        dweight = width_product(dout, row * WIDTH, valid, v, source, at < end, 1, WIDTH, STEP)
        bias = relative_bias(rel, row * CHANNELS, rel_proj, distance, valid, CHANNELS, EXTENT)
        score = factor[:, None] * (scale * dot + bias)
        weight = tl.where(visible, tl.exp(score - log_sum[:, None]), 0.0)
        dscore = tl.where(visible, weight * (dweight - mean[:, None]) * factor[:, None], 0.0)
        query_place = row[:, None] * WIDTH + d[None, :]
        upstream = tl.load(dout + query_place, mask=inside, other=0.0)
        dvalues += wide_product(tl.trans(weight), upstream)
        queries = tl.load(q + query_place, mask=inside, other=0.0)
        dkeys += wide_product(tl.trans(dscore * scale), queries)
    place = source[:, None] + d[None, :]
    held = (at < end)[:, None] & (d < WIDTH)[None, :]
    tl.store(dk + place, dkeys.to(dk.dtype.element_ty), mask=held)
    tl.store(dv + place, dvalues.to(dv.dtype.element_ty), mask=held)


@triton.jit
def rel_kernel(
    rel_proj, tiles, by_distance, drel,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr, ROWS: tl.constexpr,
    GROUP_PAD: tl.constexpr, CHANNELS_PAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """drel[row, c] = sum_d by_distance[row, d] * rel_proj[c, d], steps ascending. Grid (tiles, key heads)."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    tile = tiles + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    shift, start, end, base = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS_PAD)
    position = base + r // GROUP_PAD
    valid = (r % GROUP_PAD < GROUP) & (position >= start) & (position < end)
    row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD
    own = ((tl.program_id(0) * KEY_HEADS + key_head) * ROWS + r).to(tl.int64) * EXTENT
    total = tl.zeros((ROWS, CHANNELS_PAD), tl.float32)
    for first in range(0, EXTENT, STEP):
        d = first + tl.arange(0, STEP)
        gradient = tl.load(by_distance + own[:, None] + d[None, :], mask=(d < EXTENT)[None, :], other=0.0)
        inside = (d < EXTENT)[:, None] & (c < CHANNELS)[None, :]
        proj = tl.load(rel_proj + c[None, :] * EXTENT + d[:, None], mask=inside, other=0.0)
        total += wide_product(gradient, proj)
    inside = valid[:, None] & (c < CHANNELS)[None, :]
    tl.store(drel + row[:, None] * CHANNELS + c[None, :], total.to(drel.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["order", "count"])
def proj_kernel(
    rel, tiles, by_distance, partial, order, count,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr, ROWS: tl.constexpr,
    GROUP_PAD: tl.constexpr, CHANNELS_PAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """partial [passes, KEY_HEADS, CHANNELS, EXTENT] at pass ``order``: the sum over its rows, tile after tile, of
    rel[row, c] * by_distance[row, d]. Grid (steps of distances, key heads)."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    key_head = tl.program_id(1)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS_PAD)
    d = tl.program_id(0) * STEP + tl.arange(0, STEP)
    total = tl.zeros((CHANNELS_PAD, STEP), tl.float32)
    for n in range(0, count):
        tile = tiles + n * 5
        shift, start, end, base = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
        position = base + r // GROUP_PAD
        valid = (r % GROUP_PAD < GROUP) & (position >= start) & (position < end)
        row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD
        own = ((n * KEY_HEADS + key_head) * ROWS + r).to(tl.int64) * EXTENT
        inside = valid[:, None] & (c < CHANNELS)[None, :]
        left = tl.load(rel + row[:, None] * CHANNELS + c[None, :], mask=inside, other=0.0)
        gradient = tl.load(by_distance + own[:, None] + d[None, :], mask=(d < EXTENT)[None, :], other=0.0)
        total += tl.trans(wide_product(tl.trans(gradient), left))
    inside = (c < CHANNELS)[:, None] & (d < EXTENT)[None, :]
    place = ((order * KEY_HEADS + key_head).to(tl.int64) * CHANNELS + c[:, None]) * EXTENT + d[None, :]
    tl.store(partial + place, total, mask=inside)


@triton.jit(do_not_specialize=["count"])
def proj_sum_kernel(partial, drel_proj, count, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums partial [count, ELEMENTS] over its rows in ascending order. Grid (blocks of elements,)."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, count):
        total += tl.load(partial + e, mask=e < ELEMENTS, other=0.0)
        partial += ELEMENTS
    tl.store(drel_proj + e, total.to(drel_proj.dtype.element_ty), mask=e < ELEMENTS)


def flat_constants(dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Compile-time constants of the products with the gradients by distance."""
    heads, key_heads, width, channels, extent, _, _ = shape
    size = sizes(dtype, heads, key_heads, width)
    of_model = {"HEADS": heads, "KEY_HEADS": key_heads, "CHANNELS": channels, "EXTENT": extent}
    of_tile = {"ROWS": size["ROWS"], "GROUP_PAD": size["GROUP_PAD"], "STEP": DISTANCES}
    return {**of_model, **of_tile, "CHANNELS_PAD": max(16, triton.next_power_of_2(channels))}


def differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    tau: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    segments: Segments,
    scale: float,
    sight: Sight,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, drel, drel_proj), given the forward's ``out`` and ``lse`` and the gradient ``dout``. All arguments
    are contiguous."""
    (rows, heads, width), key_heads, tile = q.shape, k.shape[1], attention_tile(q.dtype)
    channels, extent = rel_proj.shape
    size = sizes(q.dtype, heads, key_heads, width)
    dq, dk, dv, drel = (torch.empty_like(x) for x in (q, k, v, rel))
    if rows == 0:
        return dq, dk, dv, drel, torch.zeros_like(rel_proj)
    queries = tiles(segments, size["ROWS"] // size["GROUP_PAD"], q.device)
    parts = tiles(segments, size["KEYS"], q.device)
    factor = lse if tau is None else plain(tau)
    delta = torch.empty_like(lse)
    passes = queries.split(PASS_TILES)
    by_distance = lse.new_empty(min(len(queries), PASS_TILES) * key_heads * size["ROWS"], extent)
    partial = lse.new_empty(len(passes), key_heads, channels, extent)
    shape: Shape = heads, key_heads, width, channels, extent, *sight
    over = shape_constants(q.dtype, shape) | {"HAS_TAU": tau is not None}
    flat = flat_constants(q.dtype, shape)
    for n, pass_tiles in enumerate(passes):
        by_distance.zero_()
        grid = len(pass_tiles), key_heads
        run(
            queries_kernel, grid, q.device, tile,
            q, k, v, rel, rel_proj, factor, pass_tiles, out, lse, dout, dq, delta, by_distance, float(scale), **over,
        )  # fmt: skip
        run(rel_kernel, grid, q.device, tile, rel_proj, pass_tiles, by_distance, drel, **flat)
        steps = triton.cdiv(extent, DISTANCES), key_heads
        run(proj_kernel, steps, q.device, tile, rel, pass_tiles, by_distance, partial, n, len(pass_tiles), **flat)
    run(
        keys_kernel, (len(parts), key_heads), q.device, tile,
        q, k, v, rel, rel_proj, factor, parts, lse, dout, dk, dv, delta, float(scale), **over,
    )  # fmt: skip
    drel_proj, elements = torch.empty_like(rel_proj), channels * extent
    blocks = (triton.cdiv(elements, ADDENDS),)
    addends = len(passes) * key_heads
    run(proj_sum_kernel, blocks, q.device, tile, partial, drel_proj, addends, ELEMENTS=elements, BLOCK=ADDENDS)
    return dq, dk, dv, drel, drel_proj


def specs() -> list[CompileSpec]:
    out = []
    for dtype, t in SHORT.items():
        tile = attention_tile(dtype)
        p = f"*{t}"
        common = dict.fromkeys(("q", "k", "v", "rel", "rel_proj", "dout"), p)
        common |= dict.fromkeys(("tau", "lse", "delta"), "*fp32")
        queries = common | {"out": p, "dq": p, "tiles": "*i32", "by_distance": "*fp32"}
        keys = common | {"dk": p, "dv": p, "parts": "*i32"}
        rel = {"rel_proj": p, "drel": p, "tiles": "*i32", "by_distance": "*fp32"}
        proj = {"rel": p, "tiles": "*i32", "by_distance": "*fp32", "partial": "*fp32"}
        total = {"partial": "*fp32", "drel_proj": p}
        for shape in SPEC_SHAPES:
            _, _, _, channels, extent, *_ = shape
            over = shape_constants(dtype, shape) | {"HAS_TAU": is_global(shape)}
            flat = flat_constants(dtype, shape)
            for name, kernel, pointers, numbers, constants in (
                ("dq", queries_kernel, queries, {"scale": "fp32"}, over),
                ("dk and dv", keys_kernel, keys, {"scale": "fp32"}, over),
                ("drel", rel_kernel, rel, {}, flat),
                ("drel_proj", proj_kernel, proj, {"order": "i32", "count": "i32"}, flat),
                (
                    "drel_proj sum",
                    proj_sum_kernel,
                    total,
                    {"count": "i32"},
                    {"ELEMENTS": channels * extent, "BLOCK": ADDENDS},
                ),
            ):
                if is_global(shape) and constants is not over:
                    continue  # knows no window
                what = f"attention gradient {name}, {title(shape)}: {t}"
                how = tile.warps, tile.stages
                out.append(CompileSpec(what, kernel, pointers | numbers, dict(constants), (*pointers,), *how))
    return out

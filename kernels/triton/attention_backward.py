"""Gradients of attention: dq, dk, dv, drel and drel_proj of whole sequences, without an atomic add.

With P = exp(score - lse), dP = dout . v and delta = sum of dout * out, dscore = P (dP - delta); score's factor tau and
scale pass it on to q . k, and tau alone to the bias. Who sums what, each in one order:

- dq: one program per query tile and key head, over splits from left to right;
- dk, dv: one program per split and key head, over query tiles from left to right;
- the bias: the first program also lays dscore * tau out *by distance*, [row, extent], every element from the one key at
  that distance. Then drel and drel_proj are plain products over distances and over rows. The layout is kept for
  PASS_TILES query tiles at a time; drel_proj is summed within a pass and a key head, then over these in order.

Sums are fp32, in bf16 as in `kernels.triton.attention`; every gradient is rounded once, to its input's type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import SPLIT_TOKENS, Segments
from kernels.triton.attention import (
    TILE,
    attend_whole,
    narrow,
    plain,
    product,
    relative_bias,
    sizes,
    tiles_of,
    wide_product,
)
from kernels.triton.launch import CompileSpec, run

PASS_TILES = 64  # keeps their slices aligned; at 32 rows, 8 key heads and an extent of 1024: 64 MiB by distance
DISTANCES = 64  # of one step, or one program
ADDENDS = 256  # elements of drel_proj per program of the last sum


@triton.jit
def queries_kernel(
    q, k, v, rel, rel_proj, tau, tiles, out, lse, dout, dq, delta, by_distance, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr,
    WINDOW: tl.constexpr, HAS_TAU: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, GROUP_PAD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """dq, delta and the bias's gradient by distance [tiles, KEY_HEADS, ROWS, EXTENT]. Grid (query tiles, key heads)."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    tile = tiles + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    shift, start, end, base = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH_PAD)
    j = tl.arange(0, SPLIT)
    position = base + r // GROUP_PAD
    valid = (r % GROUP_PAD < GROUP) & (position >= start) & (position < end)
    row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD
    inside = valid[:, None] & (d < WIDTH)[None, :]
    place = row[:, None] * WIDTH + d[None, :]
    queries = tl.load(q + place, mask=inside, other=0.0)
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
    for split in range(first_seen // SPLIT, last // SPLIT + 1):
        at = split * SPLIT + j
        source = ((at + shift).to(tl.int64) * KEY_HEADS + key_head)[:, None] * WIDTH + d[None, :]
        held = (at <= last)[:, None] & (d < WIDTH)[None, :]
        keys = tl.load(k + source, mask=held, other=0.0)
        values = tl.load(v + source, mask=held, other=0.0)
        distance = position[:, None] - at[None, :]
        visible = (distance >= 0) & (distance < WINDOW) & valid[:, None]
        bias = relative_bias(rel, row * CHANNELS, rel_proj, distance, valid, CHANNELS, EXTENT)
        score = factor[:, None] * (scale * product(queries, tl.trans(keys)) + bias)
        weight = tl.where(visible, tl.exp(score - log_sum[:, None]), 0.0)
        dscore = weight * (product(upstream, tl.trans(values)) - mean[:, None]) * factor[:, None]
        tl.store(by_distance + own[:, None] + distance, dscore, mask=visible & (distance < EXTENT))
        total += wide_product(dscore * scale, keys)
    tl.store(dq + place, narrow(total, dq.dtype.element_ty), mask=inside)


@triton.jit
def keys_kernel(
    q, k, v, rel, rel_proj, tau, splits, lse, dout, dk, dv, delta, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr,
    WINDOW: tl.constexpr, HAS_TAU: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, GROUP_PAD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """dk and dv of one split. Grid (splits, key heads); splits as `tiles_of`."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP_PAD
    tile = splits + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    shift, end, base = tl.load(tile + 1), tl.load(tile + 3), tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH_PAD)
    at = base + tl.arange(0, SPLIT)
    held = (at < end)[:, None] & (d < WIDTH)[None, :]
    place = ((at + shift).to(tl.int64) * KEY_HEADS + key_head)[:, None] * WIDTH + d[None, :]
    keys = tl.load(k + place, mask=held, other=0.0)
    values = tl.load(v + place, mask=held, other=0.0)
    dkeys = tl.zeros((SPLIT, WIDTH_PAD), tl.float32)
    dvalues = tl.zeros((SPLIT, WIDTH_PAD), tl.float32)
    last = tl.minimum(base + SPLIT - 1 + (WINDOW - 1), end - 1)
    for step in range(base // QUERIES, last // QUERIES + 1):
        position = step * QUERIES + r // GROUP_PAD
        valid = (r % GROUP_PAD < GROUP) & (position < end)
        row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD
        inside = valid[:, None] & (d < WIDTH)[None, :]
        queries = tl.load(q + row[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
        upstream = tl.load(dout + row[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
        log_sum = tl.load(lse + row, mask=valid, other=0.0)
        mean = tl.load(delta + row, mask=valid, other=0.0)
        factor = tl.full((ROWS,), 1.0, tl.float32)
        if HAS_TAU:
            factor = tl.load(tau + position + shift, mask=valid, other=1.0)
        distance = position[:, None] - at[None, :]
        visible = (distance >= 0) & (distance < WINDOW) & valid[:, None]
        bias = relative_bias(rel, row * CHANNELS, rel_proj, distance, valid, CHANNELS, EXTENT)
        score = factor[:, None] * (scale * product(queries, tl.trans(keys)) + bias)
        weight = tl.where(visible, tl.exp(score - log_sum[:, None]), 0.0)
        dscore = weight * (product(upstream, tl.trans(values)) - mean[:, None]) * factor[:, None]
        dvalues += wide_product(tl.trans(weight), upstream)
        dkeys += wide_product(tl.trans(dscore * scale), queries)
    tl.store(dk + place, narrow(dkeys, dk.dtype.element_ty), mask=held)
    tl.store(dv + place, narrow(dvalues, dv.dtype.element_ty), mask=held)


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
        theirs = tl.load(by_distance + own[:, None] + d[None, :], mask=(d < EXTENT)[None, :], other=0.0)
        inside = (d < EXTENT)[:, None] & (c < CHANNELS)[None, :]
        proj = tl.load(rel_proj + c[None, :] * EXTENT + d[:, None], mask=inside, other=0.0)
        total += wide_product(theirs, proj)
    inside = valid[:, None] & (c < CHANNELS)[None, :]
    tl.store(drel + row[:, None] * CHANNELS + c[None, :], narrow(total, drel.dtype.element_ty), mask=inside)


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
        mine = tl.load(rel + row[:, None] * CHANNELS + c[None, :], mask=inside, other=0.0)
        theirs = tl.load(by_distance + own[:, None] + d[None, :], mask=(d < EXTENT)[None, :], other=0.0)
        total += tl.trans(wide_product(tl.trans(theirs), mine))
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
    tl.store(drel_proj + e, narrow(total, drel_proj.dtype.element_ty), mask=e < ELEMENTS)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rel, rel_proj, segments, scale, reach, tau):  # type: ignore[no-untyped-def]
        q, k, v, rel, rel_proj = (plain(x) for x in (q, k, v, rel, rel_proj))
        out, lse = attend_whole(q, k, v, rel, rel_proj, segments, scale, reach, tau)
        ctx.save_for_backward(q, k, v, rel, rel_proj, tau, out, lse)
        ctx.segments, ctx.scale, ctx.reach = segments, scale, reach
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        gradients = backward(*ctx.saved_tensors, plain(dout), ctx.segments, ctx.scale, ctx.reach)
        return *gradients, None, None, None, None


def backward(
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
    reach: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, drel, drel_proj); all arguments with adjacent elements."""
    (rows, heads, width), key_heads = q.shape, k.shape[1]
    channels, extent = rel_proj.shape
    size = sizes(heads, key_heads, width)
    dq, dk, dv, drel = (torch.empty_like(x) for x in (q, k, v, rel))
    if rows == 0:
        return dq, dk, dv, drel, torch.zeros_like(rel_proj)
    own_slot = torch.arange(len(segments.start))
    tiles = tiles_of(segments, own_slot, size["ROWS"] // size["GROUP_PAD"]).to(q.device)
    splits = tiles_of(segments, own_slot, SPLIT_TOKENS).to(q.device)
    factor = lse if tau is None else plain(tau)
    delta = torch.empty_like(lse)
    passes = tiles.split(PASS_TILES)
    by_distance = lse.new_empty(min(len(tiles), PASS_TILES) * key_heads * size["ROWS"], extent)
    partial = lse.new_empty(len(passes), key_heads, channels, extent)
    heads_of = {"HEADS": heads, "KEY_HEADS": key_heads, "CHANNELS": channels, "EXTENT": extent}
    tile_of = {name: size[name] for name in ("ROWS", "GROUP_PAD")}
    shape = {**heads_of, **size, "WIDTH": width, "WINDOW": reach, "HAS_TAU": tau is not None}
    flat = {**heads_of, **tile_of, "CHANNELS_PAD": max(16, triton.next_power_of_2(channels)), "STEP": DISTANCES}
    for n, mine in enumerate(passes):
        by_distance.zero_()
        grid = len(mine), key_heads
        run(
            queries_kernel, grid, q.device, TILE,
            q, k, v, rel, rel_proj, factor, mine, out, lse, dout, dq, delta, by_distance, float(scale), **shape,
        )  # fmt: skip
        run(rel_kernel, grid, q.device, TILE, rel_proj, mine, by_distance, drel, **flat)
        steps = triton.cdiv(extent, DISTANCES), key_heads
        run(proj_kernel, steps, q.device, TILE, rel, mine, by_distance, partial, n, len(mine), **flat)
    run(
        keys_kernel, (len(splits), key_heads), q.device, TILE,
        q, k, v, rel, rel_proj, factor, splits, lse, dout, dk, dv, delta, float(scale), **shape,
    )  # fmt: skip
    drel_proj, elements = torch.empty_like(rel_proj), channels * extent
    blocks = (triton.cdiv(elements, ADDENDS),)
    addends = len(passes) * key_heads
    run(proj_sum_kernel, blocks, q.device, TILE, partial, drel_proj, addends, ELEMENTS=elements, BLOCK=ADDENDS)
    return dq, dk, dv, drel, drel_proj

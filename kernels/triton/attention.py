"""Attention over pages with the relative bias, a sliding window and fixed splits: the forward, and the call.

One program takes a *query tile* (all query heads of one key head at ROWS / GROUP_PAD neighbouring positions) over the
keys it sees, from left to right, KEYS at a time: aligned parts of a split, each with its own maximum, sum of exp and
weighted values, combined left to right. Why a row's bits are its own:

- tiles are left-aligned by absolute position, as splits and their parts are, so a query lies in the same row of the
  same tile however the sequence was cut into calls; a tile's size follows the type and the head counts alone;
- every part runs the same code over KEYS keys; one out of a row's sight leaves its sums untouched;
- a product's rows share nothing but the values, whose NaNs and infinities are taken out before the product and put
  back into the rows that see them: 0 * NaN would carry them into rows that do not.

bf16 products are exact in the fp32 sum; the softmax weights, fp32, enter as three bf16 parts that add up to them
exactly. Left out on purpose: one sequence's splits in several programs at once (flash decoding), whose merging kernel
would be another kernel for few rows than for many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.triton.launch import INTERPRET, SHORT, CompileSpec, Tile, check, run

TILES = {
    torch.float32: Tile(m=16, n=16, k=16, warps=4, stages=1),
    torch.bfloat16: Tile(m=32, n=32, k=64, warps=4, stages=1),
}
"""m: queries times heads of a query tile; n: keys taken at a time, a part of a split; k: of a head's width, terms of a
product taken at a time. fp32 runs on the plain FMA units, whose operands lie in registers: small tiles. Below 64 rows
Hopper's compiler never picks another instruction family."""
NO_WINDOW = 1 << 30  # farther than any position

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, to nearest even. The interpreter's own conversion truncates, hence the integers."""
    if dtype == tl.float32:
        result = x
    elif not _INTERPRET:
        result = x.to(dtype)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        result = (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return result


@triton.jit
def product(a, b):
    """a @ b in fp32, both of one type. The interpreter multiplies bf16 wrongly: widened there, which is exact."""
    if _INTERPRET:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, input_precision="ieee")
    return result


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
        total += product(left, right)
    return total


@triton.jit
def wide_product(a, b):
    """a @ b for an fp32 ``a`` at full precision, also where b is bf16: a = high + middle + low, 8 bits each."""
    if _INTERPRET or b.dtype == tl.float32:
        result = tl.dot(a, b.to(tl.float32), input_precision="ieee")
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
        mine = tl.load(rel + rel_rows + c, mask=valid, other=0.0).to(tl.float32)
        theirs = tl.load(rel_proj + c * EXTENT + distance, mask=near, other=0.0).to(tl.float32)
        bias += mine[:, None] * theirs
    return tl.where(near, bias, 0.0)  # a NaN of rel stays within the extent


@triton.jit(do_not_specialize=["table_width"])
def attention_kernel(
    q, rel, rel_proj, tau, key, value, table, tiles, out, lse, scale, table_width,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, EXTENT: tl.constexpr,
    WINDOW: tl.constexpr, HAS_TAU: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STEP: tl.constexpr, GROUP_PAD: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, key heads). tiles int32 [tiles, 5]: see `tiles_of`. lse fp32 [T, H]: ln of a row's sum."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    tile = tiles + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    slot, shift = tl.load(tile), tl.load(tile + 1)
    start, end, base = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH_PAD)
    position = base + r // GROUP_PAD
    valid = (r % GROUP_PAD < GROUP) & (position >= start) & (position < end)
    row = (position + shift).to(tl.int64) * HEADS + key_head * GROUP + r % GROUP_PAD  # of [T * H]
    inside = valid[:, None] & (d < WIDTH)[None, :]
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_TAU:
        factor = tl.load(tau + position + shift, mask=valid, other=1.0)

    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH_PAD), tl.float32)
    last = tl.minimum(base + ROWS // GROUP_PAD, end) - 1
    first_seen = tl.maximum(tl.maximum(base, start) - (WINDOW - 1), 0)
    for part in range(first_seen // KEYS, last // KEYS + 1):
        first = part * KEYS
        at = first + tl.arange(0, KEYS)
        page = tl.load(table + slot.to(tl.int64) * table_width + first // SPLIT).to(tl.int64) * KEY_HEADS + key_head
        j = at % SPLIT
        values = tl.load(
            value + (page * SPLIT + j[:, None]) * WIDTH + d[None, :],
            mask=(at <= last)[:, None] & (d < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        distance = position[:, None] - at[None, :]
        visible = (distance >= 0) & (distance < WINDOW)
        dot = width_product(q, row * WIDTH, valid, key, page * WIDTH * SPLIT + j, at <= last, SPLIT, WIDTH, STEP)
        bias = relative_bias(rel, row * CHANNELS, rel_proj, distance, valid, CHANNELS, EXTENT)
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
            met = product(sight, tl.where(finite, 0.0, code).to(tl.bfloat16)).to(tl.int32)
            up, down = (met & 127) > 0, ((met >> 7) & 127) > 0
            infinite = tl.where(up, float("inf"), float("-inf"))
            poison = tl.where((met >= 16384) | (up & down), float("nan"), infinite)
            poison = tl.where(met > 0, poison, 0.0)
        values = tl.where(finite, values, tl.zeros_like(values))
        part_out = wide_product(weight, values) + poison

        # A row that sees nothing of this part keeps its sums, and the sign of their zeros.
        seen = (first <= position) & (first + KEYS - 1 > position - WINDOW)
        higher = tl.maximum(greatest, part_max)
        shown = tl.where(higher == float("-inf"), 0.0, higher)
        old, new = tl.exp(greatest - shown), tl.exp(part_max - shown)
        total = tl.where(seen, total * old + tl.sum(weight, 1) * new, total)
        result = tl.where(seen[:, None], result * old[:, None] + part_out * new[:, None], result)
        greatest = higher
    tl.store(lse + row, greatest + tl.log(total), mask=valid)
    result = tl.div_rn(result, total[:, None])
    tl.store(out + row[:, None] * WIDTH + d[None, :], narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["table_width"])
def write_kernel(
    k, v, key, value, table, splits, table_width,
    KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Copies new rows into their pages. Grid (splits that new rows reach, key heads); splits as `tiles_of`."""
    tile = splits + tl.program_id(0) * 5
    key_head = tl.program_id(1)
    slot, shift = tl.load(tile), tl.load(tile + 1)
    start, end, base = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    j = tl.arange(0, SPLIT)
    d = tl.arange(0, WIDTH_PAD)
    position = base + j
    mine = ((position >= start) & (position < end))[:, None] & (d < WIDTH)[None, :]
    page = tl.load(table + slot.to(tl.int64) * table_width + base // SPLIT).to(tl.int64) * KEY_HEADS + key_head
    source = ((position + shift).to(tl.int64) * KEY_HEADS + key_head)[:, None] * WIDTH + d[None, :]
    tl.store(key + (page * WIDTH + d[None, :]) * SPLIT + j[:, None], tl.load(k + source, mask=mine), mask=mine)
    tl.store(value + (page * SPLIT + j[:, None]) * WIDTH + d[None, :], tl.load(v + source, mask=mine), mask=mine)


def sizes(dtype: torch.dtype, heads: int, key_heads: int, width: int) -> dict[str, int]:
    """Constexprs of a tile: functions of the type, the model's head counts and width alone."""
    tile, group = TILES[dtype], triton.next_power_of_2(heads // key_heads)
    width_pad = max(16, triton.next_power_of_2(width))  # 16 is the least that a product takes
    return {
        "ROWS": max(tile.m, group),
        "KEYS": tile.n,
        "STEP": min(tile.k, width_pad),
        "GROUP_PAD": group,
        "WIDTH_PAD": width_pad,
        "SPLIT": SPLIT_TOKENS,
    }


def tiles_of(segments: Segments, slot: Tensor, size: int) -> Tensor:
    """int32 [tiles, 5] on the CPU: the aligned ranges of ``size`` positions that the segments' rows reach.

    A row is (slot, shift, start, end, base): position p of the sequence is row p + shift of the call when start <= p <
    end, and the range is base … base + size - 1.

    >>> tiles_of(Segments.build([4], [30], [3]), torch.tensor([4]), 32).tolist()
    [[4, -30, 30, 33, 0], [4, -30, 30, 33, 32]]
    """
    start = segments.start.long().cpu()
    offset = segments.offset.long().cpu()
    end = start + offset.diff()
    first, last = start // size, (end - 1) // size
    count = last - first + 1
    which = torch.repeat_interleave(torch.arange(len(start)), count)
    place = torch.arange(len(which)) - (torch.cumsum(count, 0) - count)[which]
    columns = [slot.long().cpu()[which], (offset[:-1] - start)[which], start[which], end[which]]
    return torch.stack([*columns, (first[which] + place) * size], 1).int()


def plain(x: Tensor) -> Tensor:
    """x with adjacent elements from an address that 16 divides: one layout, so one compiled kernel for all calls."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    tau: Tensor | None,
    cache: PagedKV | None,
) -> Tensor:
    from kernels.triton.attention_backward import Attention  # it imports this module

    _check(q, k, v, rel, rel_proj, segments, window, tau)
    reach = NO_WINDOW if window is None else window
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, rel, rel_proj))
    if cache is not None:
        if wants_gradient:
            raise ValueError("attention: there is no gradient through a cache; use torch.no_grad(), or no cache")
        _check_cache(q, k, segments, reach, cache)
        return forward(q, k, v, rel, rel_proj, segments, segments.slot, scale, reach, tau, cache)[0]
    for n, start in enumerate(segments.start.tolist()):
        if start != 0:
            raise ValueError(f"attention: segment {n} starts at position {start}, which needs a cache; none given")
    if wants_gradient:
        result: Tensor = Attention.apply(q, k, v, rel, rel_proj, segments, scale, reach, tau)
        return result
    return attend_whole(q, k, v, rel, rel_proj, segments, scale, reach, tau)[0]


def attend_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    scale: float,
    reach: int,
    tau: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Whole sequences through temporary pages, of which only what is written is read: (out, lse)."""
    needed = -(-segments.offset.long().cpu().diff() // SPLIT_TOKENS)
    width = int(needed.max()) if len(needed) else 0
    table = (torch.cumsum(needed, 0) - needed)[:, None] + torch.arange(width)
    pages, (_, key_heads, head) = int(needed.sum()), k.shape
    cache = PagedKV(
        k.new_empty(pages, key_heads, head, SPLIT_TOKENS),
        v.new_empty(pages, key_heads, SPLIT_TOKENS, head),
        table.int().to(q.device),
    )
    own_slot = torch.arange(len(needed))
    return forward(q, k, v, rel, rel_proj, segments, own_slot, scale, reach, tau, cache)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    slot: Tensor,
    scale: float,
    reach: int,
    tau: Tensor | None,
    cache: PagedKV,
) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values into the pages, then attends: (out [T, H, D], lse fp32 [T, H])."""
    rows, heads, width = q.shape
    key_heads, size = k.shape[1], sizes(q.dtype, heads, k.shape[1], width)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(rows, heads, dtype=torch.float32)
    if rows == 0:
        return out, lse
    splits = tiles_of(segments, slot, SPLIT_TOKENS).to(q.device)
    run(
        write_kernel, (len(splits), key_heads), q.device, TILES[q.dtype],
        plain(k), plain(v), cache.key, cache.value, cache.table, splits, cache.table.shape[1],
        KEY_HEADS=key_heads, WIDTH=width, SPLIT=SPLIT_TOKENS, WIDTH_PAD=size["WIDTH_PAD"],
    )  # fmt: skip
    tiles = tiles_of(segments, slot, size["ROWS"] // size["GROUP_PAD"]).to(q.device)
    run(
        attention_kernel, (len(tiles), key_heads), q.device, TILES[q.dtype],
        plain(q), plain(rel), plain(rel_proj), lse if tau is None else plain(tau), cache.key, cache.value, cache.table,
        tiles, out, lse, float(scale), cache.table.shape[1],
        HAS_TAU=tau is not None, **shape_constants(q.dtype, (heads, key_heads, width, *rel_proj.shape, reach)),
    )  # fmt: skip
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    rel_proj: Tensor,
    segments: Segments,
    window: int | None,
    tau: Tensor | None,
) -> None:
    rows = segments.position.shape[0]
    for name, x in (("q", q), ("k", k), ("v", v), ("rel", rel)):
        if x.dim() != 3 or x.shape[0] != rows:
            raise ValueError(f"attention: {name} is {tuple(x.shape)}; need [{rows}, heads, width], a row a token")
        check("attention", name, x)
        if x.dtype != q.dtype:
            raise ValueError(f"attention: {name} is {x.dtype}; q is {q.dtype}; need one type")
    heads, key_heads, width = q.shape[1], k.shape[1], q.shape[2]
    if k.shape != v.shape or k.shape[2] != width or key_heads == 0 or heads % key_heads != 0:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if rel.shape[1] != heads or rel_proj.dim() != 2 or rel_proj.shape[0] != rel.shape[2]:
        raise ValueError(f"attention: rel {tuple(rel.shape)} and rel_proj {tuple(rel_proj.shape)} do not fit together")
    check("attention", "rel_proj", rel_proj)
    if rel_proj.shape[1] == 0:
        raise ValueError(f"attention: rel_proj is {tuple(rel_proj.shape)}; need [C, extent] with an extent >= 1")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; need >= 1, or None")
    if tau is not None:
        check("attention", "tau", tau, (torch.float32,))
        if tau.shape != (rows,):
            raise ValueError(f"attention: tau is {tuple(tau.shape)}; need [{rows}], a factor a token")


def _check_cache(q: Tensor, k: Tensor, segments: Segments, reach: int, cache: PagedKV) -> None:
    """Raises before anything is written. Reads the page table, which waits for the device once a call."""
    key, value, table = cache.key, cache.value, cache.table
    pages, (_, heads, width) = key.shape[0], k.shape
    if key.shape != (pages, heads, width, SPLIT_TOKENS) or value.shape != (pages, heads, SPLIT_TOKENS, width):
        raise ValueError(
            f"attention: cache.key is {tuple(key.shape)}, cache.value {tuple(value.shape)}; need "
            f"[pages, {heads}, {width}, {SPLIT_TOKENS}] and [pages, {heads}, {SPLIT_TOKENS}, {width}]"
        )
    if key.dtype != q.dtype or value.dtype != q.dtype or not key.is_contiguous() or not value.is_contiguous():
        raise ValueError(
            f"attention: cache holds {key.dtype} and {value.dtype}, q is {q.dtype}; need contiguous, equal"
        )
    if table.dim() != 2 or table.dtype != torch.int32 or not table.is_contiguous():
        raise ValueError(
            f"attention: cache.table is {table.dtype} {tuple(table.shape)}; need contiguous int32 [slots, pages]"
        )
    for name, x in (("cache.key", key), ("cache.value", value), ("cache.table", table)):
        check("attention", name, x, (torch.float32, torch.bfloat16, torch.int32))
    start, slot = segments.start.long().cpu(), segments.slot.long().cpu()
    first = (start - (reach - 1)).clamp_min(0) // SPLIT_TOKENS
    count = (start + segments.offset.long().cpu().diff() - 1) // SPLIT_TOKENS - first + 1
    which = torch.repeat_interleave(torch.arange(len(start)), count)
    split = first[which] + torch.arange(len(which)) - (torch.cumsum(count, 0) - count)[which]
    held = (slot[which] >= 0) & (slot[which] < table.shape[0]) & (split < table.shape[1])
    page = table[torch.where(held, slot[which], 0).to(table.device), torch.where(held, split, 0).to(table.device)].cpu()
    bad = (~held | (page < 0) | (page >= pages)).nonzero()
    if len(bad):
        at = int(bad[0])
        segment, position = int(which[at]), int(split[at]) * SPLIT_TOKENS
        raise ValueError(
            f"attention: slot {int(slot[segment])} (segment {segment}) sees positions {position} to "
            f"{position + SPLIT_TOKENS - 1}, but cache.table [{table.shape[0]} slots, {table.shape[1]} pages] names "
            f"no page among 0..{pages - 1} for them; reserve pages before the call. Nothing was written"
        )


Shape = tuple[int, ...]  # heads, key heads, width, channels, extent, window

SPEC_SHAPES: tuple[Shape, ...] = (
    (32, 8, 128, 16, 1024, 512),
    (32, 8, 128, 16, 1024, NO_WINDOW),
    (4, 2, 32, 16, 1024, 512),
)
"""What to compile ahead of time: sliding and global layers, and a small model's."""


def shape_constants(dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Constexprs of a kernel over query tiles, but for HAS_TAU."""
    heads, key_heads, width, channels, extent, window = shape
    of_model = {"HEADS": heads, "KEY_HEADS": key_heads, "WIDTH": width, "CHANNELS": channels, "EXTENT": extent}
    return {**of_model, "WINDOW": window, **sizes(dtype, heads, key_heads, width)}


def specs() -> list[CompileSpec]:
    from kernels.triton import attention_backward  # it imports this module

    out = []
    for dtype, t in SHORT.items():
        pointers = dict.fromkeys(("q", "rel", "rel_proj", "key", "value", "out"), f"*{t}")
        pointers |= {"tau": "*fp32", "table": "*i32", "tiles": "*i32", "lse": "*fp32"}
        new = dict.fromkeys(("k", "v", "key", "value"), f"*{t}") | {"table": "*i32", "splits": "*i32"}
        for shape in SPEC_SHAPES:
            heads, key_heads, width, _, _, window = shape
            where = f"{heads}/{key_heads} heads of {width}, {'global' if window == NO_WINDOW else f'window {window}'}"
            constants = shape_constants(dtype, shape)
            attend = constants | {"HAS_TAU": window == NO_WINDOW}
            signature = pointers | {"scale": "fp32", "table_width": "i32"}
            how = TILES[dtype].warps, TILES[dtype].stages
            out.append(CompileSpec(f"attention, {where}: {t}", attention_kernel, signature, attend, (*pointers,), *how))
            if window == NO_WINDOW:
                continue  # pages know no window
            write = {name: constants[name] for name in ("KEY_HEADS", "WIDTH", "SPLIT", "WIDTH_PAD")}
            signature = new | {"table_width": "i32"}
            title = f"attention pages, {key_heads} heads of {width}: {t}"
            out.append(CompileSpec(title, write_kernel, signature, write, (*new,), *how))
    return [*out, *attention_backward.specs()]

"""The short causal convolution in Triton, with the state it keeps for each slot: one chain over taps and residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.sequences import check_short_conv, no_gradient_with_state, no_such_state
from kernels.layout import CONV_TAPS, Segments
from kernels.triton.launch import SHORT, CompileSpec, aligned, check_place, map_grid, row_stride, run
from kernels.triton.tables import Host, tables_of
from kernels.triton.tiles import MAP_TILE, ROWS_TILE


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["weight"])
def conv_kernel(
    x, weight, state, segment, slot, start, offset, addend, y, rows, width, x_row, addend_row,
    STATE: tl.constexpr, ADD: tl.constexpr, TAPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Row r of segment s is row j = r - offset[s] of the segment. Tap i reads the segment's row j - TAPS + 1 + i: from
    x, or when that is negative from the state, or 0 when the sequence begins with this call."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    live = row < rows
    s = tl.load(segment + row, live, other=0)
    j = row - tl.load(offset + s)
    held = tl.load(slot + s).to(tl.int64) * (TAPS - 1)
    begun = tl.load(start + s) > 0
    inside = live[:, None] & (column < width)
    x += row.to(tl.int64)[:, None] * x_row + column
    state += (held + j)[:, None] * width + column
    total = tl.zeros((M, N), tl.float32)
    for i in tl.static_range(TAPS):
        back = TAPS - 1 - i
        v = tl.load(x - back * x_row, inside & (j >= back)[:, None], other=0.0).to(tl.float32)
        if STATE:
            before = inside & ((j < back) & begun)[:, None]
            v = tl.where(before, tl.load(state + i * width, before, other=0.0).to(tl.float32), v)
        total += tl.load(weight + column * TAPS + i, column < width, other=0.0) * v
    v = tl.load(x, inside, other=0.0).to(tl.float32)
    out = (v + total).to(y.dtype.element_ty)
    if ADD:  # as torch adds: both of y's type, in fp32, rounded once
        other = tl.load(addend + row.to(tl.int64)[:, None] * addend_row + column, inside, other=0.0)
        out = (other.to(tl.float32) + out.to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + row.to(tl.int64)[:, None] * width + column, out, inside)


@triton.jit
def state_kernel(x, state, slot, start, offset, width, x_row, TAPS: tl.constexpr, N: tl.constexpr):
    """Stores the last TAPS - 1 inputs of every segment's sequence, from x or moved up within the state. Runs after the
    convolution. A program has columns of a slot for itself and reads each element before it overwrites it, because rows
    are written in ascending order and each is read from a row of higher index."""
    s = tl.program_id(0)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column < width
    first, end = tl.load(offset + s), tl.load(offset + s + 1)
    held = state + tl.load(slot + s).to(tl.int64) * (TAPS - 1) * width + column
    begun = tl.load(start + s)
    for i in tl.static_range(TAPS - 1):
        j = end - first - (TAPS - 1) + i + tl.zeros((N,), tl.int32)  # row of the segment; below 0 it was held before
        new, kept = inside & (j >= 0), inside & (j < 0) & (begun + tl.zeros((N,), tl.int32) > 0)
        v = tl.load(x + (first + j).to(tl.int64) * x_row + column, new, other=0.0)
        old = tl.load(held + (j + TAPS - 1) * width, kept, other=0.0)
        tl.store(held + i * width, tl.where(j >= 0, v, old), inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["weight"])
def conv_backward_kernel(
    grad, weight, segment, offset, dx, rows, width, g_row, TAPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """dx[r] = grad[r] + sum_i weight[i] grad[r + TAPS - 1 - i], over rows of the same segment."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    live = row < rows
    end = tl.load(offset + tl.load(segment + row, live, other=0) + 1)
    inside = live[:, None] & (column < width)
    grad += row.to(tl.int64)[:, None] * g_row + column
    total = tl.load(grad, inside, other=0.0).to(tl.float32)
    for i in tl.static_range(TAPS):
        ahead = TAPS - 1 - i
        g = tl.load(grad + ahead * g_row, inside & (row + ahead < end)[:, None], other=0.0).to(tl.float32)
        total += tl.load(weight + column * TAPS + i, column < width, other=0.0) * g
    tl.store(dx + row.to(tl.int64)[:, None] * width + column, total.to(dx.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def conv_weight_gradient_kernel(
    x, grad, segment, offset, dweight, rows, width, x_row, g_row,
    TAPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dweight[c, i] = sum over rows r of grad[r, c] x[r - TAPS + 1 + i, c]; a program for a tap and N channels."""
    back = TAPS - 1 - tl.program_id(1)
    column = tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, rows, M):
        row = first + tl.arange(0, M)
        live = row < rows
        j = row - tl.load(offset + tl.load(segment + row, live, other=0))
        inside = (live & (j >= back))[:, None] & (column < width)[None, :]
        v = tl.load(x + (row - back).to(tl.int64)[:, None] * x_row + column[None, :], inside, other=0.0)
        g = tl.load(grad + row.to(tl.int64)[:, None] * g_row + column[None, :], inside, other=0.0)
        total += v.to(tl.float32) * g.to(tl.float32)
    tl.store(dweight + column * TAPS + tl.program_id(1), tl.sum(total, axis=0), column < width)


def short_conv(
    x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None = None
) -> Tensor:
    needs = x.requires_grad or weight.requires_grad or (addend is not None and addend.requires_grad)
    if needs and torch.is_grad_enabled():
        if state is not None:
            raise no_gradient_with_state()
        out: Tensor = _ShortConv.apply(x, weight, segments, addend)
        return out
    return _forward(x, weight, segments, state, addend)


def _forward(x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None) -> Tensor:
    check_short_conv(x, weight, segments, state, addend)
    check_place("short_conv", x=x, weight=weight, state=state, addend=addend)
    at = tables_of(segments, x.device)
    _check_segments(at.host, segments, state)
    rows, width = x.shape
    x, y = aligned(x), x.new_empty(rows, width)
    held = y if state is None else state  # the pointer is not read without state, nor the next without addend
    other = y if addend is None else aligned(addend)
    run(
        conv_kernel, map_grid(rows, width), x.device, MAP_TILE,
        x, weight, held, at.segment, at.slot, at.start, at.offset, other, y, rows, width, row_stride(x),
        row_stride(other) if addend is not None else 0,
        STATE=state is not None, ADD=addend is not None, TAPS=CONV_TAPS, M=MAP_TILE.m, N=MAP_TILE.n,
    )  # fmt: skip
    if state is not None:
        run(
            state_kernel, (at.slot.shape[0], triton.cdiv(width, MAP_TILE.n)), x.device, MAP_TILE,
            x, state, at.slot, at.start, at.offset, width, row_stride(x), TAPS=CONV_TAPS, N=MAP_TILE.n,
        )  # fmt: skip
    return y


def _check_segments(host: Host, segments: Segments, state: Tensor | None) -> None:
    """Raises ValueError for a segment without its state."""
    bad = host.start > 0 if state is None else (host.slot < 0) | (host.slot >= state.shape[0])
    if bad.any():
        raise no_such_state(segments, int(bad.argmax()), state)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, segments, addend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.segments = segments
        return _forward(x, weight, segments, None, addend)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        at, addend_grad, grad = tables_of(ctx.segments, x.device), grad, aligned(grad)
        segment, (rows, width) = at.segment, x.shape
        dx, dweight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)
        run(
            conv_backward_kernel, map_grid(rows, width), x.device, MAP_TILE,
            grad, weight, segment, at.offset, dx, rows, width, row_stride(grad),
            TAPS=CONV_TAPS, M=MAP_TILE.m, N=MAP_TILE.n,
        )  # fmt: skip
        x = aligned(x)
        run(
            conv_weight_gradient_kernel, (triton.cdiv(width, ROWS_TILE.n), CONV_TAPS), x.device, ROWS_TILE,
            x, grad, segment, at.offset, dweight, rows, width, row_stride(x), row_stride(grad),
            TAPS=CONV_TAPS, M=ROWS_TILE.m, N=ROWS_TILE.n,
        )  # fmt: skip
        return dx, dweight, None, addend_grad if ctx.needs_input_grad[3] else None


def specs() -> list[CompileSpec]:
    out = []
    for t in SHORT.values():
        p = f"*{t}"
        rows, tables = {"rows": "i32", "width": "i32"}, dict.fromkeys(("segment", "slot", "start", "offset"), "*i32")
        own = {"segment": "*i32", "offset": "*i32"}
        sizes: dict[str, int | bool] = {"TAPS": CONV_TAPS, "M": MAP_TILE.m, "N": MAP_TILE.n}
        forward = {"x": p, "weight": "*fp32", "state": p} | tables | {"addend": p, "y": p} | rows
        forward |= {"x_row": "i32", "addend_row": "i32"}
        kernels = [
            (
                f"short_conv, state {held}, addend {add}",
                conv_kernel,
                forward,
                sizes | {"STATE": held, "ADD": add},
                MAP_TILE,
            )
            for held in (False, True)
            for add in (False, True)
        ]
        kernels += [
            (
                "short_conv state",
                state_kernel,
                {"x": p, "state": p, "slot": "*i32", "start": "*i32", "offset": "*i32", "width": "i32", "x_row": "i32"},
                {"TAPS": CONV_TAPS, "N": MAP_TILE.n},
                MAP_TILE,
            ),
            (
                "short_conv input gradient",
                conv_backward_kernel,
                {"grad": p, "weight": "*fp32"} | own | {"dx": p} | rows | {"g_row": "i32"},
                sizes,
                MAP_TILE,
            ),
            (
                "short_conv weight gradient",
                conv_weight_gradient_kernel,
                {"x": p, "grad": p} | own | {"dweight": "*fp32"} | rows | {"x_row": "i32", "g_row": "i32"},
                {"TAPS": CONV_TAPS, "M": ROWS_TILE.m, "N": ROWS_TILE.n},
                ROWS_TILE,
            ),
        ]
        for name, kernel, signature, constants, tile in kernels:
            even = tuple(a for a in signature if a not in ("rows", "weight"))
            spec = CompileSpec(f"{name}: {t}", kernel, signature, constants, even, tile.warps, tile.stages)
            out.append(spec)
    return out

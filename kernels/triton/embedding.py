"""The summed dMel embedding in Triton, channels in ascending order; its gradient is a product with a one-hot matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.rows import check_embedding_sum, no_such_code
from kernels.triton.deferred import settle, word_on
from kernels.triton.launch import SHORT, CompileSpec, aligned, check_place, plain, row_stride, run
from kernels.triton.tiles import BINS_TILE, MAP_TILE, PRECISION


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["table"])
def embedding_kernel(codes, table, out, noticed, rows, channels, bins, width, M: tl.constexpr, N: tl.constexpr):
    """A code outside 0 … bins - 1 counts as 0, and ``noticed`` is set (`kernels.triton.deferred`)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    live = row < rows
    inside = live[:, None] & (column < width)
    codes += row.to(tl.int64) * channels
    table += column
    total = tl.zeros((M, N), tl.float32)
    outside = tl.zeros((M,), tl.int32)
    for c in range(channels):
        code = tl.load(codes + c, live, other=0).to(tl.int64)
        known = (code >= 0) & (code < bins)
        outside = tl.where(known, outside, 1)
        entry = tl.where(known, code, 0) + c * bins
        total += tl.load(table + (entry * width)[:, None], inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * width + column, total.to(out.dtype.element_ty), inside)
    tl.store(noticed, 1, tl.max(outside, 0) != 0)


@triton.jit(do_not_specialize=["rows"])
def embedding_backward_kernel(
    codes, grad, dtable, rows, channels, bins, width, g_row, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """dtable[c * bins + b] = sum over rows t with codes[t, c] = b of grad[t], ascending t: 0/1 matrix times grad."""
    tiles = tl.cdiv(bins, M)
    c = tl.program_id(0) // tiles
    b = tl.program_id(0) % tiles * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, rows, K):
        row = first + tl.arange(0, K)
        code = tl.load(codes + row.to(tl.int64) * channels + c, row < rows, other=0).to(tl.int32)
        g = tl.load(
            grad + row.to(tl.int64)[:, None] * g_row + column[None, :],
            (row < rows)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        hit = (b[:, None] == code[None, :]).to(tl.float32)
        total = tl.dot(hit, g.to(tl.float32), total, input_precision=PRECISION)
    out = dtable + (c * bins + b).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, total.to(dtable.dtype.element_ty), (b < bins)[:, None] & (column < width)[None, :])


def embedding_sum(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    if torch.is_grad_enabled() and table.requires_grad:
        out: Tensor = _EmbeddingSum.apply(codes, table, bins)
        return out
    return _forward(codes, table, bins)


def _forward(codes: Tensor, table: Tensor, bins: int) -> Tensor:
    check_embedding_sum(codes, table, bins)
    check_place("embedding_sum", codes=codes, table=table)
    codes = plain(codes)
    (rows, channels), width = codes.shape, table.shape[1]
    out, noticed = table.new_empty(rows, width), word_on(codes.device)
    run(
        embedding_kernel, (triton.cdiv(rows, MAP_TILE.m), triton.cdiv(width, MAP_TILE.n)), out.device, MAP_TILE,
        codes, table, out, noticed, rows, channels, bins, width, M=MAP_TILE.m, N=MAP_TILE.n,
    )  # fmt: skip
    settle(noticed, lambda: _explain(codes, bins))
    return out


def _explain(codes: Tensor, bins: int) -> None:
    outside = (codes < 0) | (codes >= bins)
    if bool(outside.any()):
        raise no_such_code(codes, int(outside.int().argmax()), bins)


class _EmbeddingSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, table, bins):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, table)
        ctx.bins = bins
        return _forward(codes, table, bins)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        codes, table = ctx.saved_tensors
        codes, grad, bins, tile = plain(codes), aligned(grad), ctx.bins, BINS_TILE
        out, (rows, channels), width = torch.empty_like(table), codes.shape, table.shape[1]
        grid = (channels * triton.cdiv(bins, tile.m), triton.cdiv(width, tile.n))
        sizes = (rows, channels, bins, width, row_stride(grad))
        run(embedding_backward_kernel, grid, out.device, tile, codes, grad, out, *sizes, M=tile.m, N=tile.n, K=tile.k)
        return None, out, None


def specs() -> list[CompileSpec]:
    out = []
    sizes = dict.fromkeys(("rows", "channels", "bins", "width"), "i32")
    for t in SHORT.values():
        for code in ("u8", "i64"):
            p, pointer = f"*{t}", f"*{code}"
            forward = {"codes": pointer, "table": p, "out": p, "noticed": "*i32"} | sizes
            backward = {"codes": pointer, "grad": p, "dtable": p} | sizes | {"g_row": "i32"}
            one, other = MAP_TILE, BINS_TILE
            for name, kernel, signature, constants, tile in (
                ("embedding_sum", embedding_kernel, forward, {"M": one.m, "N": one.n}, one),
                (
                    "embedding_sum gradient",
                    embedding_backward_kernel,
                    backward,
                    {"M": other.m, "N": other.n, "K": other.k},
                    other,
                ),
            ):
                even = tuple(a for a in signature if a not in ("rows", "table"))
                name = f"{name}, {code} codes: {t}"
                out.append(CompileSpec(name, kernel, signature, constants, even, tile.warps, tile.stages))
    return out

"""RMS norm in Triton: each of n lanes sums columns n apart, one tree joins them; n depends on the width alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.rows import check_rms_norm
from kernels.triton.launch import SHORT, CompileSpec, aligned, check_place, row_stride, run
from kernels.triton.tiles import ROWS_TILE, norm_tile


@triton.jit(do_not_specialize=["rows", "heads"], do_not_specialize_on_alignment=["weight"])
def norm_kernel(x, weight, y, rows, heads, width, x_row, x_head, eps, M: tl.constexpr, N: tl.constexpr):
    """y = weight * round(x / sqrt(mean(x^2) + eps)); row r of y is x[r // heads, r % heads]."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = (row < rows)[:, None]
    x_rows = x + ((row // heads).to(tl.int64) * x_row + (row % heads).to(tl.int64) * x_head)[:, None]
    y_rows = y + (row.to(tl.int64) * width)[:, None]
    squares = tl.zeros((M, N), tl.float32)
    for first in range(0, width, N):
        column = first + tl.arange(0, N)[None, :]
        v = tl.load(x_rows + column, live & (column < width), other=0.0).to(tl.float32)
        squares += v * v
    mean = tl.div_rn(tl.sum(squares, axis=1), tl.zeros((M,), tl.float32) + width)
    root = tl.sqrt_rn(mean + eps)[:, None] + tl.zeros((M, N), tl.float32)
    for first in range(0, width, N):
        column = first + tl.arange(0, N)[None, :]
        inside = live & (column < width)
        v = tl.load(x_rows + column, inside, other=0.0).to(tl.float32)
        normed = tl.div_rn(v, root).to(y.dtype.element_ty).to(tl.float32)
        w = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
        tl.store(y_rows + column, (w * normed).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "heads"], do_not_specialize_on_alignment=["weight"])
def norm_backward_kernel(
    x, weight, grad, dx, inverse, rows, heads, width, x_row, x_head, g_row, g_head, eps,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """With i = 1 / rms, n = x i and g = grad * weight: dx = i (g - n mean(g n)). Stores i, for the weight's
    gradient."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = (row < rows)[:, None]
    outer, inner = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    x_rows, g_rows = x + (outer * x_row + inner * x_head)[:, None], grad + (outer * g_row + inner * g_head)[:, None]
    dx_rows = dx + (row.to(tl.int64) * width)[:, None]
    squares, products = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for first in range(0, width, N):
        column = first + tl.arange(0, N)[None, :]
        v = tl.load(x_rows + column, live & (column < width), other=0.0).to(tl.float32)
        g = tl.load(g_rows + column, live & (column < width), other=0.0).to(tl.float32)
        squares += v * v
        products += g * tl.load(weight + column, column < width, other=0.0).to(tl.float32) * v
    count = tl.zeros((M,), tl.float32) + width
    root = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=1), count) + eps)
    i = tl.div_rn(tl.full((M,), 1.0, tl.float32), root)
    mean = (tl.div_rn(tl.sum(products, axis=1), count) * i)[:, None]
    tl.store(inverse + row, i, row < rows)
    for first in range(0, width, N):
        column = first + tl.arange(0, N)[None, :]
        inside = live & (column < width)
        v = tl.load(x_rows + column, inside, other=0.0).to(tl.float32)
        w = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
        g = tl.load(g_rows + column, inside, other=0.0).to(tl.float32) * w
        tl.store(dx_rows + column, (i[:, None] * (g - v * i[:, None] * mean)).to(dx.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "heads"])
def norm_weight_gradient_kernel(
    x, grad, inverse, dweight, rows, heads, width, x_row, x_head, g_row, g_head, M: tl.constexpr, N: tl.constexpr
):
    """dweight = sum over rows of grad * round(x / rms), M rows at a time; N columns a program."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, rows, M):
        row = first + tl.arange(0, M)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        outer, inner = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
        v = tl.load(x + (outer * x_row + inner * x_head)[:, None] + column[None, :], inside, other=0.0)
        g = tl.load(grad + (outer * g_row + inner * g_head)[:, None] + column[None, :], inside, other=0.0)
        i = tl.load(inverse + row, row < rows, other=0.0)
        normed = (v.to(tl.float32) * i[:, None]).to(x.dtype.element_ty)
        total += g.to(tl.float32) * normed.to(tl.float32)
    tl.store(dweight + column, tl.sum(total, axis=0).to(dweight.dtype.element_ty), column < width)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RmsNorm.apply(x, weight, eps)
        return out
    return _forward(x, weight, eps)


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_rms_norm(x, weight)
    check_place("rms_norm", x=x, weight=weight)
    out, width = x.new_empty(x.shape), weight.shape[0]
    x, heads, strides = _rows(x)
    rows, tile = out.numel() // width, norm_tile(width)
    run(
        norm_kernel, (triton.cdiv(rows, tile.m),), out.device, tile, x, weight, out, rows, heads, width, *strides, eps,
        M=tile.m, N=tile.n,
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """(x after `aligned`, its number of heads or 1, strides of its rows and of its heads)."""
    x = aligned(x)
    return (x, 1, (row_stride(x), 0)) if x.dim() == 2 else (x, x.shape[1], (row_stride(x), row_stride(x, 1)))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx, dweight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)
        width = weight.shape[0]
        rows, tile = dx.numel() // width, norm_tile(width)
        inverse = x.new_empty(rows, dtype=torch.float32)
        (x, heads, strides), (grad, _, g_strides) = _rows(x), _rows(grad)
        run(
            norm_backward_kernel, (triton.cdiv(rows, tile.m),), x.device, tile, x, weight, grad, dx, inverse,
            rows, heads, width, *strides, *g_strides, ctx.eps, M=tile.m, N=tile.n,
        )  # fmt: skip
        if ctx.needs_input_grad[1]:
            run(
                norm_weight_gradient_kernel, (triton.cdiv(width, ROWS_TILE.n),), x.device, ROWS_TILE, x, grad,
                inverse, dweight, rows, heads, width, *strides, *g_strides, M=ROWS_TILE.m, N=ROWS_TILE.n,
            )  # fmt: skip
        return dx, dweight, None


def specs() -> list[CompileSpec]:
    out = []
    for t in SHORT.values():
        p = f"*{t}"
        strides, more = {"x_row": "i32", "x_head": "i32"}, {"g_row": "i32", "g_head": "i32"}
        rows = {"rows": "i32", "heads": "i32", "width": "i32"}
        for width in (128, 4096):
            tile = norm_tile(width)
            for name, kernel, signature in (
                ("", norm_kernel, {"x": p, "weight": p, "y": p} | rows | strides),
                (
                    " gradient",
                    norm_backward_kernel,
                    {"x": p, "weight": p, "grad": p, "dx": p, "inverse": "*fp32"} | rows | strides | more,
                ),
            ):
                even = tuple(a for a in signature if a not in ("rows", "heads", "weight"))
                out.append(
                    CompileSpec(
                        f"rms_norm{name}, width {width}: {t}",
                        kernel,
                        signature | {"eps": "fp32"},
                        {"M": tile.m, "N": tile.n},
                        even,
                        tile.warps,
                        tile.stages,
                    )
                )
        signature = {"x": p, "grad": p, "inverse": "*fp32", "dweight": p} | rows | strides | more
        even = tuple(a for a in signature if a not in ("rows", "heads"))
        sizes: dict[str, int | bool] = {"M": ROWS_TILE.m, "N": ROWS_TILE.n}
        name, kernel = f"rms_norm weight gradient: {t}", norm_weight_gradient_kernel
        out.append(CompileSpec(name, kernel, signature, sizes, even, ROWS_TILE.warps, ROWS_TILE.stages))
    return out

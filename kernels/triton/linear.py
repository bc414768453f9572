"""Linear layers in Triton: packing, forward and gradients. One function computes all three products.

Packed weights are a copy of the stacked weights, [N, K] with K padded by zeros to a multiple of 16. One program
computes an output element, reducing K in tiles of constant size, ascending, by the matrix unit (bf16) or the FMA units
(fp32).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.weights import check_out_dtype, check_rows, packed_buffer
from kernels.layout import PackedExperts, PackedLinear
from kernels.rows import active, over_all_rows
from kernels.triton.launch import ALIGN, CompileSpec, aligned, check_place, row_stride, run
from kernels.triton.tiles import PRECISION, product_tile


@triton.jit
def chain(
    a_rows,
    b_columns,
    a_inside,
    b_inside,
    depth,
    a_red,
    b_red,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """sum over r < depth of a[m, r] * b[r, n] for one tile, K terms at a time in ascending r.

    ``a_rows`` [M] and ``b_columns`` [N] point at r = 0. Masked rows, columns and terms count as 0. WIDEN converts both
    to fp32 first, for operands of different types."""
    r = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, depth, K):
        term = (first + r).to(tl.int64)
        inside = first + r < depth
        a = tl.load(a_rows[:, None] + term[None, :] * a_red, a_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_columns[None, :] + term[:, None] * b_red, inside[:, None] & b_inside[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    a,
    b,
    c,
    rows,
    columns,
    depth,
    a_row,
    a_red,
    b_red,
    b_col,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """c [rows, columns] = a @ b over a width, a and b given by their strides: rows, columns and the reduced axis."""
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    a_rows = a + row.to(tl.int64) * a_row
    b_columns = b + column.to(tl.int64) * b_col
    total = chain(a_rows, b_columns, row < rows, column < columns, depth, a_red, b_red, M, N, K, WIDEN)
    out = c + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, total.to(c.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


weight_gradient_kernel = triton.jit(product_kernel.fn, do_not_specialize=["rows", "depth"])
"""The same over the rows of a batch, whose number must not choose another compiled kernel: of a width the compiler may
know that 16 divides it."""


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    depth: int,
    a_strides: tuple[int, int],
    b_strides: tuple[int, int],
    kernel: Any = product_kernel,
) -> None:
    """c = a @ b over ``depth`` terms; ``a_strides`` are those of (row, term), ``b_strides`` of (term, column)."""
    rows, columns = c.shape
    widen = a.dtype != b.dtype
    tile = product_tile(torch.float32 if a.dtype != b.dtype else a.dtype)
    grid = (triton.cdiv(columns, tile.n), triton.cdiv(rows, tile.m))
    sizes = (rows, columns, depth, *a_strides, *b_strides)
    run(kernel, grid, c.device, tile, a, b, c, *sizes, M=tile.m, N=tile.n, K=tile.k, WIDEN=widen)


def pack_linear(parts: tuple[Tensor, ...]) -> PackedLinear:
    packed = PackedLinear.build(parts)
    check_place("pack_linear", parts=parts[0])
    packed.data["rows"] = parts[0].new_zeros(packed.rows, padded(packed.cols))
    fill_linear(packed)
    return packed


def padded(cols: int) -> int:
    """K rounded up to a multiple of ALIGN."""
    return triton.cdiv(cols, ALIGN) * ALIGN


def fill_linear(packed: PackedLinear) -> None:
    """Copies the current values of the parts into the packed copy."""
    weight = weight_of(packed, "repack")
    with torch.no_grad():
        for part, rows in zip(packed.parts, weight.split([part.shape[0] for part in packed.parts]), strict=True):
            rows[:, : packed.cols] = part


def weight_of(packed: PackedLinear | PackedExperts, op: str) -> Tensor:
    """The packed copy, K' = K padded: [N, K'] of a linear layer, [E, N, K'] of experts."""
    return packed_buffer(op, packed, "rows", "triton")


def linear(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in packed.parts)):
        out: Tensor = _Linear.apply(x, packed, out_dtype, *packed.parts)
        return out
    return _forward(x, packed, out_dtype)


def _forward(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    weight = weight_of(packed, "linear")
    check_rows("linear", x, packed.cols, weight.dtype)
    check_out_dtype("linear", out_dtype)
    check_place("linear", x=x, packed=weight)
    x = aligned(x)
    out = x.new_empty(x.shape[0], packed.rows, dtype=out_dtype)
    product(x, weight, out, weight.shape[1], (row_stride(x), 1), (1, weight.stride(0)))
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, out_dtype, *parts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.packed, ctx.rows = packed, active()
        return _forward(x, packed, out_dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,), packed = ctx.saved_tensors, ctx.packed
        weight = weight_of(packed, "linear")
        need_x, need_parts = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        dx = None
        if need_x:
            dx, dy = torch.empty_like(x, memory_format=torch.contiguous_format), aligned(grad)
            product(dy, weight, dx, packed.rows, (row_stride(dy), 1), (weight.stride(0), 1))
        if not any(need_parts):
            return dx, None, None, *[None] * len(need_parts)
        whole = over_all_rows(ctx.rows, _weight_gradient, grad, x)
        pieces = whole.split([part.shape[0] for part in packed.parts])
        return dx, None, None, *(piece if need else None for piece, need in zip(pieces, need_parts, strict=True))


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [T, N], x [T, K] -> [N, K] of x.dtype, summed over t."""
    out, grad, x = x.new_empty(grad.shape[1], x.shape[1]), aligned(grad), aligned(x)
    strides = (1, row_stride(grad)), (row_stride(x), 1)
    product(grad, x, out, x.shape[0], *strides, kernel=weight_gradient_kernel)
    return out


def specs() -> list[CompileSpec]:
    """Forward, gradient of x, gradient of the weights; the gradients also for bf16 weights with fp32 outputs."""
    # Triton compiles in an integer that is 1, such as the stride of adjacent elements.
    uses = {
        "forward": (("a_red", "b_red"), ("depth", "a_row", "b_col")),
        "input gradient": (("a_red", "b_col"), ("depth", "a_row", "b_red")),
        "weight gradient": (("a_row", "b_col"), ("a_red", "b_red")),
    }
    plain = [("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16")]
    types = {
        "forward": [*plain, ("bf16", "bf16", "fp32")],
        "input gradient": [*plain, ("fp32", "bf16", "bf16")],
        "weight gradient": [*plain, ("fp32", "bf16", "bf16")],
    }
    out = []
    for use, (ones, even) in uses.items():
        for a, b, c in types[use]:
            tile = product_tile(torch.bfloat16 if a == b == "bf16" else torch.float32)
            integers = ("rows", "columns", "depth", "a_row", "a_red", "b_red", "b_col")
            spec = CompileSpec(
                f"linear {use}: {a} x {b} -> {c}",
                weight_gradient_kernel if use == "weight gradient" else product_kernel,
                {"a": f"*{a}", "b": f"*{b}", "c": f"*{c}"} | {name: "i32" for name in integers if name not in ones},
                dict.fromkeys(ones, 1) | {"M": tile.m, "N": tile.n, "K": tile.k, "WIDEN": a != b},
                ("a", "b", "c", "columns", *even),
                tile.warps,
                tile.stages,
            )
            out.append(spec)
    return out

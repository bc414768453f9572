"""Linear layers in Triton: packing, forward and gradient, all three products by one kernel.

A pack is a copy of the stacked weights, [N, K] with K padded by zeros to a multiple of 16. An output element is one
program's: K is reduced in tiles of a constant size, ascending, by the matrix unit (bf16) or FMA units (fp32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import PackedExperts, PackedLinear
from kernels.triton.launch import (
    ALIGN,
    SHORT,
    CompileSpec,
    aligned,
    check,
    check_columns,
    product_tile,
    row_stride,
    run,
)


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

    ``a_rows`` [M] and ``b_columns`` [N] point at r = 0. Masked rows, columns and terms count as 0. ``WIDEN``: to fp32
    first, for operands of two types."""
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
        total = tl.dot(a, b, total, input_precision="ieee")
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
    """c [rows, columns] = a @ b, a and b given by their strides: rows, columns and the reduced axis."""
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    a_rows = a + row.to(tl.int64) * a_row
    b_columns = b + column.to(tl.int64) * b_col
    total = chain(a_rows, b_columns, row < rows, column < columns, depth, a_red, b_red, M, N, K, WIDEN)
    out = c + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, total.to(c.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


def product(
    a: Tensor, b: Tensor, c: Tensor, depth: int, a_strides: tuple[int, int], b_strides: tuple[int, int]
) -> None:
    """``a_strides`` (row, reduced), ``b_strides`` (reduced, column)."""
    rows, columns = c.shape
    widen = a.dtype != b.dtype
    tile = product_tile(torch.float32 if a.dtype != b.dtype else a.dtype)
    grid = (triton.cdiv(columns, tile.n), triton.cdiv(rows, tile.m))
    sizes = (rows, columns, depth, *a_strides, *b_strides)
    run(product_kernel, grid, c.device, tile, a, b, c, *sizes, M=tile.m, N=tile.n, K=tile.k, WIDEN=widen)


def pack_linear(parts: tuple[Tensor, ...]) -> PackedLinear:
    if not parts:
        raise ValueError("pack_linear: parts is empty; give at least one weight [N, K]")
    cols = parts[0].shape[-1]
    for i, part in enumerate(parts):
        if part.dim() != 2 or part.shape[1] != cols:
            raise ValueError(f"pack_linear: parts[{i}] is {tuple(part.shape)}, not [N, {cols}]")
        check_weight(f"parts[{i}]", part, parts[0], "pack_linear")
    packed = PackedLinear(parts, sum(part.shape[0] for part in parts), cols)
    packed.data["rows"] = parts[0].new_zeros(packed.rows, padded(cols))
    fill_linear(packed)
    return packed


def check_weight(name: str, part: Tensor, first: Tensor, op: str) -> None:
    check(op, name, part)
    if part.dtype != first.dtype or part.device != first.device:
        raise ValueError(f"{op}: {name} is {part.dtype} on {part.device}; the first is {first.dtype} on {first.device}")
    if not part.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous; its strides are {part.stride()}")


def padded(cols: int) -> int:
    return triton.cdiv(cols, ALIGN) * ALIGN


def fill_linear(packed: PackedLinear) -> None:
    """Copies the parts' current values."""
    weight = weight_of(packed, "repack")
    with torch.no_grad():
        for part, rows in zip(packed.parts, weight.split([part.shape[0] for part in packed.parts]), strict=True):
            rows[:, : packed.cols] = part


def weight_of(packed: PackedLinear | PackedExperts, op: str) -> Tensor:
    """The padded copy: [N, K'] of a linear layer, [E, N, K'] of experts."""
    try:
        return packed.data["rows"]
    except KeyError:
        raise ValueError(
            f"{op}: packed was made by another backend; pack the weights anew after use_backend('triton')"
        ) from None


def check_rows(op: str, x: Tensor, cols: int, weight: Tensor) -> None:
    """Raises the error for an x that is not [T, cols] of the weights' dtype and device, columns adjacent."""
    check(op, "x", x)
    if x.dim() != 2 or x.shape[1] != cols:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, not [T, {cols}]")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"{op}: x is {x.dtype} on {x.device}, the weights {weight.dtype} on {weight.device}")
    check_columns(op, "x", x)


def linear(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in packed.parts)):
        out: Tensor = _Linear.apply(x, packed, out_dtype, *packed.parts)
        return out
    return _forward(x, packed, out_dtype)


def _forward(x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    weight = weight_of(packed, "linear")
    check_rows("linear", x, packed.cols, weight)
    if out_dtype not in SHORT:
        raise ValueError(f"linear: out_dtype is {out_dtype}; choose float32 or bfloat16")
    x = aligned(x)
    out = x.new_empty(x.shape[0], packed.rows, dtype=out_dtype)
    product(x, weight, out, weight.shape[1], (row_stride(x), 1), (1, weight.stride(0)))
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, out_dtype, *parts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.packed = packed
        return _forward(x, packed, out_dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,), packed = ctx.saved_tensors, ctx.packed
        grad, weight = aligned(grad), weight_of(packed, "linear")
        need_x, need_parts = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        dx = None
        if need_x:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            product(grad, weight, dx, packed.rows, (row_stride(grad), 1), (weight.stride(0), 1))
        if not any(need_parts):
            return dx, None, None, *[None] * len(need_parts)
        whole, x = x.new_empty(packed.rows, packed.cols), aligned(x)
        product(grad, x, whole, x.shape[0], (1, row_stride(grad)), (row_stride(x), 1))
        pieces = whole.split([part.shape[0] for part in packed.parts])
        return dx, None, None, *(piece if need else None for piece, need in zip(pieces, need_parts, strict=True))


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
                product_kernel,
                {"a": f"*{a}", "b": f"*{b}", "c": f"*{c}"} | {name: "i32" for name in integers if name not in ones},
                dict.fromkeys(ones, 1) | {"M": tile.m, "N": tile.n, "K": tile.k, "WIDEN": a != b},
                ("a", "b", "c", "columns", *even),
                tile.warps,
                tile.stages,
            )
            out.append(spec)
    return out

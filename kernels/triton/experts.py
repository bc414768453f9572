"""`expert_linear` in Triton: gather + GEMV for few rows, grouped GEMM for many, equal bit for bit.

Both forms compute their tile by `linear.chain`, so an output element is made by the same instructions in the same
order. They differ in which rows share a tile: none (one row a program, the other rows of its tile masked), or rows of
one expert, which a table made on the device lists (so the host need not wait). Masking leaves the matrix unit mostly
idle, but with few rows reading the weights takes the time.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.weights import check_experts, check_rows, no_such_expert
from kernels.layout import PackedExperts
from kernels.rows import active, over_all_rows
from kernels.triton.deferred import settle, word_on
from kernels.triton.elementwise import combine
from kernels.triton.launch import CompileSpec, aligned, check_place, plain, row_stride, run
from kernels.triton.linear import chain, padded, weight_of
from kernels.triton.tiles import PRECISION, Tile, expert_form, product_tile


@triton.jit(do_not_specialize=["fan_out", "experts"])
def gather_kernel(
    a, b, c, expert, noticed, experts, columns, depth, fan_out, a_row, b_expert, b_red, b_col,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """c[r] = a[r // fan_out] @ b[expert[r]]; one program a row r and tile of columns. An expert that is none of
    ``experts`` counts as 0, and ``noticed`` is set (`kernels.triton.deferred`)."""
    r = tl.program_id(1).to(tl.int64)
    live = tl.arange(0, M) == 0
    column = tl.program_id(0) * N + tl.arange(0, N)
    a_rows = a + (r // fan_out + tl.zeros((M,), tl.int64)) * a_row
    e = tl.load(expert + r)
    known = (e >= 0) & (e < experts)
    b_columns = b + tl.where(known, e, 0).to(tl.int64) * b_expert + column.to(tl.int64) * b_col
    total = chain(a_rows, b_columns, live, column < columns, depth, 1, b_red, M, N, K, WIDEN)
    tl.store(noticed, 1, known == 0)
    out = c + r * columns + column[None, :] + tl.zeros((M, N), tl.int64)
    tl.store(out, total.to(c.dtype.element_ty), live[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["fan_out", "experts", "rows"])
def grouped_kernel(
    a, b, c, order, bound, tile_end, tile_expert, noticed, experts, rows, columns, depth, fan_out, a_row, b_expert,
    b_red, b_col,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `gather_kernel`, for tiles of rows of one expert: ``order[bound[e] : bound[e + 1]]`` are expert e's rows, and
    its last tile is ``tile_end[e] - 1``. Tiles beyond the last one have an expert >= ``experts`` and do nothing. A row
    of no expert is in no tile."""
    tile = tl.program_id(1)
    tl.store(noticed, 1, (tl.load(bound) != 0) | (tl.load(bound + experts) != rows))
    e = tl.load(tile_expert + tile)
    if e < experts:
        end = tl.load(bound + e + 1)
        tiles = tl.cdiv(end - tl.load(bound + e), M)
        at = tl.load(bound + e) + (tile - tl.load(tile_end + e) + tiles) * M + tl.arange(0, M)
        row = tl.load(order + at, at < end, other=0).to(tl.int64)
        column = tl.program_id(0) * N + tl.arange(0, N)
        a_rows = a + (row // fan_out) * a_row
        b_columns = b + e.to(tl.int64) * b_expert + column.to(tl.int64) * b_col
        total = chain(a_rows, b_columns, at < end, column < columns, depth, 1, b_red, M, N, K, WIDEN)
        out = c + row[:, None] * columns + column[None, :]
        tl.store(out, total.to(c.dtype.element_ty), (at < end)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["fan_out"])
def expert_weight_gradient_kernel(
    grad, x, dw, order, bound, rows, columns, fan_out, grad_row, x_row,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dw[e] [rows, columns] = sum over e's rows r, ascending, of grad[r] x[r // fan_out]^T; a tile of dw a program."""
    e = tl.program_id(2)
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    first, end = tl.load(bound + e), tl.load(bound + e + 1)
    total = tl.zeros((M, N), tl.float32)
    for start in range(first, end, K):
        at = start + tl.arange(0, K)
        term = tl.load(order + at, at < end, other=0).to(tl.int64)
        g = tl.load(
            grad + row[:, None] + term[None, :] * grad_row, (row < rows)[:, None] & (at < end)[None, :], other=0.0
        )
        v = tl.load(
            x + (term // fan_out)[:, None] * x_row + column[None, :],
            (at < end)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        if WIDEN:
            g = g.to(tl.float32)
            v = v.to(tl.float32)
        total = tl.dot(g, v, total, input_precision=PRECISION)
    out = dw + e.to(tl.int64) * rows * columns + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, total.to(dw.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


def pack_experts(groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts:
    packed, first = PackedExperts.build(groups), groups[0][0]
    check_place("pack_experts", groups=first)
    packed.data["rows"] = first.new_zeros(packed.experts, packed.rows, padded(packed.cols))
    fill_experts(packed)
    return packed


def fill_experts(packed: PackedExperts) -> None:
    """Copies the current values of the parts into the packed copy."""
    weight = weight_of(packed, "repack")
    expert = 0
    with torch.no_grad():
        for group in packed.groups:
            whole = weight[expert : expert + group[0].shape[0], :, : packed.cols]
            for part, rows in zip(group, whole.split([part.shape[1] for part in group], dim=1), strict=True):
                rows.copy_(part)
            expert += group[0].shape[0]


def expert_linear(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    parts = [part for group in packed.groups for part in group]
    if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in parts)):
        out: Tensor = _ExpertLinear.apply(x, packed, expert, fan_out, *parts)
        return out
    return _forward(x, packed, expert, fan_out)


def _forward(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    weight = weight_of(packed, "expert_linear")
    check_rows("expert_linear", x, packed.cols, weight.dtype)
    rows = check_experts(x, expert, fan_out)
    check_place("expert_linear", x=x, packed=weight, expert=expert)
    out, noticed = x.new_empty(rows, packed.rows), word_on(x.device)
    x, strides, form = aligned(x), (1, weight.stride(1)), expert_form(rows)
    expert_product(x, weight, plain(expert), fan_out, out, weight.shape[2], strides, form, noticed)
    settle(noticed, lambda: _explain(expert, packed.experts))
    return out


def _explain(expert: Tensor, experts: int) -> None:
    outside = (expert < 0) | (expert >= experts)
    if bool(outside.any()):
        raise no_such_expert(expert, int(outside.int().argmax()), experts)


def expert_product(
    a: Tensor,
    weight: Tensor,
    expert: Tensor,
    fan_out: int,
    out: Tensor,
    depth: int,
    strides: tuple[int, int],
    form: str,
    noticed: Tensor | None = None,
) -> None:
    """out[r] = a[r // fan_out] @ weight[expert[r]] over ``depth`` terms. ``strides`` are those of (term, column) within
    an expert's weights, ``form`` is "gather" or "grouped"; ``noticed`` int32 [1] becomes 1 for an expert that is
    none; None where all are known to be right."""
    rows, columns = out.shape
    tile, widen = _tile(a, weight), a.dtype != weight.dtype
    sizes = (columns, depth, fan_out, row_stride(a), weight.stride(0), *strides)
    constants = {"M": tile.m, "N": tile.n, "K": tile.k, "WIDEN": widen}
    across, experts = triton.cdiv(columns, tile.n), weight.shape[0]
    noticed = expert.new_empty(1) if noticed is None else noticed
    if form == "gather":
        run(
            gather_kernel, (across, rows), out.device, tile, a, weight, out, expert, noticed, experts, *sizes,
            **constants,
        )  # fmt: skip
        return
    order, bound = sort_by_expert(expert, experts)
    tile_end = ((bound[1:] - bound[:-1] + tile.m - 1) // tile.m).cumsum(0, dtype=torch.int32)
    tiles = triton.cdiv(rows, tile.m) + min(experts, rows)  # enough, however the rows are distributed
    tile_expert = torch.searchsorted(
        tile_end, torch.arange(tiles, dtype=torch.int32, device=out.device), right=True, out_int32=True
    )
    tables = (order, bound, tile_end, tile_expert, noticed, experts, rows)
    run(grouped_kernel, (across, tiles), out.device, tile, a, weight, out, *tables, *sizes, **constants)


def _tile(a: Tensor, b: Tensor) -> Tile:
    return product_tile(a.dtype if a.dtype == b.dtype else torch.float32)


def sort_by_expert(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(row numbers sorted by expert, ascending within one, int32 [R]; int32 [E + 1]: where each expert's rows begin,
    and the end of the last's)."""
    by_expert, order = torch.sort(expert, stable=True)
    edges = torch.arange(experts + 1, dtype=torch.int32, device=expert.device)
    return order.to(torch.int32), torch.searchsorted(by_expert, edges, out_int32=True)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, expert, fan_out, *parts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, expert)
        ctx.packed, ctx.fan_out, ctx.rows = packed, fan_out, active()
        return _forward(x, packed, expert, fan_out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, expert), packed, fan_out = ctx.saved_tensors, ctx.packed, ctx.fan_out
        weight, need_parts, dx = weight_of(packed, "expert_linear"), ctx.needs_input_grad[4:], None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(aligned(grad), weight, packed, expert, fan_out).to(x.dtype)
        if not any(need_parts):
            return dx, None, None, None, *[None] * len(need_parts)
        dw = over_all_rows(ctx.rows, partial(_weight_gradient, packed.experts, fan_out), grad, x, expert)
        pieces = []
        for group, whole in zip(packed.groups, dw.split([group[0].shape[0] for group in packed.groups]), strict=True):
            pieces += whole.split([part.shape[1] for part in group], dim=1)
        parts = (piece if need else None for piece, need in zip(pieces, need_parts, strict=True))
        return dx, None, None, None, *parts


def _weight_gradient(experts: int, fan_out: int, grad: Tensor, x: Tensor, expert: Tensor) -> Tensor:
    """grad [R, N], x [T, K], expert [R] -> [E, N, K] of x.dtype, summed over each expert's rows in ascending order."""
    columns, width = grad.shape[1], x.shape[1]
    dw = x.new_empty(experts, columns, width)
    order, bound = sort_by_expert(expert, experts)
    grad, x = aligned(grad), aligned(x)
    tile = _tile(grad, x)
    run(
        expert_weight_gradient_kernel, (triton.cdiv(width, tile.n), triton.cdiv(columns, tile.m), experts), x.device,
        tile, grad, x, dw, order, bound, columns, width, fan_out, row_stride(grad), row_stride(x),
        M=tile.m, N=tile.n, K=tile.k, WIDEN=grad.dtype != x.dtype,
    )  # fmt: skip
    return dw


def _input_gradient(grad: Tensor, weight: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    """grad [R, N] -> fp32 [T, K]: summed over n in ascending order, then over a row's fan-out in ascending order."""
    rows = grad.new_empty(expert.shape[0], packed.cols, dtype=torch.float32)
    form = expert_form(expert.shape[0])  # the forward has seen that the experts are right
    expert_product(grad, weight, plain(expert), 1, rows, packed.rows, (weight.stride(1), 1), form)
    return rows if fan_out == 1 else combine(rows, rows.new_ones(expert.shape[0] // fan_out, fan_out))


def specs() -> list[CompileSpec]:
    out = []
    for t in ("fp32", "bf16"):
        tile = product_tile(torch.bfloat16 if t == "bf16" else torch.float32)
        sizes = {"M": tile.m, "N": tile.n, "K": tile.k, "WIDEN": False}
        pointers = {"a": f"*{t}", "b": f"*{t}"}
        tables = dict.fromkeys(("order", "bound", "tile_end", "tile_expert", "noticed"), "*i32")
        tables |= {"experts": "i32", "rows": "i32"}
        integers = {"columns": "i32", "depth": "i32", "fan_out": "i32", "a_row": "i32", "b_expert": "i32"}
        for use, one, stride, to in (("forward", "b_red", "b_col", t), ("input gradient", "b_col", "b_red", "fp32")):
            shared = ("a", "b", "c", "columns", "depth", "a_row", "b_expert", stride)
            for form, kernel, extra in (
                ("gather", gather_kernel, {"expert": "*i32", "noticed": "*i32", "experts": "i32"}),
                ("grouped", grouped_kernel, tables),
            ):
                signature = pointers | {"c": f"*{to}"} | extra | integers | {stride: "i32"}
                name = f"expert_linear {form} {use}: {t}"
                indices = tuple(a for a, kind in extra.items() if kind == "*i32")
                out.append(
                    CompileSpec(name, kernel, signature, {one: 1} | sizes, shared + indices, tile.warps, tile.stages)
                )
        signature = {"grad": f"*{t}", "x": f"*{t}", "dw": f"*{t}", "order": "*i32", "bound": "*i32"}
        signature |= dict.fromkeys(("rows", "columns", "fan_out", "grad_row", "x_row"), "i32")
        even = tuple(name for name in signature if name != "fan_out")
        name, kernel = f"expert_linear weight gradient: {t}", expert_weight_gradient_kernel
        out.append(CompileSpec(name, kernel, signature, sizes, even, tile.warps, tile.stages))
    return out

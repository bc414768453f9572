"""SwiGLU and the weighted sum of experts' outputs in Triton; forward and gradient, fp32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.rows import check_moe_combine, check_swiglu
from kernels.triton.launch import CompileSpec, aligned, check_place, map_grid, plain, row_stride, run
from kernels.triton.tiles import MAP_TILE, norm_tile


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(gate, up, out, rows, half, x_row, M: tl.constexpr, N: tl.constexpr):
    """out = silu(gate) * up; ``x_row`` is the row stride of both gate and up [rows, half]."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    inside = (row < rows) & (column < half)
    g = tl.load(gate + row * x_row + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * x_row + column, inside, other=0.0).to(tl.float32)
    y = tl.div_rn(g, 1.0 + tl.exp(-g)) * u
    tl.store(out + row * half + column, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(gate, up, grad, dgate, dup, rows, half, x_row, grad_row, M: tl.constexpr, N: tl.constexpr):
    """With s = sigmoid(g): dup = dy g s, dgate = dy u s (1 + g (1 - s)). dgate and dup are halves of one [rows, 2
    half]."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    inside = (row < rows) & (column < half)
    g = tl.load(gate + row * x_row + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * x_row + column, inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * grad_row + column, inside, other=0.0).to(tl.float32)
    sigmoid = tl.div_rn(1.0 + tl.zeros((M, N), tl.float32), 1.0 + tl.exp(-g))
    place = row * (2 * half) + column
    tl.store(dup + place, (dy * (g * sigmoid)).to(dup.dtype.element_ty), inside)
    tl.store(dgate + place, (dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(dgate.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(y, weight, out, rows, width, choices, M: tl.constexpr, N: tl.constexpr):
    """out[t] = sum_j weight[t, j] * y[t * choices + j], ascending j."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    inside = (row < rows) & (column < width)
    total = tl.zeros((M, N), tl.float32)
    for j in range(choices):
        w = tl.load(weight + row * choices + j, row < rows, other=0.0)
        total += w * tl.load(y + (row * choices + j) * width + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def combine_backward_kernel(
    y, weight, grad, dy, dweight, rows, width, choices, grad_row, M: tl.constexpr, N: tl.constexpr
):
    """Of row r of y: dy[r] = weight[r] grad[r // choices], dweight[r] = y[r] . grad[r // choices]."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    live = row < rows
    w = tl.load(weight + row, live, other=0.0)[:, None]
    g_rows, place = grad + (row // choices * grad_row)[:, None], (row * width)[:, None]
    partial = tl.zeros((M, N), tl.float32)
    for first in range(0, width, N):
        column = first + tl.arange(0, N)[None, :]
        inside = live[:, None] & (column < width)
        g = tl.load(g_rows + column, inside, other=0.0).to(tl.float32)
        partial += g * tl.load(y + place + column, inside, other=0.0).to(tl.float32)
        tl.store(dy + place + column, (w * g).to(dy.dtype.element_ty), inside)
    tl.store(dweight + row, tl.sum(partial, axis=1), live)


def swiglu(gate_up: Tensor) -> Tensor:
    if torch.is_grad_enabled() and gate_up.requires_grad:
        out: Tensor = _SwiGLU.apply(gate_up)
        return out
    return _swiglu(gate_up)


def _swiglu(gate_up: Tensor) -> Tensor:
    check_swiglu(gate_up)
    check_place("swiglu", gate_up=gate_up)
    rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    gate, up, stride = _halves(gate_up)
    out = gate_up.new_empty(rows, half)
    constants = {"M": MAP_TILE.m, "N": MAP_TILE.n}
    run(swiglu_kernel, map_grid(rows, half), out.device, MAP_TILE, gate, up, out, rows, half, stride, **constants)
    return out


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor, int]:
    """(gate, up, their row stride). Both are views or both are copies, since both have the same width."""
    gate, up = (aligned(part) for part in gate_up.chunk(2, dim=1))
    return gate, up, row_stride(gate)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (gate_up,) = ctx.saved_tensors
        rows, half = grad.shape
        gate, up, stride = _halves(gate_up)
        grad, out = aligned(grad), gate_up.new_empty(rows, 2 * half)
        run(
            swiglu_backward_kernel, map_grid(rows, half), out.device, MAP_TILE, gate, up, grad, out, out[:, half:],
            rows, half, stride, row_stride(grad), M=MAP_TILE.m, N=MAP_TILE.n,
        )  # fmt: skip
        return out


def moe_combine(y: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (y.requires_grad or weight.requires_grad):
        out: Tensor = _Combine.apply(y, weight)
        return out
    return combine(y, weight)


def combine(y: Tensor, weight: Tensor) -> Tensor:
    check_moe_combine(y, weight)
    check_place("moe_combine", y=y, weight=weight)
    (rows, choices), width = weight.shape, y.shape[1]
    y, weight = plain(y), plain(weight)
    out = y.new_empty(rows, width)
    constants = {"M": MAP_TILE.m, "N": MAP_TILE.n}
    run(combine_kernel, map_grid(rows, width), y.device, MAP_TILE, y, weight, out, rows, width, choices, **constants)
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y, weight)
        return combine(y, weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, weight = map(plain, ctx.saved_tensors)
        grad, dy, dweight = aligned(grad), torch.empty_like(y), torch.empty_like(weight)
        width, tile = y.shape[1], norm_tile(y.shape[1])
        run(
            combine_backward_kernel, (triton.cdiv(y.shape[0], tile.m),), y.device, tile, y, weight, grad, dy, dweight,
            y.shape[0], width, weight.shape[1], row_stride(grad), M=tile.m, N=tile.n,
        )  # fmt: skip
        return dy, dweight


def specs() -> list[CompileSpec]:
    out = []
    sizes: dict[str, int | bool] = {"M": MAP_TILE.m, "N": MAP_TILE.n}
    norm = norm_tile(4096)
    for t in ("fp32", "bf16"):
        p = f"*{t}"
        for name, kernel, signature, constants, odd, tile in (
            (
                "swiglu",
                swiglu_kernel,
                {"gate": p, "up": p, "out": p, "rows": "i32", "half": "i32", "x_row": "i32"},
                sizes,
                ("rows",),
                MAP_TILE,
            ),
            (
                "swiglu gradient",
                swiglu_backward_kernel,
                dict.fromkeys(("gate", "up", "grad", "dgate", "dup"), p)
                | dict.fromkeys(("rows", "half", "x_row", "grad_row"), "i32"),
                sizes,
                ("rows",),
                MAP_TILE,
            ),
            (
                "moe_combine",
                combine_kernel,
                {"y": p, "weight": "*fp32", "out": p, "rows": "i32", "width": "i32", "choices": "i32"},
                sizes,
                ("rows", "choices"),
                MAP_TILE,
            ),
            (
                "moe_combine gradient",
                combine_backward_kernel,
                {"y": p, "weight": "*fp32", "grad": p, "dy": p, "dweight": "*fp32"}
                | dict.fromkeys(("rows", "width", "choices", "grad_row"), "i32"),
                {"M": norm.m, "N": norm.n},
                ("rows", "choices"),
                norm,
            ),
        ):
            even = tuple(a for a in signature if a not in odd)
            spec = CompileSpec(f"{name}: {t}", kernel, signature, constants, even, tile.warps, tile.stages)
            out.append(spec)
    return out

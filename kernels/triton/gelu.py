"""GELU in Triton, forward and gradient, fp32 inside: gelu(x) = max(x, 0) - T(a) with a = |x| and T(a) = a Phi(-a), so
that nothing cancels where gelu is small.

The tail has the form of Shepherd & Laframboise (Mathematics of Computation 36, 1981), who map [0, inf) to an interval
and take the exponential out:

    T(a) = exp(-a^2/2) t S(t),  t = a / (a + 3),  S(t) = exp(a^2/2) Phi(-a) (a + 3)

S is a polynomial of degree 10 in v = 2 t - 1, our own minimax fit (Remez' exchange with 40 digits), relative error
1e-9. A GPU's exp errs by the rounding of its argument times log2 e, many units in the last place where gelu is small:
the exponential is computed here. Every fused multiply-add is written as one. Errors: those that `kernels.ops.gelu`
states, and 2^-22 of the derivative.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.rows import check_gelu
from kernels.triton.launch import CompileSpec, aligned, check_place, map_grid, row_stride, run
from kernels.triton.tiles import MAP_TILE


@triton.jit
def _fraction(a):
    """(a + 3, t, v, (S - S0) / v) of a in [0, 15]."""
    d = a + 3.0
    t = tl.div_rn(a, d)
    v = t * 2.0 - 1.0
    p = tl.fma(v, 5.44890318e-5, 1.31330133e-4)
    p = tl.fma(p, v, -2.44730094e-4)
    p = tl.fma(p, v, -1.03257352e-3)
    p = tl.fma(p, v, 1.02475402e-3)
    p = tl.fma(p, v, 6.96931127e-3)
    p = tl.fma(p, v, -1.04625132e-2)
    p = tl.fma(p, v, -4.72626872e-2)
    p = tl.fma(p, v, 2.30017707e-1)
    return d, t, v, tl.fma(p, v, -5.09332001e-1)


@triton.jit
def _weighted(a, g, g_low):
    """exp(-a^2/2) (g + g_low). a^2, in two parts, is q - n 2 ln2, |q| <= ln2, n whole."""
    square = a * a
    square_low = tl.fma(a, a, -square)
    n = tl.floor(tl.fma(square, -0.721347520, 0.5))
    q = tl.fma(n, 1.38629150390625, square) + tl.fma(n, 2.85721364e-6, square_low)
    # p = exp(-q/2) - 1, a minimax fit, error 1e-8
    p = tl.fma(q, 2.17913275e-5, -2.61455571e-4)
    p = tl.fma(p, q, 2.60414253e-3)
    p = tl.fma(p, q, -2.08331794e-2)
    p = tl.fma(p, q, 0.125)
    p = tl.fma(p, q, -0.5) * q
    # times 2^n, first exactly 2^(n + 64): a denormal result is rounded once
    power = ((n.to(tl.int32) + 191) << 23).to(tl.float32, bitcast=True)
    return (g + tl.fma(g, p, g_low)) * power * 5.421010862427522e-20


@triton.jit(do_not_specialize=["rows"])
def gelu_kernel(x, out, rows, width, x_row, M: tl.constexpr, N: tl.constexpr):
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    inside = (row < rows) & (column < width)
    z = tl.load(x + row * x_row + column, inside, other=0.0).to(tl.float32)
    a = tl.where(tl.abs(z) < 15.0, tl.abs(z), 15.0)  # 15 of a NaN
    d, t, v, p = _fraction(a)
    # S and t are kept in two parts. d ln(t S) / d ln t, by which the second of t counts, is nearly (1 - t)^2.
    s = tl.fma(p, v, 7.29083717e-1)
    s_low = tl.fma(p, v, 7.29083717e-1 - s) - 2.64936482e-8
    t_low = tl.div_rn(tl.fma(-t, a - (d - 3.0), tl.fma(-t, d, a)), d)
    g = t * s
    g_low = tl.fma(t_low * ((1.0 - t) * (1.0 - t)), s, tl.fma(t, s_low, tl.fma(t, s, -g)))
    # z - z is 0, or NaN for NaN and for -inf, of which the definition is -inf times 0
    y = tl.where(z > 0.0, z, z - z) - _weighted(a, g, g_low)
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(x, grad, dx, rows, width, x_row, grad_row, M: tl.constexpr, N: tl.constexpr):
    """dx = dy (Phi(x) + x phi(x)). The factor is exp(-a^2/2) (S / (a + 3) - a / sqrt(2 pi)) for x = -a, and 1 minus
    that for x = a; NaN for an infinite x: infinity times 0."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    column = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    inside = (row < rows) & (column < width)
    z = tl.load(x + row * x_row + column, inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * grad_row + column, inside, other=0.0).to(tl.float32)
    a = tl.where(tl.abs(z) < 15.0, tl.abs(z), 15.0)
    d, _, v, p = _fraction(a)
    low = _weighted(a, tl.fma(a, -3.98942280e-1, tl.div_rn(tl.fma(p, v, 7.29083717e-1), d)), 0.0)
    slope = tl.where(z > 0.0, 1.0 - low, low) + (z - z)
    tl.store(dx + row * width + column, (dy * slope).to(dx.dtype.element_ty), inside)


def gelu(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Gelu.apply(x)
        return out
    return _gelu(x)


def _gelu(x: Tensor) -> Tensor:
    check_gelu(x)
    check_place("gelu", x=x)
    rows, width = x.shape
    x, out = aligned(x), x.new_empty(rows, width)
    constants = {"M": MAP_TILE.m, "N": MAP_TILE.n}
    run(gelu_kernel, map_grid(rows, width), out.device, MAP_TILE, x, out, rows, width, row_stride(x), **constants)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        rows, width = x.shape
        x, grad, dx = aligned(x), aligned(grad), x.new_empty(rows, width)
        run(
            gelu_backward_kernel, map_grid(rows, width), dx.device, MAP_TILE, x, grad, dx, rows, width, row_stride(x),
            row_stride(grad), M=MAP_TILE.m, N=MAP_TILE.n,
        )  # fmt: skip
        return dx


def specs() -> list[CompileSpec]:
    out = []
    constants: dict[str, int | bool] = {"M": MAP_TILE.m, "N": MAP_TILE.n}
    for t in ("fp32", "bf16"):
        for name, kernel, pointers, sizes in (
            ("gelu", gelu_kernel, ("x", "out"), ("width", "x_row")),
            ("gelu gradient", gelu_backward_kernel, ("x", "grad", "dx"), ("width", "x_row", "grad_row")),
        ):
            signature = dict.fromkeys(pointers, f"*{t}") | dict.fromkeys(("rows", *sizes), "i32")
            how = constants, (*pointers, *sizes), MAP_TILE.warps, MAP_TILE.stages
            out.append(CompileSpec(f"{name}: {t}", kernel, signature, *how))
    return out

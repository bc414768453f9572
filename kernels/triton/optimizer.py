"""Sums over whole tensors and AdamW's update in Triton: the arithmetic of `kernels/cpu/native/optimizer.cpp`, operation
for operation, so that both give the same bits (products of fp32 numbers are exact in fp64, every root and quotient is
rounded correctly)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.updates import check_adamw, check_dot
from kernels.layout import AdamWStep
from kernels.triton.launch import CompileSpec, check_place, plain, run
from kernels.triton.tiles import DOT_TILE, MAP_TILE

ELEMENTS = tl.constexpr(1024)
"""Elements of a parameter that one program of `adamw` updates."""


@triton.jit(do_not_specialize=["count"])
def dot_kernel(a, b, lanes, count, N: tl.constexpr, K: tl.constexpr):
    """lanes [programs, N]: lane l of a program adds the products of elements l, l + N, … of its N * K, in fp64."""
    first = tl.program_id(0).to(tl.int64) * (N * K) + tl.arange(0, N)
    total = tl.zeros((N,), tl.float64)
    for k in range(K):
        place = first + k * N
        inside = place < count
        x = tl.load(a + place, inside, other=0.0).to(tl.float64)
        y = tl.load(b + place, inside, other=0.0).to(tl.float64)
        total += x * y
    tl.store(lanes + tl.program_id(0) * N + tl.arange(0, N), total)


@triton.jit(do_not_specialize=["blocks"])
def join_kernel(lanes, out, blocks):
    """The sum of lanes [blocks, 8]: in each block lanes l and l + 4, then l + 2, then l + 1; then the blocks in order.
    One program."""
    total = tl.full((), 0.0, tl.float64)
    for _ in range(blocks):
        even = (tl.load(lanes) + tl.load(lanes + 4)) + (tl.load(lanes + 2) + tl.load(lanes + 6))
        odd = (tl.load(lanes + 1) + tl.load(lanes + 5)) + (tl.load(lanes + 3) + tl.load(lanes + 7))
        total += even + odd
        lanes += 8
    tl.store(out, total)


@triton.jit(do_not_specialize=["count"])
def adamw_kernel(p, g, m, v, count, keep, new1, old2, new2, rate, root, eps, N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = place < count
    grad = tl.load(g + place, inside, other=0.0)
    first = tl.load(m + place, inside, other=0.0)
    second = tl.load(v + place, inside, other=0.0)
    first = (first + (grad - first) * new1) + 0.0
    second = second * old2 + (grad * grad) * new2
    scale = tl.div_rn(tl.sqrt_rn(second), root + tl.zeros((N,), tl.float32)) + eps
    weight = tl.load(p + place, inside, other=0.0) * keep - tl.div_rn(first, scale) * rate
    tl.store(m + place, first, inside)
    tl.store(v + place, second, inside)
    tl.store(p + place, weight, inside)


def dot(a: Tensor, b: Tensor) -> Tensor:
    check_dot(a, b)
    check_place("dot", a=a, b=b)
    programs = triton.cdiv(a.numel(), DOT_TILE.n * DOT_TILE.k)
    lanes = torch.empty(programs, DOT_TILE.n, dtype=torch.float64, device=a.device)
    run(
        dot_kernel, (programs,), a.device, DOT_TILE, plain(a), plain(b), lanes, a.numel(), N=DOT_TILE.n, K=DOT_TILE.k
    )  # fmt: skip
    total = torch.empty((), dtype=torch.float64, device=a.device)
    run(join_kernel, (1,), a.device, DOT_TILE, lanes, total, programs)
    return total


def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep) -> None:
    check_adamw(parameter, gradient, first, second)
    check_place("adamw", parameter=parameter, gradient=gradient, first=first, second=second)
    count = parameter.numel()
    run(
        adamw_kernel, (triton.cdiv(count, ELEMENTS.value),), parameter.device, MAP_TILE, parameter, gradient, first,
        second, count, step.keep, step.new1, step.old2, step.new2, step.rate, step.root, step.eps, N=ELEMENTS.value,
    )  # fmt: skip


def specs() -> list[CompileSpec]:
    numbers = dict.fromkeys(("keep", "new1", "old2", "new2", "rate", "root", "eps"), "fp32")
    pointers = dict.fromkeys(("p", "g", "m", "v"), "*fp32")
    return [
        CompileSpec(
            "dot: fp32",
            dot_kernel,
            {"a": "*fp32", "b": "*fp32", "lanes": "*fp64", "count": "i32"},
            {"N": DOT_TILE.n, "K": DOT_TILE.k},
            ("a", "b", "lanes"),
            DOT_TILE.warps,
            DOT_TILE.stages,
        ),
        CompileSpec(
            "dot, lanes: fp64",
            join_kernel,
            {"lanes": "*fp64", "out": "*fp64", "blocks": "i32"},
            {},
            ("lanes", "out"),
            DOT_TILE.warps,
            DOT_TILE.stages,
        ),
        CompileSpec(
            "adamw: fp32",
            adamw_kernel,
            {**pointers, "count": "i32", **numbers},
            {"N": ELEMENTS.value},
            ("p", "g", "m", "v"),
            MAP_TILE.warps,
            MAP_TILE.stages,
        ),
    ]

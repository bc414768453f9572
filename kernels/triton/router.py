"""The router in Triton, forward and gradient. One program a row, with the whole row of experts at once.

The top_k are taken one after another, the greatest first and of equal ones the lowest index. Weights are summed over
the row of all experts, with 0 for those not taken, in an order that depends on the row's length alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.logits import check_route
from kernels.triton.launch import CompileSpec, check_place, plain, run
from kernels.triton.tiles import router_tile


@triton.jit
def route_kernel(
    logits, bias, expert_out, weight_out,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    x = tl.load(logits + row * (EXPERTS + SHARED) + e, mask=e < EXPERTS + SHARED, other=0.0)
    score = tl.div_rn(1.0, 1.0 + tl.exp(-x)) + tl.load(bias + e, mask=e < EXPERTS, other=0.0)
    score = tl.where(score == score, score, float("-inf"))  # a NaN is taken last
    left = e < EXPERTS
    for _ in range(TOP_K):
        greatest = tl.max(tl.where(left, score, float("-inf")), 0)
        lowest = tl.min(tl.where(left & (score == greatest), e, BLOCK), 0)
        left = left & (e != lowest)
    taken = ((e < EXPERTS) & ~left) | ((e >= EXPERTS) & (e < EXPERTS + SHARED))
    log_sigmoid = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    peak = tl.max(tl.where(taken, log_sigmoid, float("-inf")), 0)
    weight = tl.where(taken, tl.exp(log_sigmoid - peak), 0.0)
    weight = tl.div_rn(weight, tl.sum(weight, 0))
    place = row * (TOP_K + SHARED) + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(expert_out + place, e, mask=taken)
    tl.store(weight_out + place, weight, mask=taken)


@triton.jit
def route_backward_kernel(
    logits, expert, weight, dweight, dlogits, WIDTH: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dlogit_j = w_j (dw_j - sum_i w_i dw_i) (1 - sigmoid(logit_j)), into zeros. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < CHOICES
    e = tl.load(expert + row * CHOICES + j, mask=inside, other=0)
    w = tl.load(weight + row * CHOICES + j, mask=inside, other=0.0)
    dw = tl.load(dweight + row * CHOICES + j, mask=inside, other=0.0)
    x = tl.load(logits + row * WIDTH + e, mask=inside, other=0.0)
    rest = tl.div_rn(1.0, 1.0 + tl.exp(x))
    tl.store(dlogits + row * WIDTH + e, w * (dw - tl.sum(w * dw, 0)) * rest, mask=inside)


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    check_route(logits, bias, top_k, shared)
    check_place("route", logits=logits, bias=bias)
    if torch.is_grad_enabled() and logits.requires_grad:
        result: tuple[Tensor, Tensor] = _Route.apply(logits, bias, top_k, shared)
        return result
    return _route(plain(logits), plain(bias), top_k, shared)


def _route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    rows, width = logits.shape
    expert = logits.new_empty(rows, top_k + shared, dtype=torch.int32)
    weight = logits.new_empty(rows, top_k + shared)
    size = router_tile(width)
    run(
        route_kernel, (rows,), logits.device, size, logits, bias, expert, weight,
        EXPERTS=width - shared, SHARED=shared, TOP_K=top_k, BLOCK=size.n,
    )  # fmt: skip
    return expert, weight


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, top_k, shared):  # type: ignore[no-untyped-def]
        logits = plain(logits)
        expert, weight = _route(logits, plain(bias), top_k, shared)
        ctx.save_for_backward(logits, expert, weight)
        ctx.mark_non_differentiable(expert)
        return expert, weight

    @staticmethod
    def backward(ctx, _, grad):  # type: ignore[no-untyped-def]
        logits, expert, weight = ctx.saved_tensors
        (rows, width), choices = logits.shape, expert.shape[1]
        size, dlogits = router_tile(choices), torch.zeros_like(logits)
        run(
            route_backward_kernel, (rows,), logits.device, size, logits, expert, weight, plain(grad), dlogits,
            WIDTH=width, CHOICES=choices, BLOCK=size.n,
        )  # fmt: skip
        return dlogits, None, None, None


def specs() -> list[CompileSpec]:
    """Inkling-Small's router (256 experts, 8 taken, 2 shared) and a small one."""
    out = []
    for experts, top_k, shared in ((256, 8, 2), (8, 2, 1)):
        size, taken = router_tile(experts + shared), router_tile(top_k + shared)
        floats = dict.fromkeys(("logits", "bias", "weight_out"), "*fp32")
        constants = {"EXPERTS": experts, "SHARED": shared, "TOP_K": top_k, "BLOCK": size.n}
        more = dict.fromkeys(("logits", "weight", "dweight", "dlogits"), "*fp32")
        other = {"WIDTH": experts + shared, "CHOICES": top_k + shared, "BLOCK": taken.n}
        for name, kernel, signature, constexprs, t in (
            ("", route_kernel, floats | {"expert_out": "*i32"}, constants, size),
            (" gradient", route_backward_kernel, more | {"expert": "*i32"}, other, taken),
        ):
            even = tuple(signature)
            title = f"route{name}, {experts} experts: fp32"
            out.append(CompileSpec(title, kernel, signature, dict(constexprs), even, t.warps, t.stages))
    return out

"""Experts on the CPU: their packed weights and linear op, SwiGLU, and the weighted sum of their outputs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.rows import check_moe_combine, check_swiglu
from kernels.checks.weights import check_experts, check_rows, no_such_expert, packed_buffer
from kernels.cpu.library import bind
from kernels.cpu.linear import PANEL, fill_panels, fill_transposed, panel_count, panel_depth, panels_of
from kernels.layout import PackedExperts
from kernels.rows import active, over_all_rows

_EXPERT_LINEAR = {
    torch.float32: bind("expert_linear_f32", "piipipiiipi"),
    torch.bfloat16: bind("expert_linear_bf16", "piipipiiipi"),
}
AUTO, GATHER, GROUPED = 0, 1, 2  # paths of expert_linear, as in native/gemm.cpp; equal bits
_EXPERT_WEIGHT_GRADIENT = bind("expert_weight_gradient", "ppiipiiiip")
_SWIGLU = {torch.float32: bind("swiglu_f32", "pipii"), torch.bfloat16: bind("swiglu_bf16", "pipii")}
_SWIGLU_BACKWARD = bind("swiglu_backward", "pippii")
_COMBINE = {torch.float32: bind("moe_combine_f32", "pppiii"), torch.bfloat16: bind("moe_combine_bf16", "pppiii")}
_COMBINE_BACKWARD = bind("moe_combine_backward", "pppppiii")


# ---- expert linear ----


def pack_experts(groups: tuple[tuple[Tensor, ...], ...]) -> PackedExperts:
    packed = PackedExperts.build(groups)
    check_device("pack_experts", "cpu", "cpu", groups=groups[0][0])
    dtype = groups[0][0].dtype
    panels = panel_count(packed.rows), panel_depth(packed.cols, dtype), PANEL
    packed.data["panels"] = torch.zeros(packed.experts, *panels, dtype=dtype)
    fill_experts(packed)
    return packed


def fill_experts(packed: PackedExperts) -> None:
    """Writes the panels, and those of the transposes if there are any, from the parts' current values."""
    panels = panels_of(packed, "repack")
    expert = 0
    for group in packed.groups:
        for index in range(group[0].shape[0]):
            fill_panels(panels[expert], tuple(part[index] for part in group))
            expert += 1
    if "transposed" in packed.data:
        _fill_transposed(packed)


def _fill_transposed(packed: PackedExperts) -> None:
    for panels, out in zip(packed.data["panels"], packed.data["transposed"], strict=True):
        fill_transposed(panels, packed.rows, packed.cols, out)


def expert_linear(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    if torch.is_grad_enabled():
        parts = [part for group in packed.groups for part in group]
        if x.requires_grad or any(part.requires_grad for part in parts):
            out: Tensor = _ExpertLinear.apply(x, packed, expert, fan_out, *parts)
            return out
    return expert_linear_by(AUTO, x, packed, expert, fan_out)


def expert_linear_by(path: int, x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    """`expert_linear` by the path AUTO, GATHER or GROUPED, to time and to compare them; without autograd."""
    k, n, panels = packed.cols, packed.rows, packed_buffer("expert_linear", packed, "panels", "cpu")
    _, stride, dtype = check_rows("expert_linear", x, k, panels.dtype)
    rows = check_experts(x, expert, fan_out)
    if not (x.is_cpu and expert.is_cpu and panels.is_cpu):
        check_device("expert_linear", "cpu", "cpu", x=x, expert=expert, packed=panels)
    y = torch.empty(rows, n, dtype=dtype)
    bad = _EXPERT_LINEAR[dtype](
        x.data_ptr(), stride[0], fan_out, expert.data_ptr(), rows, panels.data_ptr(), packed.experts, n, k,
        y.data_ptr(), path,
    )  # fmt: skip
    if bad:
        raise no_such_expert(expert, bad - 1, packed.experts)
    return y


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, expert, fan_out, *parts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, expert)
        ctx.packed, ctx.fan_out, ctx.rows = packed, fan_out, active()
        return expert_linear_by(AUTO, x, packed, expert, fan_out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, expert), packed, fan_out = ctx.saved_tensors, ctx.packed, ctx.fan_out
        grad = grad.float().contiguous()
        need_parts = ctx.needs_input_grad[4:]
        dx = _expert_input_gradient(grad, packed, expert, fan_out).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(need_parts):
            return dx, None, None, None, *[None] * len(need_parts)
        dw = over_all_rows(ctx.rows, partial(_expert_weight_gradient, packed.experts, fan_out), grad, x, expert)
        pieces = []
        for group, whole in zip(
            packed.groups, dw.to(x.dtype).split([group[0].shape[0] for group in packed.groups]), strict=True
        ):
            pieces += whole.split([part.shape[1] for part in group], dim=1)
        parts = (piece if need else None for piece, need in zip(pieces, need_parts, strict=True))
        return dx, None, None, None, *parts


def _expert_weight_gradient(experts: int, fan_out: int, grad: Tensor, x: Tensor, expert: Tensor) -> Tensor:
    """grad [R, N] fp32, x [T, K], expert [R] -> [E, N, K] fp32: for each expert one chain in ascending r."""
    wide, dw = x.float(), torch.empty(experts, grad.shape[1], x.shape[1])
    _EXPERT_WEIGHT_GRADIENT(
        grad.data_ptr(), wide.data_ptr(), wide.stride(0), fan_out, expert.data_ptr(), expert.shape[0], *dw.shape,
        dw.data_ptr(),
    )  # fmt: skip
    return dw


def _expert_input_gradient(grad: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    """grad [R, N] fp32 -> [T, K]: a chain in ascending n for each row, then a row's fan-out added in ascending
    order."""
    if "transposed" not in packed.data:
        packed.data["transposed"] = torch.zeros(packed.experts, panel_count(packed.cols), packed.rows, PANEL)
        _fill_transposed(packed)
    (rows, n), k, panels = grad.shape, packed.cols, packed.data["transposed"].data_ptr()
    dx = torch.empty(rows, k)
    _EXPERT_LINEAR[torch.float32](
        grad.data_ptr(), n, 1, expert.data_ptr(), rows, panels, packed.experts, k, n, dx.data_ptr(), AUTO
    )
    return dx if fan_out == 1 else moe_combine(dx, torch.ones(rows // fan_out, fan_out))


# ---- SwiGLU ----


def swiglu(gate_up: Tensor) -> Tensor:
    if torch.is_grad_enabled() and gate_up.requires_grad:
        out: Tensor = _SwiGLU.apply(gate_up)
        return out
    (rows, width), stride, dtype = check_swiglu(gate_up)
    if not gate_up.is_cpu:
        check_device("swiglu", "cpu", "cpu", gate_up=gate_up)
    y = torch.empty(rows, width // 2, dtype=dtype)
    _SWIGLU[dtype](gate_up.data_ptr(), stride[0], y.data_ptr(), rows, width // 2)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (gate_up,) = ctx.saved_tensors
        wide, grad = gate_up.float(), grad.float().contiguous()
        out = torch.empty_like(wide)
        _SWIGLU_BACKWARD(wide.data_ptr(), wide.stride(0), grad.data_ptr(), out.data_ptr(), *grad.shape)
        return out.to(gate_up.dtype)


# ---- weighted sum ----


def moe_combine(y: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (y.requires_grad or weight.requires_grad):
        out: Tensor = _Combine.apply(y, weight)
        return out
    check_moe_combine(y, weight)
    if not (y.is_cpu and weight.is_cpu):
        check_device("moe_combine", "cpu", "cpu", y=y, weight=weight)
    (rows, choices), width, dtype = weight.shape, y.shape[1], y.dtype
    total = torch.empty(rows, width, dtype=dtype)
    _COMBINE[dtype](y.data_ptr(), weight.data_ptr(), total.data_ptr(), rows, choices, width)
    return total


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y, weight)
        return moe_combine(y, weight)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, weight = ctx.saved_tensors
        wide, grad = y.float(), grad.float().contiguous()
        dy, dweight = torch.empty_like(wide), torch.empty_like(weight)
        _COMBINE_BACKWARD(
            wide.data_ptr(), weight.data_ptr(), grad.data_ptr(), dy.data_ptr(), dweight.data_ptr(), *weight.shape,
            grad.shape[1],
        )  # fmt: skip
        return dy.to(y.dtype), dweight

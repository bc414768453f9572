"""Experts on the CPU: their packed weights and linear op, SwiGLU, and the weighted sum of their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind
from kernels.cpu.linear import (
    PANEL,
    check_weight,
    fill_panels,
    fill_transposed,
    panel_count,
    panel_depth,
    panels_of,
    refuse_rows,
)
from kernels.layout import PackedExperts

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
    if not groups or not groups[0]:
        raise ValueError("pack_experts: groups is empty; give at least one weight [E, N, K]")
    dtype = groups[0][0].dtype
    if groups[0][0].dim() != 3:
        raise ValueError(f"pack_experts: groups[0][0] is {tuple(groups[0][0].shape)}, not [E, N, K]")
    for g, group in enumerate(groups):
        for i, part in enumerate(group):
            if part.dim() != 3 or part.shape[0] != group[0].shape[0] or part.shape[2] != groups[0][0].shape[-1]:
                raise ValueError(
                    f"pack_experts: groups[{g}][{i}] is {tuple(part.shape)}, not "
                    f"[{group[0].shape[0]}, N, {groups[0][0].shape[-1]}]"
                )
            check_weight(f"pack_experts: groups[{g}][{i}]", part, dtype)
    rows, cols = sum(part.shape[1] for part in groups[0]), groups[0][0].shape[2]
    for g, group in enumerate(groups):
        if sum(part.shape[1] for part in group) != rows:
            raise ValueError(f"pack_experts: groups[{g}] has other rows than groups[0], which has {rows}")
    packed = PackedExperts(groups, sum(group[0].shape[0] for group in groups), rows, cols)
    packed.data["panels"] = torch.zeros(packed.experts, panel_count(rows), panel_depth(cols, dtype), PANEL, dtype=dtype)
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
    parts = [part for group in packed.groups for part in group]
    if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in parts)):
        out: Tensor = _ExpertLinear.apply(x, packed, expert, fan_out, *parts)
        return out
    return _expert_linear(x, packed, expert, fan_out)


def expert_linear_by(path: int, x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    """`expert_linear` on a path of one's choice, to measure and to compare; without autograd."""
    return _expert_linear(x, packed, expert, fan_out, path)


def _expert_linear(x: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int, path: int = AUTO) -> Tensor:
    panels = panels_of(packed, "expert_linear")
    shape, k = x.shape, packed.cols
    if len(shape) != 2 or shape[1] != k or x.dtype != panels.dtype or not x.is_cpu or (x.stride(1) != 1 and k > 1):
        refuse_rows("expert_linear", x, k, panels.dtype)
    rows = shape[0] * fan_out
    fits = fan_out >= 1 and expert.dtype == torch.int32 and expert.shape == (rows,)
    if not fits or not expert.is_contiguous() or not expert.is_cpu:
        raise ValueError(
            f"expert_linear: expert is {expert.dtype} {tuple(expert.shape)} on {expert.device}, not "
            f"contiguous int32 [{rows}] on the CPU (= {x.shape[0]} rows * fan_out {fan_out})"
        )
    out = torch.empty(rows, packed.rows, dtype=x.dtype)
    _run(x, fan_out, expert, panels, packed.experts, packed.rows, packed.cols, out, path)
    return out


def _run(
    x: Tensor, fan_out: int, expert: Tensor, panels: Tensor, experts: int, n: int, k: int, out: Tensor, path: int
) -> None:
    rows = expert.shape[0]
    bad = _EXPERT_LINEAR[x.dtype](
        x.data_ptr(), x.stride(0), fan_out, expert.data_ptr(), rows, panels.data_ptr(), experts, n, k, out.data_ptr(),
        path,
    )  # fmt: skip
    if bad:
        raise ValueError(f"expert_linear: expert[{bad - 1}] is {int(expert[bad - 1])}, outside 0..{experts - 1}")


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, expert, fan_out, *parts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, expert)
        ctx.packed, ctx.fan_out = packed, fan_out
        return _expert_linear(x, packed, expert, fan_out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, expert), packed, fan_out = ctx.saved_tensors, ctx.packed, ctx.fan_out
        grad = grad.float().contiguous()
        need_parts = ctx.needs_input_grad[4:]
        dx = _expert_input_gradient(grad, packed, expert, fan_out).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(need_parts):
            return dx, None, None, None, *[None] * len(need_parts)
        wide = x.float()
        dw = torch.empty(packed.experts, packed.rows, packed.cols)
        _EXPERT_WEIGHT_GRADIENT(
            grad.data_ptr(), wide.data_ptr(), wide.stride(0), fan_out, expert.data_ptr(), expert.shape[0], *dw.shape,
            dw.data_ptr(),
        )  # fmt: skip
        pieces = []
        for group, whole in zip(
            packed.groups, dw.to(x.dtype).split([group[0].shape[0] for group in packed.groups]), strict=True
        ):
            pieces += whole.split([part.shape[1] for part in group], dim=1)
        parts = (piece if need else None for piece, need in zip(pieces, need_parts, strict=True))
        return dx, None, None, None, *parts


def _expert_input_gradient(grad: Tensor, packed: PackedExperts, expert: Tensor, fan_out: int) -> Tensor:
    """grad [R, N] fp32 -> [T, K]: one chain over n, then over the fan-out in ascending row."""
    if "transposed" not in packed.data:
        packed.data["transposed"] = torch.zeros(packed.experts, panel_count(packed.cols), packed.rows, PANEL)
        _fill_transposed(packed)
    rows = torch.empty(grad.shape[0], packed.cols)
    _run(grad, 1, expert, packed.data["transposed"], packed.experts, packed.cols, packed.rows, rows, AUTO)
    if fan_out == 1:
        return rows
    return _moe_combine(rows, torch.ones(grad.shape[0] // fan_out, fan_out))


# ---- SwiGLU ----


def swiglu(gate_up: Tensor) -> Tensor:
    if torch.is_grad_enabled() and gate_up.requires_grad:
        out: Tensor = _SwiGLU.apply(gate_up)
        return out
    return _swiglu(gate_up)


def _swiglu(gate_up: Tensor) -> Tensor:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up is {tuple(gate_up.shape)}, not [T, 2I]")
    call = _SWIGLU.get(gate_up.dtype)
    if call is None or not gate_up.is_cpu or gate_up.stride(1) != 1:
        raise ValueError(
            f"swiglu: gate_up must be float32 or bfloat16 on the CPU with adjacent columns; it is {gate_up.dtype} on "
            f"{gate_up.device}, strides {gate_up.stride()}"
        )
    rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, half, dtype=gate_up.dtype)
    call(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, half)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

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
    return _moe_combine(y, weight)


def _moe_combine(y: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() != 2 or weight.dtype != torch.float32 or not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError(f"moe_combine: weight is {weight.dtype} {tuple(weight.shape)}, not contiguous fp32 [T, J]")
    rows, j = weight.shape
    if y.dim() != 2 or y.shape[0] != rows * j:
        raise ValueError(f"moe_combine: y is {tuple(y.shape)}, not [{rows} * {j}, D]")
    call = _COMBINE.get(y.dtype)
    if call is None or not y.is_cpu or not y.is_contiguous():
        raise ValueError(
            f"moe_combine: y must be contiguous float32 or bfloat16 on the CPU; it is {y.dtype} on {y.device}, strides "
            f"{y.stride()}"
        )
    width = y.shape[1]
    out = torch.empty(rows, width, dtype=y.dtype)
    call(y.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, j, width)
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y, weight)
        return _moe_combine(y, weight)

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

"""The short causal convolution on the CPU, with its per-slot state."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind
from kernels.layout import CONV_TAPS, Segments

_FORWARD = {
    torch.float32: bind("short_conv_f32", "pippppipipi"),
    torch.bfloat16: bind("short_conv_bf16", "pippppipipi"),
}
_BACKWARD = bind("short_conv_backward", "pppipppi")


def short_conv(x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if state is not None:
            raise ValueError("short_conv: with state there is no gradient; call it under torch.no_grad()")
        out: Tensor = _ShortConv.apply(x, weight, segments)
        return out
    return _forward(x, weight, segments, state)


def _forward(x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None) -> Tensor:
    if x.dim() != 2 or x.shape[0] != segments.rows:
        raise ValueError(f"short_conv: x is {tuple(x.shape)}, not [{segments.rows}, C]")
    if not segments.slot.is_cpu:
        raise ValueError(f"short_conv: segments are on {segments.slot.device}, not on the CPU")
    rows, width = x.shape
    call = _FORWARD.get(x.dtype)
    if call is None or not x.is_cpu or (x.stride(1) != 1 and width > 1):
        raise ValueError(
            f"short_conv: x must be float32 or bfloat16 on the CPU with adjacent columns; it is {x.dtype} on "
            f"{x.device}, strides {x.stride()}"
        )
    if (
        weight.shape != (width, CONV_TAPS)
        or weight.dtype != torch.float32
        or not weight.is_contiguous()
        or not weight.is_cpu
    ):
        raise ValueError(
            f"short_conv: weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}, not contiguous CPU "
            f"float32 [{width}, {CONV_TAPS}]"
        )
    slots = 0
    if state is not None:
        fits = state.dim() == 3 and state.shape[1:] == (CONV_TAPS - 1, width) and state.dtype == x.dtype
        if not fits or not state.is_contiguous() or not state.is_cpu:
            raise ValueError(
                f"short_conv: state is {state.dtype} {tuple(state.shape)} on {state.device}, not contiguous CPU "
                f"{x.dtype} [slots, {CONV_TAPS - 1}, {width}]"
            )
        slots = state.shape[0]
    out = torch.empty(rows, width, dtype=x.dtype)
    bad = call(
        x.data_ptr(), x.stride(0), weight.data_ptr(), segments.slot.data_ptr(), segments.start.data_ptr(),
        segments.offset.data_ptr(), segments.slot.shape[0], None if state is None else state.data_ptr(), slots,
        out.data_ptr(), width,
    )  # fmt: skip
    if bad:
        slot, start = int(segments.slot[bad - 1]), int(segments.start[bad - 1])
        why = f"starts at {start}, but there is no state" if state is None else f"has slot {slot} of {slots}"
        raise ValueError(f"short_conv: segment {bad - 1} {why}")
    return out


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, segments):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.segments = segments
        return _forward(x, weight, segments, None)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, weight), segments = ctx.saved_tensors, ctx.segments
        wide, grad = x.float().contiguous(), grad.float().contiguous()
        need_x, need_weight, _ = ctx.needs_input_grad
        dx = torch.empty_like(wide) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        _BACKWARD(
            wide.data_ptr(), weight.data_ptr(), segments.offset.data_ptr(), segments.slot.shape[0], grad.data_ptr(),
            None if dx is None else dx.data_ptr(), None if dweight is None else dweight.data_ptr(), x.shape[1],
        )  # fmt: skip
        return None if dx is None else dx.to(x.dtype), dweight, None

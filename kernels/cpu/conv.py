"""The short causal convolution on the CPU, with the state it keeps for each slot."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.sequences import check_short_conv, no_gradient_with_state, no_such_state
from kernels.cpu.library import bind
from kernels.layout import Segments

_FORWARD = {
    torch.float32: bind("short_conv_f32", "pippppipipi"),
    torch.bfloat16: bind("short_conv_bf16", "pippppipipi"),
}
_BACKWARD = bind("short_conv_backward", "pppipppi")


def short_conv(
    x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None, addend: Tensor | None = None
) -> Tensor:
    if addend is None:
        return _convolved(x, weight, segments, state)
    if addend.shape != x.shape or addend.dtype is not x.dtype or not addend.is_cpu:
        check_short_conv(x, weight, segments, state, addend)
        check_device("short_conv", "cpu", "cpu", addend=addend)
    if torch.is_grad_enabled() and state is not None and addend.requires_grad:
        raise no_gradient_with_state()
    return addend + _convolved(x, weight, segments, state)


def _convolved(x: Tensor, weight: Tensor, segments: Segments, state: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if state is not None:
            raise no_gradient_with_state()
        out: Tensor = _ShortConv.apply(x, weight, segments)
        return out
    (rows, width), stride, dtype = check_short_conv(x, weight, segments, state)
    slot = segments.slot
    if not (x.is_cpu and weight.is_cpu and slot.is_cpu and (state is None or state.is_cpu)):
        check_device("short_conv", "cpu", "cpu", x=x, weight=weight, segments=slot, state=state)
    y = torch.empty(rows, width, dtype=dtype)
    bad = _FORWARD[dtype](
        x.data_ptr(), stride[0], weight.data_ptr(), slot.data_ptr(), segments.start.data_ptr(),
        segments.offset.data_ptr(), slot.shape[0], 0 if state is None else state.data_ptr(),
        0 if state is None else state.shape[0], y.data_ptr(), width,
    )  # fmt: skip
    if bad:
        raise no_such_state(segments, bad - 1, state)
    return y


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, segments):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.segments = segments
        return _convolved(x, weight, segments, None)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x, weight), segments = ctx.saved_tensors, ctx.segments
        wide, grad = x.float().contiguous(), grad.float().contiguous()
        need_x, need_weight, _ = ctx.needs_input_grad
        dx = torch.empty_like(wide) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        _BACKWARD(
            wide.data_ptr(), weight.data_ptr(), segments.offset.data_ptr(), segments.slot.shape[0], grad.data_ptr(),
            0 if dx is None else dx.data_ptr(), 0 if dweight is None else dweight.data_ptr(), x.shape[1],
        )  # fmt: skip
        return None if dx is None else dx.to(x.dtype), dweight, None

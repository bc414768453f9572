"""RMS norm on the CPU. Squares are summed in 16 lanes joined by one fixed tree, whatever the instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.rows import check_rms_norm
from kernels.cpu.library import bind

_FORWARD = {torch.float32: bind("rms_norm_f32", "piiipfpii"), torch.bfloat16: bind("rms_norm_bf16", "piiipfpii")}
_BACKWARD = bind("rms_norm_backward", "ppfppppii")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RmsNorm.apply(x, weight, eps)
        return out
    shape, stride, dtype = check_rms_norm(x, weight)
    if not (x.is_cpu and weight.is_cpu):
        check_device("rms_norm", "cpu", "cpu", x=x, weight=weight)
    y = torch.empty(*shape, dtype=dtype)  # a torch.Size in place of integers costs 2 µs
    inner = shape[1] if len(shape) == 3 else 1
    _FORWARD[dtype](
        x.data_ptr(), stride[0], inner, stride[1], weight.data_ptr(), eps, y.data_ptr(), shape[0] * inner, shape[-1]
    )  # fmt: skip
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        wide, scale, grad = x.float().contiguous(), weight.float(), grad.float().contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        n = x.shape[-1]
        rows = wide.numel() // n
        dx = torch.empty_like(wide) if need_x else None
        dweight = torch.empty(n) if need_weight else None
        inverse = torch.empty(rows)
        _BACKWARD(
            wide.data_ptr(), scale.data_ptr(), ctx.eps, grad.data_ptr(), 0 if dx is None else dx.data_ptr(),
            0 if dweight is None else dweight.data_ptr(), inverse.data_ptr(), rows, n,
        )  # fmt: skip
        return None if dx is None else dx.to(x.dtype), None if dweight is None else dweight.to(weight.dtype), None

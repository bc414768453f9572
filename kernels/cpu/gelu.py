"""GELU on the CPU; native/gelu.cpp has the arithmetic and its error."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.rows import check_gelu
from kernels.cpu.library import bind

_GELU = {torch.float32: bind("gelu_f32", "pipii"), torch.bfloat16: bind("gelu_bf16", "pipii")}
_BACKWARD = bind("gelu_backward", "pippii")


def gelu(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Gelu.apply(x)
        return out
    shape, stride, dtype = check_gelu(x)
    if not x.is_cpu:
        check_device("gelu", "cpu", "cpu", x=x)
    y = torch.empty(shape, dtype=dtype)
    _GELU[dtype](x.data_ptr(), stride[0], y.data_ptr(), *shape)
    return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return gelu(x)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        wide, grad = x.float(), grad.float().contiguous()
        dx = torch.empty(x.shape)
        _BACKWARD(wide.data_ptr(), wide.stride(0), grad.data_ptr(), dx.data_ptr(), *x.shape)
        return dx.to(x.dtype)

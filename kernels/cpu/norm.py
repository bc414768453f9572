"""RMS norm on the CPU. The sum of squares runs on 16 virtual lanes and one fixed tree, on every instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind

_FORWARD = {torch.float32: bind("rms_norm_f32", "piiipfpii"), torch.bfloat16: bind("rms_norm_bf16", "piiipfpii")}
_BACKWARD = bind("rms_norm_backward", "ppfppppii")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Also takes x [T, H, D] (heads of a fused projection, no copy needed) -> [T, H, D]."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RmsNorm.apply(x, weight, eps)
        return out
    return _forward(x, weight, eps)


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    shape = x.shape
    n = shape[-1] if shape else 0
    if len(shape) not in (2, 3) or n == 0 or weight.shape != (n,):
        raise ValueError(f"rms_norm: x is {tuple(shape)}, weight {tuple(weight.shape)}; need [T, D] or [T, H, D], [D]")
    call = _FORWARD.get(x.dtype)
    stride = x.stride()
    if call is None or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"rms_norm: x is {x.dtype}, weight {weight.dtype}; need the same, float32 or bfloat16")
    if not x.is_cpu or not weight.is_cpu or (stride[-1] != 1 and n > 1):
        raise ValueError(f"rms_norm: x must be a CPU tensor with adjacent columns; on {x.device}, strides {stride}")
    out = torch.empty(*shape, dtype=x.dtype)  # a torch.Size in place of integers costs 2 µs
    inner = shape[1] if len(shape) == 3 else 1
    call(
        x.data_ptr(), stride[0], inner, stride[1], weight.data_ptr(), eps, out.data_ptr(), shape[0] * inner, n
    )  # fmt: skip
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

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

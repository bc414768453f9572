"""Sums over whole tensors and AdamW's update on the CPU; the order of every sum is stated in native/optimizer.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.updates import check_adamw, check_dot
from kernels.cpu.library import bind
from kernels.layout import AdamWStep

BLOCK = 4096  # elements summed at a time; the same number is in native/optimizer.cpp

_DOT = bind("dot_f32", "ppipp")
_ADAMW = bind("adamw_f32", "ppppifffffff")


def dot(a: Tensor, b: Tensor) -> Tensor:
    check_dot(a, b)
    check_device("dot", "cpu", "cpu", a=a, b=b)
    partial, out = torch.empty(-(-a.numel() // BLOCK), dtype=torch.float64), torch.empty((), dtype=torch.float64)
    _DOT(a.data_ptr(), b.data_ptr(), a.numel(), partial.data_ptr(), out.data_ptr())
    return out


def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: AdamWStep) -> None:
    check_adamw(parameter, gradient, first, second)
    check_device("adamw", "cpu", "cpu", parameter=parameter, gradient=gradient, first=first, second=second)
    _ADAMW(
        parameter.data_ptr(), gradient.data_ptr(), first.data_ptr(), second.data_ptr(), parameter.numel(), step.keep,
        step.new1, step.old2, step.new2, step.rate, step.root, step.eps,
    )  # fmt: skip

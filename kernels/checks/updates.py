"""Checks of `dot` and `adamw`."""

from __future__ import annotations

import torch
from torch import Tensor


def check_dot(a: Tensor, b: Tensor) -> None:
    """a, b fp32, contiguous, equally many elements."""
    for name, x in (("a", a), ("b", b)):
        if x.dtype is not torch.float32 or not x.is_contiguous():
            raise ValueError(f"dot: {name} is {x.dtype}, strides {x.stride()}; need contiguous float32")
    if a.numel() != b.numel():
        raise ValueError(f"dot: a has {a.numel()} elements, b {b.numel()}")


def check_adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> None:
    """All fp32, contiguous, equally many elements."""
    parts = (("parameter", parameter), ("gradient", gradient), ("first", first), ("second", second))
    for name, x in parts:
        if x.dtype is not torch.float32 or not x.is_contiguous() or x.numel() != parameter.numel():
            raise ValueError(
                f"adamw: {name} is {x.dtype}, {x.numel()} elements, strides {x.stride()}; need contiguous float32 of "
                f"{parameter.numel()} elements"
            )

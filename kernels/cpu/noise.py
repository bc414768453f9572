"""Normal noise by the native library; `kernels.reference.noise` defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind

_NORMAL = bind("normal_noise", "piip")


def normal(key: Tensor, count: int) -> Tensor:
    """key int64 [N], contiguous -> fp32 [N, count]."""
    out = torch.empty(len(key), count)
    _NORMAL(key.data_ptr(), len(key), count, out.data_ptr())
    return out

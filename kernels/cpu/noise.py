"""Normal noise by the native library; `kernels.reference.noise` defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind

_ROWS = bind("normal_rows", "piip")
_WORDS = bind("vec_normal", "ppi")


def normal(key: Tensor, count: int) -> Tensor:
    """key int64 [N], contiguous -> fp32 [N, count]."""
    out = torch.empty(key.shape[0], count)
    _ROWS(key.data_ptr(), key.shape[0], count, out.data_ptr())
    return out


def of_words(word: Tensor) -> Tensor:
    """The numbers of given hashes before they are rounded, fp64 of the shape of ``word``, int64 and contiguous; for
    tests and the self-check."""
    out = torch.empty(word.shape, dtype=torch.float64)
    _WORDS(word.data_ptr(), out.data_ptr(), word.numel())
    return out

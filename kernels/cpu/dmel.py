"""dMel codes by the native library; `kernels.reference.dmel` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind
from kernels.layout import DMelTables

_TRANSFORM = bind("dmel_codes", "piiiippppiipipp")


def transform(samples: Tensor, hop: int, tables: DMelTables) -> tuple[Tensor, Tensor]:
    """samples fp32 [S, 1600 + (n - 1) * hop], finite, contiguous -> (codes uint8, mel values fp64), each [S, n, C]."""
    (sessions, length), (channels, longest) = samples.shape, tables.weight.shape
    frames = (length - len(tables.window)) // hop + 1
    code = torch.empty(sessions, frames, channels, dtype=torch.uint8)
    mel = torch.empty(sessions, frames, channels, dtype=torch.float64)
    _TRANSFORM(
        samples.data_ptr(), sessions, length, frames, hop, tables.window.data_ptr(), tables.roots.data_ptr(),
        tables.first.data_ptr(), tables.weight.data_ptr(), channels, longest, tables.edges.data_ptr(),
        tables.edges.shape[0], code.data_ptr(), mel.data_ptr(),
    )  # fmt: skip
    return code, mel

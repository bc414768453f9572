"""Standard normal noise by counter, on the host, with equal bits on every machine.

Not an op of a backend: the noise is data, and a session's must be the same whoever computes it.
`kernels.reference.noise` defines it; the native library computes it faster and gives the same bits, whatever the
processor, the number of rows and threads, ``count`` and the active backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import dispatch
from kernels.reference import noise as reference_noise

COUNT_MAX = 2**24
"""The most numbers of a row; more is a mistake."""


def normal(key: Tensor, count: int) -> Tensor:
    """key int64 [N], the bits of uint64, on any device -> fp32 [N, count], standard normal, on that device.

    Element i of a row is a function of the row's key and of i alone, of 53 random bits: `kernels.reference.noise` says
    which. The greatest possible is 8.29. Raises ValueError where key is not such a tensor or count not an int in
    [0, 2^24]."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.dim() != 1 or key.is_meta:
        what = f"{key.dtype} {list(key.shape)} on {key.device}" if isinstance(key, Tensor) else type(key).__name__
        raise ValueError(f"key: expected an int64 tensor [N] with memory, got {what}")
    if type(count) is not int or not 0 <= count <= COUNT_MAX:
        raise ValueError(f"count: expected an int from 0 to {COUNT_MAX}, got {count!r}")
    make = reference_noise.normal if dispatch.backend().NAME == "reference" else _native()
    return make(key.detach().cpu().contiguous(), count).to(key.device)


@functools.cache
def _native() -> Callable[[Tensor, int], Tensor]:
    """The native library's noise; where there is no such library, as on a GPU's host that is no x86-64, the
    definition, with the same bits."""
    try:
        from kernels.cpu.noise import normal as native
    except RuntimeError:
        return reference_noise.normal
    return native

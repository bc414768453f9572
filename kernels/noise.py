"""Standard normal noise from counters, on the host, with equal bits on every machine.

Not an op of a backend: noise is data, as dMel codes are, and a session's must be the same whoever draws it.
`kernels.reference.noise` defines it; the native library draws it faster and gives the same bits, whatever the
processor, the number of rows in a call and the active backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import dispatch
from kernels.reference import noise as reference_noise


def normal(key: Tensor, count: int) -> Tensor:
    """key int64 [N] (bits of uint64), on the CPU -> fp32 [N, count], ``count`` numbers of the standard normal
    distribution for each key.

    Number i of a row comes from h = splitmix64(key + (i + 1) * 0x9E3779B97F4A7C15), the counter of
    `kernels.ops.sample`: with m = bits 11 to 62 of h and p = (m + 1/2) / 2^53, in (0, 1/2), it is Phi^-1(p) where the
    top bit of h is 0 and -Phi^-1(p) where it is 1, computed in fp64 and rounded once. Both tails are as precise as the
    middle and reach to 8.3. Raises ValueError for keys of another form and a negative count."""
    if key.dtype != torch.int64 or key.dim() != 1 or key.device.type != "cpu":
        raise ValueError(f"normal: key is {key.dtype} {list(key.shape)} on {key.device}, need int64 [N] on the CPU")
    if count < 0:
        raise ValueError(f"normal: count is {count}; it must be 0 or more")
    draw = reference_noise.normal if dispatch.backend().NAME == "reference" else _native()
    return draw(key.contiguous(), count)


@functools.cache
def _native() -> Callable[[Tensor, int], Tensor]:
    """The native library's; where there is no such library, as on a GPU's host that is no x86-64, the definition, with
    the same bits."""
    try:
        from kernels.cpu.noise import normal as draw
    except RuntimeError:
        return reference_noise.normal
    return draw

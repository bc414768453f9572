"""dMel codes: samples to mel values to codes, on the host, with equal bits on every machine.

Not an op of a backend: codes are data, and a session's must be the same whoever computes them. `kernels.reference.dmel`
defines them; the native library computes them faster and gives the same bits, whatever the processor, the number of
frames in a call and the active backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import dispatch
from kernels.layout import DMelTables
from kernels.reference import dmel as reference_dmel


def codes(samples: Tensor, hop: int, tables: DMelTables) -> tuple[Tensor, Tensor]:
    """samples fp32 [S, 1600 + (n - 1) * hop], one session a row, on any device -> (codes uint8 [S, n, C], mel values
    fp64 [S, n, C]), n frames of 1600 samples, ``hop`` samples apart.

    A mel value is sum_f weight[c, f] * sqrt(max(|X[f]|^2, 1e-10)), X the Fourier transform of the windowed frame; its
    code is the number of ``tables.edges`` that it reaches. Raises ValueError where a sample is NaN or infinite."""
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("dMel: the samples hold a NaN or infinity")
    host = samples.detach().cpu().contiguous()
    transform = reference_dmel.transform if dispatch.backend().NAME == "reference" else _native()
    code, mel = transform(host, hop, tables)
    return code.to(samples.device), mel.to(samples.device)


@functools.cache
def _native() -> Callable[[Tensor, int, DMelTables], tuple[Tensor, Tensor]]:
    """The native library's transform; where there is no such library, as on a GPU's host that is no x86-64, the
    definition, with the same bits."""
    try:
        from kernels.cpu.dmel import transform
    except RuntimeError:
        return reference_dmel.transform
    return transform

"""dMel's arithmetic: samples to mel values to codes, in fp64 and in one written order, on the host.

Not an op of a backend: codes are data, and a session's must be the same whoever computes them. `definition` says in
numpy what a code is; kernels/cpu/native/dmel.cpp does the same operations in the same order, so the two give equal bits
(tested, mel values included), and neither the processor, the number of frames in a call nor the backend shows.
Everything is one IEEE operation after another: no library's FFT, product, sum or root.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import dispatch
from kernels.fourier import real_fft

RADICES = (5, 5, 4, 4, 2)
"""Of the transform of half a window, 800 complex numbers. Native code has them as well."""
FLOOR = 1e-10
"""Smallest power of a bin, as in Inkling's extractor."""


@dataclass(frozen=True)
class Tables:
    """The transform's constants, fp64. C channels, L the longest filter."""

    window: Tensor  # [1600]
    roots: Tensor  # [1600, 2], e^(-2 pi i k / 1600)
    first: Tensor  # int64 [C], each filter's first bin, 1 ... 799
    weight: Tensor  # [C, L], of a filter's bins from its first on, 0 after its last
    edges: Tensor  # [B - 1] ascending: a mel value's code is the number of edges that it reaches


def codes(samples: Tensor, hop: int, tables: Tables) -> tuple[Tensor, Tensor]:
    """samples fp32 [S, 1600 + (n - 1) * hop] -> (codes uint8 [S, n, C], mel values fp64 [S, n, C]).

    Raises ValueError where a sample is NaN or infinite."""
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("dMel: the samples hold a NaN or infinity")
    host = samples.detach().cpu().contiguous()
    code, mel = (definition if dispatch.backend().NAME == "reference" else _native())(host, hop, tables)
    return code.to(samples.device), mel.to(samples.device)


@functools.cache
def _native() -> Callable[[Tensor, int, Tables], tuple[Tensor, Tensor]]:
    """The native library's, or the definition where there is none, as on a GPU's host that is no x86-64: same bits."""
    try:
        from kernels.cpu.dmel import transform
    except RuntimeError:
        return definition
    return transform


def definition(samples: Tensor, hop: int, tables: Tables) -> tuple[Tensor, Tensor]:
    """As `codes`, of finite samples."""
    frames = samples.numpy()
    frames = np.lib.stride_tricks.sliding_window_view(frames, len(tables.window), 1)[:, ::hop]  # [S, n, 1600]
    shape, columns = frames.shape[:2], frames.reshape(-1, len(tables.window)).T.astype(np.float64)
    re, im = real_fft(columns * tables.window.numpy()[:, None], RADICES, tables.roots.numpy())
    magnitude = np.sqrt(np.maximum(re * re + im * im, FLOOR))  # of bins 1 ... 799
    first, weight = tables.first.numpy(), tables.weight.numpy()
    channels, longest = weight.shape
    magnitude = np.concatenate((magnitude, np.zeros((longest, magnitude.shape[1]))))
    mel = np.zeros((channels, magnitude.shape[1]))
    for j in range(longest):  # each filter's bins in ascending order; + 0 changes nothing
        mel = mel + weight[:, j : j + 1] * magnitude[first - 1 + j]
    code = np.zeros(mel.shape, np.uint8)
    for edge in tables.edges.tolist():
        code += mel >= edge
    sessions, count = shape
    rows = [torch.from_numpy(np.ascontiguousarray(x.T)).view(sessions, count, channels) for x in (code, mel)]
    return rows[0], rows[1]

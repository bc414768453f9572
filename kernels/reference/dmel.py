"""The definition of a dMel code, in numpy: fp64 operations in one written order.

kernels/cpu/native/dmel.cpp makes the same operations in the same order, so that the two give equal bits (tested, mel
values included). No library's FFT, product, sum or root is called.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.fourier import real_fft
from kernels.layout import DMelTables

RADICES = (5, 5, 4, 4, 2)
"""Radices of the Fourier transform of 800 complex numbers, half a window. The native code has the same."""
FLOOR = 1e-10
"""The least power of a frequency bin, as in Inkling's feature extractor."""


def transform(samples: Tensor, hop: int, tables: DMelTables) -> tuple[Tensor, Tensor]:
    """As `kernels.dmel.codes`, of finite samples on the CPU."""
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

"""How loud a chunk of sound is, and the same chunk louder or softer.

Levels are what a scorer of loudness compares, so they have the same bits on every machine, as `model.voice.mel` has."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import exact
from model.senses.audio import mel_filters
from model.voice.mel import FLOOR, FRAMES, LENGTH, WINDOW, log_mels
from model.voice.scale import MEAN, STD

FARTHEST = 300.0
"""Largest and smallest natural logarithm of a magnitude that is told from others: a head that is badly trained may ask
for more, and e to twice as much is still a number."""


@functools.cache
def _band_power() -> NDArray[np.float64]:
    """[80]: what a band's squared magnitude stands for in a frame's mean square.

    The sum of the squares of all bins is LENGTH times that of the windowed samples, whose weights' squares (Hann) add
    up to 3/8 WINDOW. A band's magnitude is a sum over bins with weights of sum a and peak p: its squared mean
    magnitude, (magnitude / a)^2, holds for a / p bins, and as many at negative frequencies."""
    weight = mel_filters(LENGTH)[1].numpy()
    area, peak = exact.total(weight), weight.max(1)
    return np.asarray(2.0 / (area * peak) / (LENGTH * 0.375 * WINDOW))


def loudness_db(chunk: Tensor) -> float:
    """Level of a chunk fp32 [20, 80], in dB of full scale: that of its mean square. Within 2 dB of the sound's own;
    that of silence is near -80. Raises MelError as `log_mels` does."""
    logs = np.clip(log_mels(chunk[None])[0], -FARTHEST, FARTHEST)
    squares = exact.exp_of(2.0 * logs) * _band_power()
    power = exact.total(exact.total(squares)) / FRAMES
    return float(exact.ln_of(np.asarray(power)[None])[0]) * (10.0 / exact.ln(10.0))


def louder(chunks: Tensor, db: float) -> Tensor:
    """Chunks fp32 [N, 20, 80] or [20, 80] with a gain in dB. What would be below the floor is at the floor. Raises
    MelError as `log_mels` does."""
    shape = chunks.shape
    logs = log_mels(chunks[None] if chunks.ndim == 2 else chunks) + db * (exact.ln(10.0) / 20.0)
    z = (np.maximum(logs, exact.ln(FLOOR)) - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(z.astype(np.float32)).view(shape)

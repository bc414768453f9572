"""The voice's mel front end: sound to chunks of 20 frames of 80 mel bands, and a chunk to the dMel codes by which the
model hears itself.

16 kHz; a frame every 160 samples (10 ms) over the 640 samples (40 ms) that end with its own last one, weighted by a
periodic Hann window; magnitudes of a Fourier transform of 1024; Slaney's mel bands 0 to 8000 Hz; natural logarithm,
floored at 1e-4; per band, minus `model.voice.scale.MEAN` and divided by `STD`. 480 zeros stand before the first sample,
so a chunk uses nothing after its own 3200 samples, and streaming gives the bits of the whole.

Targets decide what the voice learns, and so the weights' digests. The arithmetic is therefore fp64 + - * / and square
roots in a written order, with constants that are correctly rounded (`kernels.exact`, `kernels.fourier`): every machine
gives the same bits. 2 ms a chunk on one core.

1024 instead of 640 points, zeros behind the window: the narrowest bands are 74 Hz wide, which 25 Hz bins sample with
three points only, in a comb that changes from band to band.

This module knows nothing of words, sessions or the flow head; `model.voice.sound` is the way back to sound.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import exact
from kernels.errors import MetronomeError
from kernels.fourier import real_fft
from model.config import MEL_BINS, MEL_CHANNELS
from model.senses.audio import LOG10_MAX, LOG10_MIN, LOUDEST, SAMPLE_RATE_HZ, mel_filters
from model.voice.scale import MEAN, STD

HOP = 160  # samples from one frame to the next: 10 ms
WINDOW = 640  # samples of a frame: 40 ms
LENGTH = 1024  # of the Fourier transform: the window, then zeros
RADICES = (4, 4, 4, 4, 2)  # of 512 complex numbers, half of it
FRAMES = 20  # a chunk
CHUNK_SAMPLES = FRAMES * HOP  # 200 ms
BEFORE = WINDOW - HOP  # samples that a chunk needs from before its first
FLOOR = 1e-4
"""The least magnitude of a band; a full-scale tone has about 10."""
HOPS_PER_CODE = 5  # frames of 10 ms to one of dMel's 50 ms
LOUDER = 1.05
"""ln of how much larger the magnitude of dMel's frame of 100 ms is than the geometric mean of five frames of 40 ms:
1.56 for a steady tone (the ratio of the transforms' bins), 2.47 for noise. The median over the shipped recordings, all
bands."""


class MelError(MetronomeError):
    """Sound or a chunk that is none: the message says what is wrong and where."""


@dataclass(frozen=True)
class _Tables:
    hann: NDArray[np.float64]  # [640]
    roots: NDArray[np.float64]  # [1024, 2]
    first: NDArray[np.int64]  # [80], first bin of a band
    weight: NDArray[np.float64]  # [80, longest]
    code_edges: NDArray[np.float64]  # [15], natural logarithms of dMel's edges, less `LOUDER`


@functools.cache
def _tables() -> _Tables:
    hann = 0.5 - 0.5 * exact.roots_of_unity(WINDOW, WINDOW)[:, 0]
    first, weight = (part.numpy() for part in mel_filters(LENGTH))
    step = (LOG10_MAX - LOG10_MIN) / (MEL_BINS - 1)
    log10_edges = LOG10_MIN + step * (np.arange(1, MEL_BINS, dtype=np.float64) - 0.5)
    return _Tables(hann, exact.roots_of_unity(LENGTH, LENGTH), first, weight, log10_edges * exact.ln(10) - LOUDER)


def mel_chunks(samples: Tensor) -> Tensor:
    """A whole sound: samples fp32 [n] at 16 kHz -> chunks fp32 [N, 20, 80], normalised; zeros fill the last chunk.

    Raises MelError for no samples, another type or shape, and as `stream_chunks` does."""
    if samples.ndim != 1 or samples.dtype != torch.float32 or not len(samples):
        raise MelError(
            f"voice: sound is {list(samples.shape)} of {samples.dtype}: give float32 [samples] at {SAMPLE_RATE_HZ} Hz"
        )
    return stream_chunks(torch.nn.functional.pad(samples, (BEFORE, -len(samples) % CHUNK_SAMPLES)))


def stream_chunks(samples: Tensor) -> Tensor:
    """Streaming: samples fp32 [480 + N * 3200], the first 480 being the last before the first chunk (zeros at the
    start) -> chunks fp32 [N, 20, 80], normalised. The caller keeps the last 480 samples.

    Raises MelError for another type or length, and for samples that are no numbers or no sound (`LOUDEST`)."""
    count = len(samples) - BEFORE
    if samples.ndim != 1 or samples.dtype != torch.float32 or count <= 0 or count % CHUNK_SAMPLES:
        raise MelError(
            f"voice: samples are {list(samples.shape)} of {samples.dtype}: give float32, {BEFORE} samples from before "
            f"and whole chunks of {CHUNK_SAMPLES}"
        )
    sound = samples.detach().cpu().numpy()
    if wrong := np.flatnonzero(~(np.abs(sound) <= LOUDEST)).tolist():
        raise MelError(
            f"voice: sample {wrong[0] - BEFORE} is {sound[wrong[0]]}, which is no sound (full scale is 1): "
            "scale it to -1 … 1"
        )
    z = (log_magnitudes(sound) - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(z.astype(np.float32)).view(-1, FRAMES, MEL_CHANNELS)


def log_magnitudes(sound: NDArray[np.float32]) -> NDArray[np.float64]:
    """Before the normalisation: finite samples [480 + n * 160] -> natural logarithms of the bands' magnitudes, floored
    [n, 80]."""
    tables = _tables()
    frames = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::HOP]
    columns = np.zeros((LENGTH, len(frames)))
    columns[:WINDOW] = frames.T.astype(np.float64) * tables.hann[:, None]
    re, im = real_fft(columns, RADICES, tables.roots)
    magnitude = np.sqrt(re * re + im * im)  # of bins 1 ... 511
    longest = tables.weight.shape[1]
    magnitude = np.concatenate((magnitude, np.zeros((longest, len(frames)))))
    mel = np.zeros((MEL_CHANNELS, len(frames)))
    for j in range(longest):  # each band's bins in ascending order; + 0 changes nothing
        mel = mel + tables.weight[:, j : j + 1] * magnitude[tables.first - 1 + j]
    return exact.ln_of(np.maximum(mel.T, FLOOR))


def log_mels(chunks: Tensor) -> NDArray[np.float64]:
    """Chunks without their normalisation: [N, 20, 80] -> natural logarithms of magnitudes, fp64 [N, 20, 80].

    Raises MelError for another type or shape, and for values that are no numbers."""
    if chunks.ndim != 3 or chunks.shape[1:] != (FRAMES, MEL_CHANNELS) or chunks.dtype != torch.float32:
        raise MelError(
            f"voice: chunks are {list(chunks.shape)} of {chunks.dtype}: give float32 [N, {FRAMES}, {MEL_CHANNELS}]"
        )
    z = chunks.detach().cpu().numpy()
    if wrong := np.argwhere(~np.isfinite(z)).tolist():
        n, frame, band = wrong[0]
        raise MelError(
            f"voice: chunk {n}, frame {frame}, band {band} is {z[n, frame, band]}, which is no number: the weights or "
            "the chain that made it are damaged"
        )
    return z.astype(np.float64) * np.array(STD) + np.array(MEAN)


def self_codes(chunks: Tensor) -> Tensor:
    """The dMel codes by which the model hears what it said: chunks fp32 [N, 20, 80] -> uint8 [N, 4, 80].

    Straight from the chunk, not from sound: the mean of five frames' logarithms, plus `LOUDER`, compared with dMel's
    edges. Only + * and comparisons of fp64 elements, so its bits are the same everywhere. Its frames are centred 10 ms
    after dMel's. On the shipped recordings 95 % of the codes are within one bin (0.6 in log10) of the true ones and
    69 % are equal (measured by `tests/rollout/test_mel_scale.py`). Most of the others are perfect silence, code 0,
    which is code 5 here because of `FLOOR`.

    Raises MelError as `log_mels` does."""
    frames = log_mels(chunks).reshape(-1, FRAMES // HOPS_PER_CODE, HOPS_PER_CODE, MEL_CHANNELS)
    level = np.zeros((*frames.shape[:2], MEL_CHANNELS))
    for j in range(HOPS_PER_CODE):
        level = level + frames[:, :, j]
    level = level / HOPS_PER_CODE
    codes = np.zeros(level.shape, np.uint8)
    for edge in _tables().code_edges.tolist():
        codes += level >= edge
    return torch.from_numpy(codes)

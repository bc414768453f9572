"""Mel chunks to sound: Griffin-Lim, of a whole utterance or streamed chunk by chunk.

Griffin and Lim 1984 (Signal estimation from modified short-time Fourier transform), with the momentum of Perraudin,
Balazs and Søndergaard 2013. Streaming is the same iteration over the newest chunk and the 480 samples before it, while
all that has been heard stays as it is (RTISI: Beauregard, Zhu and Wyse 2005): each chunk's phases continue the last
one's, so there is no click between them. A frame lasts 40 ms and the next ones change it, so sound leaves 30 ms after
its chunk (`LATENCY_SAMPLES`); what is left at the end fades out under the windows' own slopes.

Written over scipy's FFT: scipy and transformers have no Griffin-Lim, librosa's and torchaudio's take a whole utterance
and can hold nothing fixed, and the loop is ten lines.

What is heard decides no target and no log-probability, so a library's FFT may be used here. Where a reward listens to
it (a recogniser's), that reward is the same on every machine only as far as scipy's is.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import MEL_CHANNELS
from model.senses.audio import mel_filters
from model.voice.mel import BEFORE, CHUNK_SAMPLES, FLOOR, FRAMES, HOP, LENGTH, WINDOW, log_mels

LATENCY_SAMPLES = BEFORE
"""Sound of a chunk that leaves with the next one: 480 samples, 30 ms."""
ITERATIONS = 32
MOMENTUM = 0.99
LOUDEST_LOG = 6.0
"""The largest natural logarithm of a magnitude that is made to sound, as a full-scale square wave's; a head that is
badly trained may ask for more."""
_OVERLAP = 1.5  # sum of the squared windows over a sample
_FITS = 12  # steps from bands to bins

Array = NDArray[np.float32]
Spectrum = NDArray[np.complex64]


@functools.cache
def _window() -> Array:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@functools.cache
def _filters() -> Array:
    """Mel filters as a matrix [80, 513]."""
    first, weight = (part.numpy() for part in mel_filters(LENGTH))
    filters = np.zeros((MEL_CHANNELS, LENGTH // 2 + 1 + weight.shape[1]), np.float32)
    for band in range(MEL_CHANNELS):
        filters[band, first[band] : first[band] + weight.shape[1]] = weight[band]
    return filters[:, : LENGTH // 2 + 1]


def magnitudes(chunks: Tensor) -> Array:
    """Chunks fp32 [N, 20, 80] -> magnitudes of the Fourier transform's bins [N * 20, 513], not negative, whose mels are
    close to the chunk's: multiplicative steps (Richardson 1972, Lucy 1974), which keep them so. Raises MelError as
    `model.voice.mel.log_mels` does."""
    logs = np.minimum(log_mels(chunks).reshape(-1, MEL_CHANNELS), LOUDEST_LOG)
    audible = logs > np.log(FLOOR) + 1e-3  # chunks are fp32: the floor is rounded
    mel = np.where(audible, np.exp(logs), 0).astype(np.float32)
    filters = _filters()
    share = filters / np.maximum(filters.sum(0), 1e-9)  # [80, 513]: each bin's bands
    size = (mel / filters.sum(1)) @ share
    for _ in range(_FITS):
        size *= (mel / np.maximum(size @ filters.T, 1e-9)) @ share
    return size


def render(chunks: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """A whole utterance: chunks fp32 [N, 20, 80] -> sound fp32 [N * 3200], sample for sample where the chunks' mels
    were; not limited to full scale. Raises MelError as `magnitudes` does."""
    size = magnitudes(chunks)
    phases = _random_phases(np.random.default_rng(0), len(size))
    sound, _ = _invert(size, phases, np.zeros(BEFORE, np.float32), iterations)
    return torch.from_numpy(sound[BEFORE:].copy())


class Speaker:
    """A voice that is heard while it is made; owns the phases and samples of the last frames.

    `append` is called once a micro-turn: with a chunk where the voice speaks, with None where it is silent or was
    interrupted. Example: chunks a, b, None give 30 ms of silence, a, b without a seam, the last 30 ms fading out, and
    silence."""

    def __init__(self, iterations: int = ITERATIONS) -> None:
        self._iterations = iterations
        self._rest()

    def _rest(self) -> None:
        self._random = np.random.default_rng(0)
        self._heard = np.zeros(BEFORE, np.float32)  # the last samples that left
        self._tail = np.zeros(LATENCY_SAMPLES, np.float32)  # the next ones, as far as the frames so far make them
        self._size = np.zeros((BEFORE // HOP, LENGTH // 2 + 1), np.float32)  # of the frames that reach into them
        self._phases = np.zeros(self._size.shape, np.complex64)

    def append(self, chunk: Tensor | None) -> Tensor:
        """A chunk fp32 [20, 80], or None for silence -> the micro-turn's sound, fp32 [3200], which lags the chunk by
        `LATENCY_SAMPLES`; not limited to full scale. Raises MelError as `magnitudes` does, and keeps what it had."""
        if chunk is None:
            sound = np.concatenate((self._tail, np.zeros(CHUNK_SAMPLES - LATENCY_SAMPLES, np.float32)))
            self._rest()
            return torch.from_numpy(sound)
        size = np.concatenate((self._size, magnitudes(chunk[None])))
        phases = np.concatenate((self._phases, _random_phases(self._random, FRAMES)))
        sound, phases = _invert(size, phases, self._heard, self._iterations)
        sound = sound[BEFORE:]
        self._heard, self._tail = sound[CHUNK_SAMPLES - BEFORE : CHUNK_SAMPLES], sound[CHUNK_SAMPLES:]
        self._size, self._phases = size[FRAMES:], phases[FRAMES:]
        return torch.from_numpy(sound[:CHUNK_SAMPLES].copy())


def _invert(size: Array, phases: Spectrum, heard: Array, iterations: int) -> tuple[Array, Spectrum]:
    """Griffin-Lim: magnitudes and first phases of F frames [F, 513] -> (sound [480 + F * 160] that starts with the 480
    samples ``heard``, phases). Its last 480 samples have not all their windows and fade out."""
    last: Spectrum | float = 0.0
    for _ in range(iterations):
        spectrum = scipy.fft.rfft(_frames(_overlap_add(size * phases, heard)) * _window(), LENGTH, axis=-1)
        ahead = spectrum + np.float32(MOMENTUM) * (spectrum - last)
        phases, last = ahead / np.maximum(np.abs(ahead), np.float32(1e-9)), spectrum
    return _overlap_add(size * phases, heard), phases


def _frames(sound: Array) -> Array:
    """[480 + F * 160] -> [F, 640]."""
    return np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::HOP]


def _overlap_add(spectrum: Spectrum, heard: Array) -> Array:
    """[F, 513] -> [480 + F * 160], its first 480 samples replaced by ``heard``."""
    frames, count = scipy.fft.irfft(spectrum, LENGTH, axis=-1)[:, :WINDOW] * _window(), WINDOW // HOP
    parts = frames.reshape(-1, count, HOP)
    sound = np.zeros((len(parts) + count - 1, HOP), np.float32)
    for j in range(count):
        sound[j : j + len(parts)] += parts[:, j]
    sound /= np.float32(_OVERLAP)
    flat = sound.reshape(-1)
    flat[:BEFORE] = heard
    return flat


def _random_phases(random: np.random.Generator, frames: int) -> Spectrum:
    return np.exp(2j * np.pi * random.random((frames, LENGTH // 2 + 1))).astype(np.complex64)

"""What the simulated user's microphone hears: clips laid on a noise track, cut into chunks.

Randomness comes from `generator` alone: Philox keyed by a digest of names, never a global generator. Noise is made
once a process for each kind and split, long enough that scenarios cut different stretches out of it; so a scenario
costs microseconds and the held-out noise is never heard in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from model.audio import SAMPLE_RATE_HZ
from rollout.chunk import CHUNK_SAMPLES
from rollout.speech import Split


@dataclass(frozen=True)
class Noise:
    """A kind of background noise: coloured noise, or mains hum on a little of it, steady or swelling."""

    tilt: float = 0.0  # the spectrum's amplitude falls as frequency^-tilt: 0 white, 0.5 pink, 1 brown
    hum_hz: float | None = None  # fundamental of a hum
    swell_hz: tuple[float, float] | None = None  # two rates at which the loudness swells and falls


NOISES: dict[Split, dict[str, Noise]] = {
    "train": {
        "white": Noise(),
        "bright": Noise(tilt=-0.25),
        "soft": Noise(tilt=0.25),
        "pink": Noise(tilt=0.5),
        "dark": Noise(tilt=0.75),
        "hum_50hz": Noise(hum_hz=50.0),
        "hum_110hz": Noise(tilt=0.5, hum_hz=110.0),
        "waves": Noise(tilt=0.25, swell_hz=(0.17, 0.43)),
        "traffic": Noise(tilt=0.75, swell_hz=(0.23, 1.1)),
        "rumble": Noise(tilt=1.25),
    },
    "held_out": {
        "brown": Noise(tilt=1.0),
        "hum_60hz": Noise(hum_hz=60.0),
        "gusts": Noise(tilt=0.5, swell_hz=(0.31, 0.73)),
    },
}
_NOISE_SECONDS = 60


@dataclass(frozen=True)
class SoundConfig:
    """Loudness of speech and of background noise; each scenario draws from these ranges. Speech at gain 0 is -20
    dBFS."""

    gain_db: tuple[float, float] = (-8.0, 6.0)  # train
    snr_db: tuple[float, float] = (15.0, 45.0)  # train, speech over noise
    held_out_gain_db: tuple[float, float] = (-7.0, 5.0)
    held_out_snr_db: tuple[float, float] = (18.0, 40.0)
    start_s: tuple[float, float] = (0.1, 0.8)  # silence before the user's first word


def generator(*key: str | int) -> np.random.Generator:
    """A random generator that depends on ``key`` only: the same in every process, in any order of creation."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def seconds_to_samples(seconds: float) -> int:
    """Whole samples at 16 kHz."""
    return round(seconds * SAMPLE_RATE_HZ)


def amplitude(decibels: float) -> float:
    """Factor on samples of a gain in dB."""
    return float(10.0 ** (decibels / 20.0))


def background(rng: np.random.Generator, split: Split, rms: float, chunks: int) -> NDArray[np.float32]:
    """A stretch of one of the split's noises at level ``rms``: float32 [chunks * CHUNK_SAMPLES]."""
    kinds = NOISES[split]
    noise = _noise(list(kinds)[rng.integers(len(kinds))], split)
    samples = chunks * CHUNK_SAMPLES
    if samples > len(noise):
        noise = np.tile(noise, -(-samples // len(noise)) + 1)
    first = int(rng.integers(len(noise) - samples + 1))
    return noise[first : first + samples] * np.float32(rms)


@cache
def _noise(name: str, split: Split) -> NDArray[np.float32]:
    """One minute of noise at RMS 1. Coloured noise is white noise whose spectrum is divided by a power of frequency."""
    kind = NOISES[split][name]
    rng = generator("noise", split, name)
    samples = _NOISE_SECONDS * SAMPLE_RATE_HZ
    time_s = np.arange(samples) / SAMPLE_RATE_HZ
    noise = _coloured(rng.standard_normal(samples), kind.tilt)
    if kind.hum_hz is not None:
        noise = _hum(rng, time_s, kind.hum_hz) + 0.1 * noise
    if kind.swell_hz is not None:
        slow, fast = kind.swell_hz
        noise *= 1.0 + 0.5 * np.sin(2 * np.pi * slow * time_s) + 0.3 * np.sin(2 * np.pi * fast * time_s + 1.0)
    noise = (noise / np.sqrt(np.square(noise).mean())).astype(np.float32)
    noise.setflags(write=False)
    return noise


def _coloured(white: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    spectrum = np.fft.rfft(white)
    frequency_hz = np.fft.rfftfreq(len(white), 1 / SAMPLE_RATE_HZ)
    # Below 40 Hz nothing is audible, and brown noise would put all of its power there.
    shape = np.where(frequency_hz < 40.0, 0.0, np.maximum(frequency_hz, 40.0) ** -power)
    coloured = np.fft.irfft(spectrum * shape, len(white))
    return coloured / np.sqrt(np.square(coloured).mean())


def _hum(rng: np.random.Generator, time_s: NDArray[np.float64], mains_hz: float) -> NDArray[np.float64]:
    """Mains hum: the odd and even harmonics up to the sixth, falling as 1 / n, at random phases."""
    total = np.zeros_like(time_s)
    for n in range(1, 7):
        total += np.sin(2 * np.pi * (mains_hz * n * time_s + rng.random())) / n
    return total / np.sqrt(np.square(total).mean())


class Track:
    """The audio of one episode: background noise on which clips are laid while the episode runs."""

    def __init__(self, noise: NDArray[np.float32]) -> None:
        self._samples = noise.copy()  # [chunks * CHUNK_SAMPLES]

    def lay(self, clip: NDArray[np.float32], first: int, gain: float) -> None:
        """Adds a clip from sample ``first`` on; what would lie beyond the track's end is cut."""
        end = min(first + len(clip), len(self._samples))
        self._samples[first:end] += clip[: end - first] * np.float32(gain)

    def chunk(self, k: int) -> NDArray[np.float32]:
        """Chunk k, clipped to full scale as a microphone would: float32 [CHUNK_SAMPLES]."""
        return np.clip(self._samples[k * CHUNK_SAMPLES : (k + 1) * CHUNK_SAMPLES], -1.0, 1.0)

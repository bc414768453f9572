"""The audio of simulated users: recordings mixed into background noise.

Each kind of noise is generated once per process, as a long loop of which scenarios use different parts, so that a
scenario costs microseconds. Training and held-out scenarios have different kinds of noise. All randomness is from
`rollout.seeds.generator`.

Samples have the same bits on every machine: they are computed with random integers, our own Fourier transform and sums,
square roots and correctly rounded constants (`kernels.exact`), without functions of libm or a library's vector code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from kernels import exact, fourier
from model.program.ranges import Ascending, Range, SecondsPair
from model.senses.audio import SAMPLE_RATE_HZ
from rollout.seeds import generator
from rollout.turn.action import CHUNK_SAMPLES
from rollout.world.speech import Split


@dataclass(frozen=True)
class Noise:
    """A kind of background noise: coloured noise, with or without mains hum, of steady or varying loudness. Raises
    ValueError unless the tilt is a multiple of 1/4."""

    tilt: float = 0.0  # amplitude of the spectrum ~ frequency^-tilt: 0 white, 0.5 pink, 1 brown
    hum_hz: int | None = None  # fundamental frequency of the hum
    swells: tuple[int, int] | None = None  # loudness varies with two sines, of so many periods in `LOOP_SECONDS`

    def __post_init__(self) -> None:
        if not (4 * self.tilt).is_integer():
            raise ValueError(f"a noise's tilt must be a multiple of 1/4 (powers are square roots here): {self.tilt}")


NOISES: dict[Split, dict[str, Noise]] = {
    "train": {
        "white": Noise(),
        "bright": Noise(tilt=-0.25),
        "soft": Noise(tilt=0.25),
        "pink": Noise(tilt=0.5),
        "dark": Noise(tilt=0.75),
        "hum_50hz": Noise(hum_hz=50),
        "hum_110hz": Noise(tilt=0.5, hum_hz=110),
        "waves": Noise(tilt=0.25, swells=(5, 14)),
        "traffic": Noise(tilt=0.75, swells=(7, 35)),
        "rumble": Noise(tilt=1.25),
    },
    "held_out": {
        "brown": Noise(tilt=1.0),
        "hum_60hz": Noise(hum_hz=60),
        "gusts": Noise(tilt=0.5, swells=(10, 23)),
    },
}
LOOP_SECONDS = 32
"""Length of a noise. It is periodic, so it can be repeated without a click."""
_SAMPLES = LOOP_SECONDS * SAMPLE_RATE_HZ
_RADICES = (5, 5, 5, 4, 4, 4, 4, 4, 2)  # of the Fourier transform; their product is _SAMPLES / 2
_LOWEST_HZ = 40  # noise has no lower frequencies: they are inaudible, and would have most of brown noise's power


_Gain = Annotated[float, Range(-60.0, 20.0)]
_Snr = Annotated[float, Range(-20.0, 120.0)]
GainPair = Annotated[tuple[_Gain, _Gain], Ascending()]
SnrPair = Annotated[tuple[_Snr, _Snr], Ascending()]


@dataclass(frozen=True)
class SoundConfig:
    """Loudness of speech and of background noise; each scenario draws from these ranges. Speech at gain 0 is -20
    dBFS."""

    gain_db: GainPair = (-8.0, 6.0)  # train
    snr_db: SnrPair = (15.0, 45.0)  # train, speech over noise
    held_out_gain_db: GainPair = (-7.0, 5.0)
    held_out_snr_db: SnrPair = (18.0, 40.0)
    start_s: SecondsPair = (0.1, 0.8)  # silence before the user's first word

    def draw(self, rng: np.random.Generator, split: Split) -> tuple[float, float]:
        """(factor on speech, RMS of the noise) of one scenario."""
        held_out = split == "held_out"
        gain = amplitude(rng.uniform(*(self.held_out_gain_db if held_out else self.gain_db)))
        snr = amplitude(rng.uniform(*(self.held_out_snr_db if held_out else self.snr_db)))
        return gain, 0.1 * gain / snr


def seconds_to_samples(seconds: float) -> int:
    """Whole samples at 16 kHz."""
    return round(seconds * SAMPLE_RATE_HZ)


def amplitude(decibels: float) -> float:
    """Factor on samples of a gain in dB: 10^(decibels / 20), correctly rounded."""
    return exact.power_of_ten(decibels, 20)


def background(rng: np.random.Generator, split: Split, rms: float, chunks: int) -> NDArray[np.float32]:
    """A random part of a random noise of the split, float32 [chunks * CHUNK_SAMPLES]; the whole loop has RMS
    ``rms``."""
    kinds = NOISES[split]
    loop = noise(list(kinds)[rng.integers(len(kinds))], split)
    samples = chunks * CHUNK_SAMPLES
    if samples > len(loop):
        loop = np.tile(loop, -(-samples // len(loop)) + 1)
    first = int(rng.integers(len(loop) - samples + 1))
    return loop[first : first + samples] * np.float32(rms)


@cache
def noise(name: str, split: Split) -> NDArray[np.float32]:
    """The loop of one kind of noise, float32 [LOOP_SECONDS * SAMPLE_RATE_HZ] of RMS 1, read-only."""
    kind = NOISES[split][name]
    rng = generator("noise", split, name)
    loop = _coloured(rng, kind.tilt)
    if kind.hum_hz is not None:
        loop = _hum(rng, kind.hum_hz) + 0.1 * loop
    if kind.swells is not None:
        slow, fast = kind.swells
        loop = loop * (1.0 + 0.5 * _sine(slow, 0) + 0.3 * _sine(fast, _SAMPLES // 6))
    out = _at_rms_1(loop).astype(np.float32)
    out.setflags(write=False)
    return out


def _coloured(rng: np.random.Generator, tilt: float) -> NDArray[np.float64]:
    """Noise made in the frequency domain: real and imaginary part of each bin are uniform random numbers times
    frequency^-tilt. Each sample is a sum over 250,000 bins and so normally distributed (central limit theorem)."""
    bins = np.arange(1, _SAMPLES // 2) / LOOP_SECONDS  # Hz
    fourth_root = np.sqrt(np.sqrt(bins))
    shape = np.where(bins < _LOWEST_HZ, 0.0, 1.0)
    for _ in range(int(abs(4 * tilt))):
        shape = shape / fourth_root if tilt > 0 else shape * fourth_root
    re, im = (2.0 * rng.random((2, len(bins))) - 1.0) * shape
    return _at_rms_1(fourier.real_inverse((re, im), _RADICES, _roots()))


def _hum(rng: np.random.Generator, mains_hz: int) -> NDArray[np.float64]:
    """Mains hum: the odd and even harmonics up to the sixth, falling as 1 / n, at random phases."""
    total = np.zeros(_SAMPLES)
    for n in range(1, 7):
        total += _sine(mains_hz * n * LOOP_SECONDS, int(rng.integers(_SAMPLES))) / n
    return _at_rms_1(total)


def _sine(cycles: int, phase: int) -> NDArray[np.float64]:
    """A sine of so many cycles in one loop, fp64 [_SAMPLES]; ``phase``: in samples of a sine of one cycle."""
    return -_roots()[(cycles * np.arange(_SAMPLES) + phase) % _SAMPLES, 1]


def _at_rms_1(noise: NDArray[np.float64]) -> NDArray[np.float64]:
    return noise / np.sqrt(exact.total(noise * noise) / len(noise))


@cache
def _roots() -> NDArray[np.float64]:
    return fourier.long_roots(800, _SAMPLES // 800)


class Track:
    """The audio of one episode: background noise, to which clips are added while the episode runs."""

    def __init__(self, noise: NDArray[np.float32]) -> None:
        self._samples = noise.copy()  # [chunks * CHUNK_SAMPLES]

    def add(self, clip: NDArray[np.float32], first: int, gain: float) -> None:
        """Adds ``gain`` times a clip, from sample ``first`` on; what lies beyond the track's end is dropped."""
        end = min(first + len(clip), len(self._samples))
        self._samples[first:end] += clip[: end - first] * np.float32(gain)

    def chunk(self, k: int) -> NDArray[np.float32]:
        """Chunk k, clipped to full scale as a microphone would: float32 [CHUNK_SAMPLES]."""
        return np.clip(self._samples[k * CHUNK_SAMPLES : (k + 1) * CHUNK_SAMPLES], -1.0, 1.0)

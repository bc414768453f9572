"""Levels of chunks of sound: near the sound's own, moved by a gain, and the same on every machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels import exact
from model.voice.level import louder, loudness_db
from model.voice.mel import mel_chunks
from rollout.world.sound import noise


def test_exp_of_is_the_exponential() -> None:
    x = np.concatenate((np.linspace(-30.0, 30.0, 1001), [0.0, 700.0, -700.0]))
    wanted = np.array([exact.exp(float(one)) for one in x])
    assert np.abs(exact.exp_of(x) / wanted - 1.0).max() < 1e-15
    assert exact.exp_of(np.zeros(1))[0] == 1.0


@pytest.mark.parametrize("rms", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("kind", ["white", "pink", "tone"])
def test_a_level_is_near_that_of_the_samples(kind: str, rms: float) -> None:
    t = torch.arange(9600, dtype=torch.float64) / 16000
    tone = math.sqrt(2.0) * (2 * math.pi * 500 * t).sin()
    samples = tone.float() if kind == "tone" else torch.from_numpy(noise(kind, "train")[:9600].copy())
    samples = samples / samples[3200:6400].square().mean().sqrt() * rms
    chunk = mel_chunks(samples)[1]
    assert loudness_db(chunk) == pytest.approx(20 * math.log10(rms), abs=2.5)


def test_a_gain_moves_the_level() -> None:
    chunks = mel_chunks(torch.from_numpy(noise("pink", "train")[:6400].copy()) * 0.1)
    for gain in (-20.0, -3.0, 0.0, 12.0):
        moved = louder(chunks, gain)
        assert moved.shape == chunks.shape and moved.dtype == torch.float32
        assert loudness_db(moved[1]) == pytest.approx(loudness_db(chunks[1]) + gain, abs=0.01)
        assert torch.equal(louder(chunks[1], gain), moved[1])
    silence = louder(chunks, -300.0)
    assert torch.equal(silence[0, 0], silence[1, 7]) and loudness_db(silence[0]) < -70.0


def test_what_a_diverged_head_says_has_a_level() -> None:
    """Far beyond what e to the power of it could be: deafening and silent, and never NaN."""
    deafening, silent = torch.full((20, 80), 1e4), torch.full((20, 80), -1e4)
    assert 1000 < loudness_db(deafening) < math.inf and loudness_db(silent) < -1000

"""Sound from mel chunks: its mels are those asked for, whole and streamed, and it ends in silence.

That streaming leaves no click at the seams is tested on words: tests/rollout/test_lexicon.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from model.voice.mel import CHUNK_SAMPLES, FRAMES, MelError, log_mels, mel_chunks
from model.voice.sound import LATENCY_SAMPLES, Speaker, _filters, magnitudes, render


def vowel(chunks: int = 6) -> Tensor:
    """A glottal pulse train, 120 to 160 Hz, through three formants; RMS 0.1. A steady sound, whose seams are bare."""
    n = chunks * CHUNK_SAMPLES
    phase = np.cumsum(np.linspace(120, 160, n)) / 16000
    t = sum(np.cos(2 * np.pi * k * phase) * np.exp(-min(abs(140 * k - f) for f in (700, 1200, 2600)) / 250)
            for k in range(1, 25))  # fmt: skip
    return torch.from_numpy((0.1 * t / np.std(t)).astype(np.float32))


def stream(chunks: Tensor) -> Tensor:
    speaker = Speaker()
    return torch.cat([speaker.append(chunk) for chunk in (*chunks, None, None)])


def test_the_magnitudes_have_the_chunk_s_mels() -> None:
    chunks = mel_chunks(vowel())
    size = magnitudes(chunks)
    assert size.shape == (6 * FRAMES, 513) and (size >= 0).all()
    again = np.log(np.maximum(size @ _filters().T, 1e-4))
    assert np.abs(again - log_mels(chunks).reshape(-1, 80)).mean() < 0.1


@pytest.mark.parametrize("make", [render, lambda chunks: stream(chunks)[LATENCY_SAMPLES:]], ids=["whole", "streamed"])
def test_the_sound_has_the_mels_asked_for(make: Callable[[Tensor], Tensor]) -> None:
    """Mean distance of ln magnitudes, first and last chunk left out. Control: another sound is far."""
    chunks = mel_chunks(vowel())
    sound = make(chunks)[: 6 * CHUNK_SAMPLES]
    again = log_mels(mel_chunks(sound))
    assert np.abs(again - log_mels(chunks))[1:5].mean() < 0.35
    assert np.abs(again - log_mels(mel_chunks(vowel() * 20)))[1:5].mean() > 1


def test_it_fades_out_and_is_silent() -> None:
    """After the last chunk, and the same when the voice is interrupted in the middle: 2 ms before the end there is next
    to nothing. Control: cut off where its chunk's sound ended, it would stop at full strength."""
    chunks = mel_chunks(vowel())
    for count in (6, 3):
        sound, end = stream(chunks[:count]), count * CHUNK_SAMPLES
        last = end + LATENCY_SAMPLES
        assert not sound[last:].any() and len(sound) == (count + 2) * CHUNK_SAMPLES
        assert float(sound[last - 32 : last].abs().max()) < 0.005
        assert float(sound[end - 120 : end].abs().max()) > 0.1  # a pulse of the voice, 8 ms
        assert float(sound[end : end + LATENCY_SAMPLES].abs().max()) > 0.02  # it fades, and is not cut


def test_silence_is_silence() -> None:
    speaker = Speaker()
    assert not speaker.append(None).any()
    assert not speaker.append(mel_chunks(torch.zeros(CHUNK_SAMPLES))[0]).any()


def test_what_is_said_again_sounds_the_same() -> None:
    """A pause makes a speaker as new, so that a played episode does not depend on what was played before."""
    chunks, speaker = mel_chunks(vowel(2)), Speaker()
    first, second = (torch.cat([speaker.append(chunk) for chunk in (*chunks, None)]) for _ in range(2))
    assert torch.equal(first, second)
    without_pause = torch.cat([speaker.append(chunk) for chunk in (*chunks, *chunks)])
    assert not torch.equal(without_pause[2 * CHUNK_SAMPLES :], first[: 2 * CHUNK_SAMPLES])


def test_wild_chunks_stay_finite_and_damaged_ones_are_refused() -> None:
    speaker = Speaker()
    assert speaker.append(torch.full((20, 80), 1e30)).isfinite().all()
    with pytest.raises(MelError, match="chunk 0, frame 0, band 0 is nan"):
        speaker.append(torch.full((20, 80), float("nan")))
    with pytest.raises(MelError, match="give float32"):
        speaker.append(torch.zeros(19, 80))


@pytest.mark.alone
def test_a_chunk_is_made_in_time() -> None:
    chunk, speaker = mel_chunks(vowel(1))[0], Speaker()
    speaker.append(chunk)
    started = time.process_time()
    for _ in range(10):
        speaker.append(chunk)
    assert (time.process_time() - started) / 10 < 0.020

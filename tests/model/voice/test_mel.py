"""The voice's mel front end: against a library's Fourier transform, causal and streaming to the bit, and its errors."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.senses.audio import DMel, mel_filters
from model.voice.mel import (
    BEFORE,
    CHUNK_SAMPLES,
    FLOOR,
    LENGTH,
    MelError,
    log_mels,
    mel_chunks,
    self_codes,
    stream_chunks,
)
from model.voice.scale import MEAN, STD


def sound(chunks: float = 4.3, seed: int = 0) -> Tensor:
    """Noise of one level and a rising tone, at most 0.6."""
    n = round(chunks * CHUNK_SAMPLES)
    noise = np.random.default_rng(seed).uniform(-0.05, 0.05, n)
    tone = 0.5 * np.sin(2 * np.pi * np.linspace(200, 3000, n) * np.arange(n) / 16000)
    return torch.from_numpy((noise + tone).astype(np.float32))


def by_torch(samples: Tensor) -> Tensor:
    """ln of the bands' magnitudes by torch.stft in fp64."""
    padded = F.pad(samples, (BEFORE, -len(samples) % CHUNK_SAMPLES)).double()
    frames = padded.unfold(0, 640, 160) * torch.hann_window(640, periodic=True, dtype=torch.float64)
    size = torch.fft.rfft(frames, LENGTH).abs()
    first, weight = mel_filters(LENGTH)
    matrix = torch.zeros(80, size.shape[1] + weight.shape[1], dtype=torch.float64)
    for band in range(80):
        matrix[band, first[band] : first[band] + weight.shape[1]] = weight[band]
    return (size @ matrix[:, : size.shape[1]].T).clamp(min=FLOOR).log().view(-1, 20, 80)


def test_is_the_stated_transform() -> None:
    """And the control: a sample moved by a hundredth is seen."""
    ours = torch.from_numpy(log_mels(mel_chunks(sound())))
    assert ours.shape == (5, 20, 80)
    assert (ours - by_torch(sound())).abs().max() < 2e-6  # rounding to fp32
    moved = sound()
    moved[5000] += 0.01
    assert (ours - by_torch(moved)).abs().max() > 1e-3


def test_normalised_per_band() -> None:
    expected = (by_torch(sound()) - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(STD, dtype=torch.float64)
    assert (mel_chunks(sound()) - expected).abs().max() < 2e-6


def test_the_same_bits_on_every_machine() -> None:
    """A digest of chunks; another one is another front end, and every weight that learnt from it is another."""
    bits = hashlib.blake2b(mel_chunks(sound()).numpy().tobytes(), digest_size=8).hexdigest()
    assert bits == "2d00838f9aebb3b0"


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1), (1, 3)])
def test_streaming_equals_the_whole(sizes: tuple[int, ...]) -> None:
    samples = sound(4)
    whole, before, at, parts = mel_chunks(samples), torch.zeros(BEFORE), 0, []
    for size in sizes:
        piece = torch.cat([before, samples[at : at + size * CHUNK_SAMPLES]])
        parts.append(stream_chunks(piece))
        before, at = piece[-BEFORE:], at + size * CHUNK_SAMPLES
    assert torch.equal(torch.cat(parts), whole)
    # The control: a stream that forgets the samples before its second piece.
    forgotten = stream_chunks(F.pad(samples[CHUNK_SAMPLES : 2 * CHUNK_SAMPLES], (BEFORE, 0)))
    assert not torch.equal(forgotten, whole[1:2])


def test_a_chunk_uses_nothing_after_its_end() -> None:
    samples, changed = sound(3), sound(3)
    changed[CHUNK_SAMPLES:] = sound(2, seed=1)
    one, other = mel_chunks(samples), mel_chunks(changed)
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    changed[CHUNK_SAMPLES - 1] += 0.1  # the control: its last sample counts
    assert not torch.equal(one[0], mel_chunks(changed)[0])


def test_silence_is_the_floor() -> None:
    assert np.abs(log_mels(mel_chunks(torch.zeros(10))) - np.log(FLOOR)).max() < 1e-6


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (torch.zeros(0), r"sound is \[0\]"),
        (torch.zeros(2, 3200), r"sound is \[2, 3200\]"),
        (torch.zeros(3200, dtype=torch.float64), "float64"),
        (torch.tensor([0.0, float("nan")]), "sample 1 is nan, which is no sound"),
        (torch.tensor([0.0, 0.0, float("inf")]), "sample 2 is inf"),
        (torch.tensor([12000.0]), "sample 0 is 12000.0.*scale it"),
    ],
)
def test_what_is_no_sound(samples: Tensor, says: str) -> None:
    with pytest.raises(MelError, match=says):
        mel_chunks(samples)


@pytest.mark.parametrize("samples", [torch.zeros(BEFORE), torch.zeros(BEFORE + 100), torch.zeros(0)])
def test_streams_take_whole_chunks(samples: Tensor) -> None:
    with pytest.raises(MelError, match="whole chunks of 3200"):
        stream_chunks(samples)


def test_self_codes_are_near_those_of_the_sound() -> None:
    """Of noise and a tone, where no frame is silent; the control: codes of another sound."""
    samples = sound(4)
    true = DMel.build().codes(samples[None])[0].view(4, 4, 80).int()
    heard, other = (self_codes(mel_chunks(x)).int() for x in (samples, sound(4) * 0.01))
    assert heard.shape == (4, 4, 80)
    assert ((heard - true).abs() <= 1).float().mean() > 0.95 > 0.5 > ((other - true).abs() <= 1).float().mean()


def test_self_codes_of_a_chunk_depend_on_it_alone() -> None:
    chunks = mel_chunks(sound(5))
    assert torch.equal(torch.cat([self_codes(chunk[None]) for chunk in chunks]), self_codes(chunks))
    assert self_codes(torch.full((1, 20, 80), 1e30)).unique().tolist() == [15]
    assert self_codes(torch.full((1, 20, 80), -1e30)).unique().tolist() == [0]


def test_damaged_chunks() -> None:
    chunks = mel_chunks(sound(2))
    chunks[1, 3, 7] = float("nan")
    with pytest.raises(MelError, match="chunk 1, frame 3, band 7 is nan"):
        self_codes(chunks)
    for wrong in (chunks[0], chunks[:, :19], chunks.double()):
        with pytest.raises(MelError, match=r"give float32 \[N, 20, 80\]"):
            log_mels(wrong)

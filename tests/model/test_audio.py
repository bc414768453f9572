"""Streaming dMel against transformers' feature extractor and processor on real speech, and against itself, bit for bit,
whatever the cut, the company and the backend. Recordings come from a speech folder beside the checkout if there is one,
else those shipped here."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F
from transformers import InklingFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.inkling.processing_inkling import InklingProcessor

from kernels.dispatch import backend as active
from kernels.dispatch import use_backend
from model.senses.audio import HOP, WINDOW, DMel, mel_filters

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT.parent / "shared/data/speech", ROOT / "rollout/data/speech"]
CHUNK_SAMPLES = 4 * HOP
CENTRES = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).float()


def recordings() -> list[np.ndarray]:
    """fp32 samples of every recording of the first folder that has any."""
    for folder in FOLDERS:
        if paths := sorted(folder.rglob("*.flac")):
            return [soundfile.read(path, dtype="float32")[0] for path in paths]
    pytest.skip("no recordings")


def inkling_codes(samples: np.ndarray) -> torch.Tensor:
    """transformers' codes of one utterance, [frames, 80]."""
    features = InklingFeatureExtractor()(samples, sampling_rate=16000)["input_features"]
    processor = SimpleNamespace(bin_centers=CENTRES, dmel_min_value=-7.0, dmel_max_value=2.0)
    return InklingProcessor._extract_dmel_bins(processor, features)[0]


def padded(samples: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.pad(samples, (0, -len(samples) % HOP)))[None]


def test_codes_are_those_of_transformers_but_at_edges() -> None:
    """transformers computes in fp32 in an order of its libraries, so a code may differ where our mel value lies within
    1e-5 of an edge: 1 of 470,720 codes of the shipped recordings, 2 of 1,844,960 of a larger folder. Control: one
    percent louder, hundreds of codes differ that lie farther from an edge."""
    dmel, noise = DMel.build(), np.random.default_rng(0)
    differ, louder = 0, 0
    for samples in recordings():
        noisy = (0.3 * samples + 0.01 * noise.standard_normal(len(samples))).astype(np.float32)
        for version in (samples, noisy):
            wanted = inkling_codes(version)
            codes, mel = dmel.codes_and_mels(F.pad(padded(version), (WINDOW - HOP, 0)))
            other = codes[0] != wanted
            assert (distance_to_edges(mel[0][other]) < 1e-5).all()
            assert ((codes[0].int() - wanted).abs() <= 1).all()
            differ += int(other.sum())
        codes, mel = dmel.codes_and_mels(F.pad(padded(1.01 * samples), (WINDOW - HOP, 0)))
        other = codes[0] != inkling_codes(samples)
        louder += int((distance_to_edges(mel[0][other]) > 1e-5).sum())
    assert differ <= 5 and louder > 100


def distance_to_edges(mel: torch.Tensor) -> torch.Tensor:
    """Relative, to the nearest one."""
    edges = DMel.build().edges
    return ((mel.unsqueeze(-1) - edges) / edges).abs().amin(-1)


def test_filters_are_slaneys() -> None:
    theirs = mel_filter_bank(801, 80, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney").T
    first, weight = mel_filters()
    ours = np.zeros((80, 801 + weight.shape[1]))
    for channel, (at, row) in enumerate(zip(first.tolist(), weight.numpy(), strict=True)):
        assert row[0] > 0
        ours[channel, at : at + len(row)] = row
    assert ((ours[:, :801] > 0) == (theirs > 0)).all() and not ours[:, 801:].any()
    np.testing.assert_allclose(ours[:, :801], theirs, rtol=1e-12, atol=1e-15)


def test_edges_are_halfway_between_centres() -> None:
    """10^(0.6 b - 7.3), within half a unit in the last place, by another way: its tenth power is 10^(6 b - 73)."""
    edges = DMel.build().edges.tolist()
    for b, edge in enumerate(edges, 1):
        exact = Fraction(10) ** (6 * b - 73)
        for nearby, above in ((math.nextafter(edge, 0.0), False), (math.nextafter(edge, 1e9), True)):
            middle = (Fraction(edge) + Fraction(nearby)) / 2
            assert (middle**10 > exact) == above


def test_chunking_and_company_change_nothing(backend: str) -> None:
    dmel = DMel.build()
    count = 8 * CHUNK_SAMPLES
    voices = [np.resize(samples, count) for samples in recordings()[:5]]
    waveform = torch.from_numpy(np.stack(voices))
    together = dmel.codes(waveform)
    previous = active().NAME
    use_backend("cpu")
    assert torch.equal(DMel.build().codes(waveform), together)
    use_backend(previous)
    for session in range(5):
        assert torch.equal(dmel.codes(waveform[session : session + 1])[0], together[session])
    for step in (HOP, CHUNK_SAMPLES, 3 * HOP, count):
        past, pieces = torch.zeros(5, WINDOW - HOP), []
        for at in range(0, count, step):
            samples = torch.cat((past, waveform[:, at : at + step]), 1)
            pieces.append(dmel.stream_codes(samples))
            past = samples[:, -(WINDOW - HOP) :]
        assert torch.equal(torch.cat(pieces, 1), together)
    assert together.dtype == torch.uint8 and together.shape == (5, 32, 80)
    late = dmel.codes(waveform[:, CHUNK_SAMPLES:])  # negative control: without its past a frame is another frame
    assert not torch.equal(late, together[:, 4:])


def test_a_sample_is_heard() -> None:
    """Control of all equalities here: one sample of one frame changed by a click changes codes, and of that frame and
    its successor only."""
    dmel, waveform = DMel.build(), padded(recordings()[0])
    before = dmel.codes(waveform)
    waveform[0, 10 * HOP + 400] += 0.5
    changed = (dmel.codes(waveform) != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [10, 11]


def test_bad_samples() -> None:
    dmel = DMel.build()
    with pytest.raises(ValueError, match=r"799 samples of torch.float32.*multiple of 800"):
        dmel.codes(torch.zeros(1, 799))
    with pytest.raises(ValueError, match="float64"):
        dmel.codes(torch.zeros(1, 800, dtype=torch.float64))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 799, 3199):
            samples = torch.zeros(2, 3200)
            samples[1, place] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                dmel.codes(samples)
    assert dmel.codes(torch.full((1, 800), 3e38)).max() == 15  # loud, but numbers


@pytest.mark.alone
@pytest.mark.slow
def test_a_micro_turn_of_24_sessions_is_quick() -> None:
    """Half a millisecond on one free thread; the bound leaves room for busy machines."""
    dmel, samples = DMel.build(), torch.randn(24, WINDOW - HOP + CHUNK_SAMPLES) * 0.1
    dmel.stream_codes(samples)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        dmel.stream_codes(samples)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.01

"""Streaming dMel against transformers' feature extractor and processor: codes equal on real speech, whatever the cut
and the company. Recordings come from a speech folder beside the checkout if there is one, else those shipped here."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import InklingFeatureExtractor
from transformers.models.inkling.processing_inkling import InklingProcessor

from model.audio import HOP, WINDOW, DMel

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


def test_codes_equal_transformers_on_every_recording() -> None:
    dmel = DMel.build()
    noise = np.random.default_rng(0)
    for samples in recordings():
        noisy = (0.3 * samples + 0.01 * noise.standard_normal(len(samples))).astype(np.float32)
        for version in (samples, noisy):
            assert torch.equal(dmel.codes(padded(version))[0], inkling_codes(version))


def test_chunking_and_company_change_nothing(backend: str) -> None:
    dmel = DMel.build()
    count = 8 * CHUNK_SAMPLES
    voices = [np.resize(samples, count) for samples in recordings()[:5]]
    waveform = torch.from_numpy(np.stack(voices))
    together = dmel.codes(waveform)
    for session in range(5):
        assert torch.equal(dmel.codes(waveform[session : session + 1])[0], together[session])
    for step in (HOP, CHUNK_SAMPLES, 3 * HOP, count):
        past, pieces = torch.zeros(5, WINDOW - HOP), []
        for at in range(0, count, step):
            samples = torch.cat((past, waveform[:, at : at + step]), 1)
            pieces.append(dmel.continued(samples))
            past = samples[:, -(WINDOW - HOP) :]
        assert torch.equal(torch.cat(pieces, 1), together)
    assert together.dtype == torch.uint8 and together.shape == (5, 32, 80)
    late = dmel.codes(waveform[:, CHUNK_SAMPLES:])  # negative control: without its past a frame is another frame
    assert not torch.equal(late, together[:, 4:])


def test_edges_are_where_the_nearest_centre_changes() -> None:
    edges = bin_edges()
    below = torch.nextafter(edges, torch.tensor(0.0))
    assert quantise(torch.log10(edges)).tolist() == list(range(1, 16))
    assert quantise(torch.log10(below)).tolist() == list(range(15))


def test_bad_samples() -> None:
    dmel = DMel.build()
    with pytest.raises(ValueError, match=r"799 samples of torch.float32.*multiple of 800"):
        dmel.codes(torch.zeros(1, 799))
    with pytest.raises(ValueError, match="float64"):
        dmel.codes(torch.zeros(1, 800, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN"):
        dmel.codes(torch.full((1, 800), torch.nan))


@pytest.mark.alone
@pytest.mark.slow
def test_a_micro_turn_of_24_sessions_is_quick() -> None:
    """About 1 ms on one free thread; the bound leaves room for busy machines."""
    dmel, samples = DMel.build(), torch.randn(24, WINDOW - HOP + CHUNK_SAMPLES) * 0.1
    dmel.continued(samples)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        dmel.continued(samples)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.01

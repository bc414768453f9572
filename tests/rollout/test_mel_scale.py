"""The voice's shipped constants come from the shipped recordings, and so does what is said of the self-audio codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import model.voice.scale
from model.senses.audio import DMel
from model.voice.mel import CHUNK_SAMPLES, mel_chunks, self_codes
from rollout.world.mel_scale import scale_text
from rollout.world.speech import SpeechBank


def test_the_shipped_constants_are_those_of_the_recordings() -> None:
    bank, shipped = SpeechBank.open(), Path(str(model.voice.scale.__file__)).read_text(encoding="utf-8")
    assert scale_text(bank) == shipped
    assert scale_text(SpeechBank(bank.folder, bank.clips[:50])) != shipped


def test_how_near_self_codes_are() -> None:
    """The shares in `model.voice.mel.self_codes`. Control: codes one chunk late."""
    errors, late = [], []
    for clip in SpeechBank.open().clips:
        samples = torch.tensor(clip.samples)
        samples = F.pad(samples, (0, -len(samples) % CHUNK_SAMPLES))
        true = DMel.build().codes(samples[None])[0].view(-1, 4, 80).int()
        heard = self_codes(mel_chunks(samples)).int()
        errors.append((heard - true).abs().numpy().reshape(-1))
        late.append((heard[:-1] - true[1:]).abs().numpy().reshape(-1))
    all_errors = np.concatenate(errors)
    assert 0.94 < (all_errors <= 1).mean() < 0.97 and 0.68 < (all_errors == 0).mean() < 0.71
    assert (np.concatenate(late) <= 1).mean() < 0.8

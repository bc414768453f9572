"""Bytes on the network: the arithmetic agrees with a real episode's tensors and with the counts of the presets."""

from __future__ import annotations

import sys

import pytest
import torch

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.config import preset
from rl.study.traffic import episode_bytes, main, traffic
from rollout.engines.embedded import SessionEngine
from rollout.record.episode import tensors
from rollout.turn.action import CHUNK_SAMPLES, Mode
from rollout.turn.observation import audio_observations
from rollout.turn.vocabulary import Vocabulary


def test_episode_bytes_are_those_of_a_real_episode() -> None:
    model = InteractionModel(preset("tiny"))
    model.init_weights(0)
    model.pack()
    engine = SessionEngine(model, Vocabulary.build(model.vocab), slots=1, max_tokens=128)
    session = engine.open(1)
    for k in range(10):
        engine.append(
            [session],
            audio_observations(0.1 * torch.randn(1, CHUNK_SAMPLES, generator=torch.Generator().manual_seed(k))),
        )
    words = sum(a.mode is Mode.SPEAK for a in session.actions)
    episode = session.episode(scenario="x/train/0", rollout=0, seed=0, facts={})
    real = sum(tensor.nbytes for tensor in tensors(episode).values())
    assert 0 < words < 10
    assert episode_bytes(2, words) == real
    assert episode_bytes(2, words - 1) != real


def test_traffic_of_one_learner_is_weights_and_episodes_only() -> None:
    assert [size for _, size in traffic(1000, 1, 6, 50)] == [0, 2000, 300]
    assert next(traffic(1000, 4, 6, 50))[1] == 6000


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["traffic", "--preset", "tiny", "--learners", "2"])
    main()
    counted = sum(p.numel() for p in InteractionModel(preset("tiny")).parameters())
    assert f"tiny: {counted:,} parameters" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["traffic", "--preset", "tiny", "--seconds", "2", "--words", "11"])
    with pytest.raises(MetronomeError, match="hold 0 to 10"):
        main()

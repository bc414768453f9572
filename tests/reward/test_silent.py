"""Reward models hear the user alone, so whoever would have them judge a voice is told so, before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.config import preset, with_voice
from model.voice.config import VoiceConfig
from model.weights import checkpoint
from reward import pairs
from reward import train as reward_train
from reward.learned.model import RewardModel, check_silent
from reward.source import RewardSource
from rollout.scenarios.registry import ScenarioConfig


@pytest.fixture(scope="module")
def policy() -> InteractionModel:
    model = InteractionModel(with_voice(preset("nano"), VoiceConfig(width=32, blocks=1, steps=2)))
    model.init_weights(0)
    model.pack()
    return model


@pytest.fixture(scope="module")
def folder(policy: InteractionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "model"
    path.mkdir()
    checkpoint.save(policy, path)
    return path


def test_a_policy_with_a_voice(policy: InteractionModel) -> None:
    plain = InteractionModel(preset("nano"))
    plain.init_weights(0)
    plain.pack()
    model = RewardModel(plain, ("timing", "content"))
    source = RewardSource(ScenarioConfig(("timespeak",)), "both", [model])
    with pytest.raises(MetronomeError, match="the policy has a voice, and reward models do not hear it"):
        source.check_policy(policy)
    source.check_policy(plain)
    check_silent(plain, "x")


def test_pairs(folder: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "pairs")]
    with pytest.raises(MetronomeError, match="repeat is played with sound of the model's own"):
        pairs.main([*out, "--scenarios.families", "[repeat]"])
    with pytest.raises(MetronomeError, match=r"rollouts.policies: .* has a voice"):
        pairs.main([*out, "--rollouts.policies", f"[{{checkpoint: {folder}}}]"])
    assert not (tmp_path / "pairs").exists()


def test_a_backbone(folder: Path) -> None:
    config = reward_train.RewardTrainConfig(backbone=reward_train.BackboneRecipe(checkpoint=str(folder)))
    with pytest.raises(MetronomeError, match=r"backbone.checkpoint: .* has a voice"):
        reward_train._backbone(config)

"""Untrained models that many tests need: a policy, a reward model whose heads are not zero; and conversations."""

from __future__ import annotations

import random

import torch

from model.backbone.transformer import InteractionModel
from model.config import SMALL_PATCH, preset, with_voice
from model.inputs import Senses
from model.voice.config import VoiceConfig
from reward.learned.model import RewardModel
from rollout.record.transcript import Transcript, write_transcript
from rollout.turn.action import CHUNK_FRAMES, LISTEN, speak
from rollout.turn.grammar import Grammar
from rollout.turn.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(256)
SENSES = Senses(VOCABULARY.audio, VOCABULARY.image, SMALL_PATCH)


def fresh_model(name: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32) -> InteractionModel:
    """A preset with the weights of ``seed``, packed."""
    model = InteractionModel(preset(name), dtype)
    model.init_weights(seed)
    model.pack()
    return model


def speaking_model(seed: int = 0) -> InteractionModel:
    """The weights that begin as 0 are drawn, so that every weight of the head has an effect."""
    model = InteractionModel(with_voice(preset("nano"), VoiceConfig(width=32, blocks=1, steps=2)))
    model.init_weights(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("voice_head.") and not bool(weight.any()):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    model.mark_changed()
    model.pack()
    return model


def reward_model(axes: tuple[str, ...] = ("timing", "content"), seed: int = 0) -> RewardModel:
    """Fresh backbone and random heads."""
    model = RewardModel.build(fresh_model(seed=seed), axes)
    with torch.no_grad():
        model.heads.weight.copy_(torch.randn(model.heads.weight.shape, generator=torch.Generator().manual_seed(seed)))
    model.repack()
    return model


def conversation(seed: int, chunks: int, words_per_chunk: int = 2) -> Transcript:
    """Random audio codes and actions."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    actions = [pick.choice([LISTEN, LISTEN, speak("breathe"), speak("thank", "you")]) for _ in range(chunks)]
    codes = torch.randint(16, (chunks, CHUNK_FRAMES, 80), generator=generator, dtype=torch.uint8)
    return write_transcript(codes, actions, Grammar(VOCABULARY, words_per_chunk))

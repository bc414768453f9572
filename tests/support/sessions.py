"""Random audio and video for sessions, and their records as episodes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rollout.engines.session import Session
from rollout.record.episode import Episode
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.observation import Observation


def sound(seed: int) -> Observation:
    """A chunk of white noise."""
    return Observation(0.1 * torch.randn(CHUNK_SAMPLES, generator=torch.Generator().manual_seed(seed)))


def picture(seed: int, number: int = 1, height: int = 20, width: int = 20) -> Tensor:
    """Random frames uint8 [number, height, width, 3]; of this size, `tiny` cuts them into 4 patches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, height, width, 3), generator=generator, dtype=torch.uint8)


def everything(seed: int) -> Observation:
    """A chunk of white noise; of three, one has a frame with it, and one has two frames and a text event."""
    heard = sound(seed)
    if seed % 3 == 0:
        return heard
    shown = replace(heard, frames=picture(seed, seed % 3))
    return shown if seed % 3 == 1 else replace(shown, events=("four",))


def record(session: Session) -> Episode:
    """The session's record, as an episode of no scenario."""
    return session.episode(scenario="x/train/0", rollout=0, seed=0, facts={})

"""Random audio for sessions, and their records as episodes."""

from __future__ import annotations

import torch

from rollout.engines.session import Session
from rollout.record.episode import Episode
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.observation import Observation


def sound(seed: int) -> Observation:
    """A chunk of white noise."""
    return Observation(0.1 * torch.randn(CHUNK_SAMPLES, generator=torch.Generator().manual_seed(seed)))


def record(session: Session) -> Episode:
    """The session's record, as an episode of no scenario."""
    return session.episode(scenario="x/train/0", rollout=0, seed=0, facts={})

"""What reaches the model in one micro-turn, whatever the sense: users and live clients make it, engines take it.

The model of this version hears and has no other sense. An observation may hold frames and text events all the same, so
that a user who makes them is not written twice; an engine refuses what its model cannot take (`check_senses`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from rollout.turn.action import CHUNK_SAMPLES

MAX_FRAMES = 2
"""Video frames in one micro-turn."""

NO_FRAMES = torch.empty(0, 0, 0, 3, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Observation:
    """One micro-turn of 200 ms. Raises ValueError for another shape or dtype.

    Example: ``Observation(torch.zeros(3200))`` is silence, with nothing to see.
    """

    audio: Tensor  # fp32 [3200] at 16 kHz, full scale is 1
    frames: Tensor = NO_FRAMES  # uint8 [F, H, W, 3], F = 0 to 2 RGB pictures, oldest first
    events: tuple[str, ...] = ()  # texts that came in: a background result, a tool's answer, a typed message

    def __post_init__(self) -> None:
        audio, frames = self.audio, self.frames
        if audio.shape != (CHUNK_SAMPLES,) or audio.dtype != torch.float32:
            raise ValueError(
                f"observation: audio must be float32 [{CHUNK_SAMPLES}], not {audio.dtype} {list(audio.shape)}"
            )
        if frames is not NO_FRAMES and (
            frames.dtype != torch.uint8 or frames.ndim != 4 or len(frames) > MAX_FRAMES or frames.shape[3] != 3
        ):
            raise ValueError(
                f"observation: frames must be uint8 [0..{MAX_FRAMES}, H, W, 3], not {frames.dtype} {list(frames.shape)}"
            )


class MissingSenseError(MetronomeError, NotImplementedError):
    """Something was observed that the model has no rows for."""


def check_senses(observation: Observation) -> None:
    """Raises MissingSenseError for frames and events: no model of this version can take them."""
    if len(observation.frames):
        raise MissingSenseError(
            f"an observation has {len(observation.frames)} video frames, but the model has no vision tower: it hears "
            "only. Leave `frames` empty"
        )
    if observation.events:
        raise MissingSenseError(
            f"an observation has {len(observation.events)} text events, but a micro-turn has no rows for them yet. "
            "Leave `events` empty"
        )


def audio_observations(audio: Tensor) -> list[Observation]:
    """Audio fp32 [N, 3200], of N sessions or N chunks, as N observations of nothing else."""
    return [Observation(chunk) for chunk in audio.unbind()]


def stack_audio(observations: Sequence[Observation]) -> Tensor:
    """The audio of N observations, fp32 [N, 3200]."""
    return torch.stack([observation.audio for observation in observations])

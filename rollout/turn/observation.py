"""The model's input in one micro-turn. Simulated users and live clients produce it, engines consume it.

The models of this version take audio only. Observations have fields for video frames and text events already, so that
the interface need not change with them; engines refuse what their model cannot take (`check_observation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.senses.audio import LOUDEST
from rollout.turn.action import CHUNK_SAMPLES

MAX_FRAMES = 2
"""The most video frames in one micro-turn."""

NO_FRAMES = torch.empty(0, 0, 0, 3, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Observation:
    """One micro-turn of 200 ms. Raises ValueError for another type, shape or dtype.

    Example: ``Observation(torch.zeros(3200))`` is silence without video.
    """

    audio: Tensor  # fp32 [3200] at 16 kHz, full scale is 1
    frames: Tensor = NO_FRAMES  # uint8 [F, H, W, 3], F = 0 to 2 RGB pictures, oldest first
    events: tuple[str, ...] = ()  # texts: a background model's result, a tool's answer, a typed message

    def __post_init__(self) -> None:
        audio, frames = self.audio, self.frames
        if not isinstance(audio, Tensor) or audio.shape != (CHUNK_SAMPLES,) or audio.dtype != torch.float32:
            raise ValueError(f"observation: audio must be float32 [{CHUNK_SAMPLES}], not {_form(audio)}")
        if frames is not NO_FRAMES and (
            not isinstance(frames, Tensor)
            or frames.dtype != torch.uint8
            or frames.ndim != 4
            or len(frames) > MAX_FRAMES
            or frames.shape[3] != 3
        ):
            raise ValueError(f"observation: frames must be uint8 [0..{MAX_FRAMES}, H, W, 3], not {_form(frames)}")
        if not isinstance(self.events, tuple) or not all(isinstance(event, str) for event in self.events):
            raise ValueError("observation: events must be a tuple of texts")


class MissingSenseError(MetronomeError, NotImplementedError):
    """An observation has a kind of input that the model cannot take."""


def check_observation(observation: Observation) -> None:
    """The check of every engine, and of whoever takes observations for one: what passes raises nothing in an engine.

    Raises MissingSenseError for video frames and text events, which no model of this version can take; ValueError for
    audio that is not finite or louder than `LOUDEST`, or that is no plain tensor on the host; ValueError for what is no
    observation, or no longer, since a tensor's form can be changed after it was made."""
    if type(observation) is not Observation:
        raise ValueError(f"an engine hears observations of 200 ms, not {_form(observation)}")
    observation.__post_init__()
    audio = observation.audio
    if (
        type(audio) is not Tensor
        or audio.device.type != "cpu"
        or audio.layout != torch.strided
        or audio.requires_grad
        or audio.is_neg()
    ):
        raise ValueError(
            f"observation: audio must be a plain tensor, dense, on the CPU, without a gradient or a view of negatives; "
            f"this {type(audio).__name__} on {audio.device} is not: give audio.detach().cpu().clone()"
        )
    loudest = float(audio.abs().max())  # NaN if any sample is
    if not loudest <= LOUDEST:
        problem = f"has a sample of size {loudest:g}" if math.isfinite(loudest) else "has samples that are not finite"
        raise ValueError(f"observation: audio {problem}; full scale is 1, and at most {LOUDEST:g} is taken for sound")
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


def _form(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def audio_observations(audio: Tensor) -> list[Observation]:
    """audio fp32 [N, 3200], of N sessions or N chunks -> N observations with audio only."""
    return [Observation(chunk) for chunk in audio.unbind()]


def stack_audio(observations: Sequence[Observation]) -> Tensor:
    """The audio of N observations, fp32 [N, 3200]."""
    return torch.stack([observation.audio for observation in observations])

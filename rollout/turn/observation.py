"""The model's input in one micro-turn. Simulated users and live clients produce it, engines consume it, and refuse what
they have no room for (`check_observation`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.senses.audio import LOUDEST
from model.senses.video import MOST_FRAMES, NO_FRAMES, size_problem
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.grammar import Grammar


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
            or len(frames) > MOST_FRAMES
            or frames.shape[3] != 3
        ):
            raise ValueError(f"observation: frames must be uint8 [0..{MOST_FRAMES}, H, W, 3], not {_form(frames)}")
        if len(frames) and (problem := size_problem(frames.shape[1], frames.shape[2])):
            raise ValueError(f"observation: frames are {_form(frames)}; {problem}")
        if not isinstance(self.events, tuple) or not all(isinstance(event, str) for event in self.events):
            raise ValueError("observation: events must be a tuple of texts")


class MissingSenseError(MetronomeError, NotImplementedError):
    """An observation has a kind of input that the engine has no room for."""


def check_observation(observation: Observation, grammar: Grammar) -> None:
    """The check of every engine, and of whoever takes observations for one: what passes raises nothing in an engine.

    Raises MissingSenseError for more video or events than the grammar has room for; ValueError for audio that is not
    finite or louder than `LOUDEST`, or for tensors that are no plain ones on the host; ValueError for what is no
    observation, or no longer, since a tensor's form can be changed after it was made."""
    if type(observation) is not Observation:
        raise ValueError(f"an engine hears observations of 200 ms, not {_form(observation)}")
    observation.__post_init__()
    _check_plain("audio", observation.audio)
    loudest = float(observation.audio.abs().max())  # NaN if any sample is
    if not loudest <= LOUDEST:
        problem = f"has a sample of size {loudest:g}" if math.isfinite(loudest) else "has samples that are not finite"
        raise ValueError(f"observation: audio {problem}; full scale is 1, and at most {LOUDEST:g} is taken for sound")
    if observation.frames is not NO_FRAMES:
        _check_plain("frames", observation.frames)
    if problem := grammar.problem(observation.frames, observation.events):
        raise MissingSenseError(f"observation: {problem}. Leave them out, or make the engine with more room")


def _check_plain(name: str, x: Tensor) -> None:
    if type(x) is not Tensor or x.device.type != "cpu" or x.layout != torch.strided or x.requires_grad or x.is_neg():
        raise ValueError(
            f"observation: {name} must be a plain tensor, dense, on the CPU, without a gradient or a view of "
            f"negatives; this {type(x).__name__} on {x.device} is not: give {name}.detach().cpu().clone()"
        )


def _form(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def audio_observations(audio: Tensor) -> list[Observation]:
    """audio fp32 [N, 3200], of N sessions or N chunks -> N observations with audio only."""
    return [Observation(chunk) for chunk in audio.unbind()]


def stack_audio(observations: Sequence[Observation]) -> Tensor:
    """The audio of N observations, fp32 [N, 3200]."""
    return torch.stack([observation.audio for observation in observations])

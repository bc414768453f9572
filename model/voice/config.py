"""The shape of a model's voice, as its ``config.json`` keeps it (``voice_config``), and what a chunk of sound is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from model.program.ranges import Range

FRAMES, BANDS = 20, 80
"""A chunk of voice is fp32 [FRAMES, BANDS]: 200 ms in frames of 10 ms, log-mel values of mean 0 and variance 1."""
NUMBERS = FRAMES * BANDS
"""Numbers of a chunk: 1,600."""
LEVELS = 256
"""Times t = i / LEVELS at which the flow is trained; a chain's steps are among them."""


@dataclass(frozen=True)
class VoiceConfig:
    """``VoiceConfig(width=256)``: a head of some two million weights."""

    width: Annotated[int, Range(16, 8192)] = 256
    blocks: Annotated[int, Range(1, 32)] = 3
    steps: Literal[2, 4, 8, 16] = 8  # of a chain, from noise to sound
    noise: Annotated[float, Range(0, 2, open_low=True)] = 0.7  # a of Flow-SDE (`model.voice.chain`)
    token: Annotated[int, Range(0, 2**24)] = 0  # of rows that hold the model's own sound; nothing else may be one

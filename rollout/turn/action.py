"""Timing of micro-turns, and the model's action in one. A *chunk* is the 200 ms of time that a micro-turn covers.

Chunk k covers the user's audio [200 k, 200 (k + 1)) ms. The action of chunk k is taken after all of chunk k's audio was
received; the user hears it before producing chunk k + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from model.senses.audio import HOP, SAMPLE_RATE_HZ

CHUNK_MS = 200
CHUNKS_PER_SECOND = 1000 // CHUNK_MS
CHUNK_SAMPLES = SAMPLE_RATE_HZ * CHUNK_MS // 1000  # 3200
CHUNK_FRAMES = CHUNK_SAMPLES // HOP  # dMel frames, and so audio tokens, of a chunk: 4


class Mode(StrEnum):
    """The first decision of a micro-turn: say nothing, say words, or hand a request to the background model."""

    LISTEN = "listen"
    SPEAK = "speak"
    DELEGATE = "delegate"


@dataclass(frozen=True)
class Action:
    """What the model did in one chunk. Raises ValueError for words or sound in mode listen, for no words or sound in
    mode delegate.

    Example: ``Action(Mode.SPEAK, ("breathe",))``; silence is `LISTEN`. A model with a voice needs several chunks for
    most words, and speaks without a new word while it goes on with the last one (`GO_ON`).
    """

    mode: Mode
    words: tuple[str, ...] = ()  # [0..K] lower-case words
    sound: Tensor | None = field(default=None, compare=False, repr=False)  # fp32 [FRAMES, BANDS], if there is a voice

    def __post_init__(self) -> None:
        if self.sound is not None and self.mode is not Mode.SPEAK:
            raise ValueError(f"an action in mode {self.mode.value!r} cannot have sound")
        if self.words if self.mode is Mode.LISTEN else self.mode is Mode.DELEGATE and not self.words:
            raise ValueError(f"an action in mode {self.mode.value!r} cannot have the words {self.words!r}")

    @property
    def speaks(self) -> bool:
        """Whether the user hears something."""
        return self.mode is Mode.SPEAK


LISTEN = Action(Mode.LISTEN)
GO_ON = Action(Mode.SPEAK)


def speak(*words: str) -> Action:
    """The action of saying ``words`` in one chunk."""
    return Action(Mode.SPEAK, words)

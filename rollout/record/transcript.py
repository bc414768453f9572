"""A scripted conversation as the token sequence that a session with these actions would have.

Demonstrations for supervised training are made this way. Sessions and transcripts use one grammar
(`rollout.turn.grammar`), and a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.senses.audio import DMel
from rollout.record.episode import Choices
from rollout.turn.action import CHUNK_FRAMES, Action
from rollout.turn.grammar import Grammar, row_class


@dataclass(frozen=True)
class Transcript:
    """A conversation of T tokens, A of them audio, and which tokens are targets of the model."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    text: Choices  # the targets


def from_audio(audio: NDArray[np.float32], actions: Sequence[Action], grammar: Grammar) -> Transcript:
    """As `write_transcript`, from audio float32 [chunks, CHUNK_SAMPLES] or [chunks * CHUNK_SAMPLES] at 16 kHz."""
    codes = DMel.build().codes(torch.from_numpy(audio.reshape(1, -1)))[0]
    return write_transcript(codes.unflatten(0, (-1, CHUNK_FRAMES)), actions, grammar)


def write_transcript(codes: Tensor, actions: Sequence[Action], grammar: Grammar) -> Transcript:
    """From dMel codes uint8 [chunks, CHUNK_FRAMES, 80] and one action for each chunk. Raises ValueError when the
    numbers of chunks differ or an action has too many or unknown words."""
    if len(codes) != len(actions):
        raise ValueError(f"transcript: {len(codes)} chunks of audio but {len(actions)} actions")
    tokens = [grammar.vocabulary.bos]
    chosen: list[tuple[int, int, int]] = []
    for k, action in enumerate(actions):
        tokens += grammar.observed
        try:
            sampled = grammar.write(action)
        except ValueError as error:
            raise ValueError(f"transcript: chunk {k}: {error}") from error
        chosen += [(len(tokens) + i, row_class(i), k) for i in range(len(sampled))]
        tokens += sampled + grammar.forced(sampled)
    text = Choices(*(torch.tensor(column) for column in zip(*chosen, strict=True)))
    return Transcript(torch.tensor(tokens), codes.flatten(0, 1), text)

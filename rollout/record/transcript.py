"""How a known conversation is written as the token sequence a session would have made of it.

Scripted demonstrations become training sequences through here. The rows are the session's own (a test holds the two
equal), by one grammar (`rollout.turn.grammar`).
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
    """Tokens of a conversation and which of them the model is to choose. T tokens, A audio rows."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    text: Choices


def from_audio(audio: NDArray[np.float32], actions: Sequence[Action], grammar: Grammar) -> Transcript:
    """audio float32 [chunks, CHUNK_SAMPLES] or the same samples in a row, one action a chunk. Raises ValueError as
    `write_transcript` does."""
    codes = DMel.build().codes(torch.from_numpy(audio.reshape(1, -1)))[0]
    return write_transcript(codes.unflatten(0, (-1, CHUNK_FRAMES)), actions, grammar)


def write_transcript(codes: Tensor, actions: Sequence[Action], grammar: Grammar) -> Transcript:
    """codes uint8 [chunks, CHUNK_FRAMES, 80], one action a chunk. Raises ValueError when the counts differ or a chunk
    says what the grammar has no place for."""
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

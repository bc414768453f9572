"""How a known conversation is written as the token sequence a session would have made of it.

Scripted demonstrations become training sequences through here. The rows are the session's own (a test holds the two
equal), by one grammar (`rollout.turn.grammar`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.chunk import Action
from rollout.episode import Choices
from rollout.turn.grammar import Grammar, row_class


@dataclass(frozen=True)
class Transcript:
    """Tokens of a conversation and which of them the model is to choose. T tokens, A audio rows."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    text: Choices


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

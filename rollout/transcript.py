"""How a known conversation is written as the token sequence a session would have made of it.

Scripted demonstrations become training sequences through here. The layout is the session's own (a test holds the two
equal): bos, then for every chunk its audio rows, the mode token and, if it speaks, its words and the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.logprob import FIRST_TEXT, MODE, NEXT_TEXT
from rollout.chunk import CHUNK_FRAMES, Action, Mode
from rollout.vocabulary import Vocabulary


@dataclass(frozen=True)
class Transcript:
    """Tokens of a conversation and which of them the model is to choose. T tokens, A audio rows, N chosen."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    sampled_at: Tensor  # int64 [N]
    row_class: Tensor  # int64 [N]
    chunk: Tensor  # int64 [N]


def write_transcript(
    codes: Tensor, actions: Sequence[Action], vocabulary: Vocabulary, words_per_chunk: int
) -> Transcript:
    """codes uint8 [chunks, CHUNK_FRAMES, 80], one action a chunk. Raises ValueError when the counts differ or a chunk
    says more than ``words_per_chunk``."""
    if len(codes) != len(actions):
        raise ValueError(f"transcript: {len(codes)} chunks of audio but {len(actions)} actions")
    tokens = [vocabulary.bos]
    chosen: list[tuple[int, int, int]] = []

    def choose(token: int, row_class: int, chunk: int) -> None:
        chosen.append((len(tokens), row_class, chunk))
        tokens.append(token)

    for k, action in enumerate(actions):
        tokens += [vocabulary.audio] * CHUNK_FRAMES
        choose(vocabulary.mode_id(action.mode), MODE, k)
        if action.mode is Mode.LISTEN:
            continue
        if not 1 <= len(action.words) <= words_per_chunk:
            raise ValueError(f"transcript: chunk {k} says {len(action.words)} words, need 1 to {words_per_chunk}")
        for i, word in enumerate(action.words):
            choose(vocabulary.word_id(word), NEXT_TEXT if i else FIRST_TEXT, k)
        if len(action.words) < words_per_chunk:
            choose(vocabulary.end, NEXT_TEXT, k)
        else:
            tokens.append(vocabulary.end)
    sampled_at, row_class, chunk = (torch.tensor(column) for column in zip(*chosen, strict=True))
    return Transcript(torch.tensor(tokens), codes.flatten(0, 1), sampled_at, row_class, chunk)

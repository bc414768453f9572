"""The grammar of a micro-turn: its rows, their order, which of them the model samples and from which tokens.

    [bos] observed: audio x 4 | sampled: mode [word ... end]      one micro-turn after another, bos before the first

- **Observed** rows are given: one a dMel frame. Self audio, video patches and text events will follow the audio, in
  this order, when a model has them.
- **Sampled** rows are the model's: the mode; unless that is *listen*, words and the end of the turn. The mode is drawn
  from the modes, the first word from the words, every further token from the words and the end. A voice comes after.
- The end after the last word that fits is **forced**: written, but not sampled, since nothing else could follow.

Everything that writes, cuts or counts rows reads it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.logprob import MODE, NEXT_TEXT
from rollout.turn.action import CHUNK_FRAMES, Action, Mode
from rollout.turn.vocabulary import Vocabulary

AUDIO_ROWS = CHUNK_FRAMES
"""Rows of a micro-turn that hold the audio token."""


def row_class(sampled: int) -> int:
    """Class (`model.logprob`) of the token that is sampled after ``sampled`` others of its micro-turn: MODE, then
    FIRST_TEXT, then NEXT_TEXT for good."""
    return min(MODE + sampled, NEXT_TEXT)


def turn_rows(words: int, words_per_chunk: int) -> tuple[int, int]:
    """(rows, sampled ones among them) of a micro-turn that says so many words, 0 to ``words_per_chunk``."""
    if words == 0:
        return AUDIO_ROWS + 1, 1
    return AUDIO_ROWS + 1 + words + 1, 1 + words + (words < words_per_chunk)


def max_rows(words_per_chunk: int) -> int:
    """Rows of one micro-turn at most, the forced end included."""
    return turn_rows(words_per_chunk, words_per_chunk)[0]


def context_rows(chunks: int, words_per_chunk: int) -> int:
    """Rows of a session of that many micro-turns at most: the context that an engine needs for it."""
    return 1 + chunks * max_rows(words_per_chunk)


def chunk_starts(tokens: Sequence[int], audio: int) -> list[int]:
    """Where the audio of each chunk begins in a stretch of whole micro-turns; ``audio`` is the audio token's id.

    >>> chunk_starts([1, 2, 2, 2, 2, 3, 2, 2, 2, 2, 4, 90, 6], audio=2)
    [1, 6]
    """
    return [row for row, token in enumerate(tokens) if token == audio][::AUDIO_ROWS]


def chunk_ends(tokens: Tensor, audio: int) -> Tensor:
    """The last row of every chunk of one conversation; tokens int64 [T], ``audio`` the audio token's id -> int64
    [chunks].

    >>> chunk_ends(torch.tensor([1, 2, 2, 2, 2, 3, 2, 2, 2, 2, 4, 90, 6]), audio=2).tolist()
    [5, 12]
    """
    heard = tokens == audio
    ends = (~heard[:-1] & heard[1:]).nonzero()[1:, 0]  # the first is bos
    return torch.cat((ends, torch.tensor([len(tokens) - 1])))


@dataclass(frozen=True)
class Grammar:
    """A micro-turn of up to ``words_per_chunk`` words in a vocabulary's tokens."""

    vocabulary: Vocabulary
    words_per_chunk: int

    def __post_init__(self) -> None:
        if self.words_per_chunk < 1:
            raise ValueError(f"words_per_chunk is {self.words_per_chunk}; a micro-turn needs room for 1 word or more")

    @property
    def max_sampled(self) -> int:
        """Tokens that one micro-turn samples at most."""
        return turn_rows(self.words_per_chunk, self.words_per_chunk)[1]

    @property
    def max_rows(self) -> int:
        return max_rows(self.words_per_chunk)

    @property
    def observed(self) -> list[int]:
        """The tokens of a micro-turn's observed rows."""
        return [self.vocabulary.audio] * AUDIO_ROWS

    @property
    def stops(self) -> tuple[int, int]:
        """Tokens after which a micro-turn is over, however short it is."""
        return self.vocabulary.listen, self.vocabulary.end

    def is_over(self, sampled: Sequence[int]) -> bool:
        """Whether nothing more is sampled after these tokens of a micro-turn, one or more."""
        return len(sampled) == self.max_sampled or sampled[-1] in self.stops

    def forced(self, sampled: Sequence[int]) -> list[int]:
        """What is written after all the tokens that a micro-turn sampled, without being sampled."""
        return [] if sampled[-1] in self.stops else [self.vocabulary.end]

    def read(self, sampled: Sequence[int]) -> Action:
        """What a model did whose micro-turn sampled these tokens."""
        v = self.vocabulary
        return Action(v.modes[sampled[0]], tuple(v.words[token] for token in sampled[1:] if token != v.end))

    def write(self, action: Action) -> list[int]:
        """The tokens that are sampled for an action; `read` gives it back. Raises ValueError for more words than fit
        and for a word that the tokenizer does not have."""
        v = self.vocabulary
        if action.mode is Mode.LISTEN:
            return [v.listen]
        if len(action.words) > self.words_per_chunk:
            raise ValueError(f"says {len(action.words)} words, need 1 to {self.words_per_chunk}")
        tokens = [v.mode_id(action.mode), *map(v.word_id, action.words)]
        return tokens if self.is_over(tokens) else [*tokens, v.end]

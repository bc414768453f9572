"""The grammar of a micro-turn: its rows, their order, which of them the model samples and from which tokens.

    [bos] observed: audio x 4, own sound x 4, patches, events | sampled: mode [word ... end]    bos before the first

- **Observed** rows are input: one per dMel frame of the user's sound, one per dMel frame of what the model itself said
  in the chunk before (if it has a voice and was heard), one per video patch, then the words of text events.
- **Sampled** rows are the model's output: the mode; unless that is *listen*, words and the end token. The mode is
  sampled from the modes, the first word from the words, every further token from the words and the end token.
- **Forced**: after ``words_per_chunk`` words the end token is written without being sampled, since only it can follow.
- **Voice**: in mode *speak* the hidden state of the end token's row gives a chunk of sound, a stream of its own
  (`model.voice.chain`), which takes no row. A model with a voice may speak without a word: it goes on with the last.

All code that writes, selects or counts rows uses this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.config import SMALL_PATCH
from model.inputs import NONE
from model.logprob import MODE, NEXT_TEXT
from model.senses.video import NO_FRAMES, patch_count
from rollout.turn.action import CHUNK_FRAMES, GO_ON, Action, Mode
from rollout.turn.summary import Summary
from rollout.turn.vocabulary import Vocabulary

AUDIO_ROWS = CHUNK_FRAMES
"""Rows of a micro-turn that hold the audio token."""
OWN_ROWS = CHUNK_FRAMES
"""Rows of a micro-turn that hold the model's own sound of the chunk before, if it was heard."""

NO_LIMIT = 2**31 - 1
"""Micro-turns of a session that has no end."""


def row_class(sampled: int) -> int:
    """Row class (`model.logprob`) of a micro-turn's sampled token number ``sampled``, from 0: MODE, FIRST_TEXT,
    NEXT_TEXT, NEXT_TEXT, … of a model without a voice (`Grammar.row_class`)."""
    return min(MODE + sampled, NEXT_TEXT)


def turn_rows(words: int, words_per_chunk: int, extra: int = 0) -> tuple[int, int]:
    """(all rows, sampled rows) of a micro-turn with ``words`` words, 0 to ``words_per_chunk``, and with ``extra``
    observed rows beside audio: patches and events."""
    if words == 0:
        return AUDIO_ROWS + extra + 1, 1
    return AUDIO_ROWS + extra + 1 + words + 1, 1 + words + (words < words_per_chunk)


def max_rows(words_per_chunk: int, extra: int = 0) -> int:
    """The most rows that one micro-turn can have, a forced end token included."""
    return turn_rows(words_per_chunk, words_per_chunk, extra)[0]


def context_rows(chunks: int, words_per_chunk: int, extra: int = 0) -> int:
    """The most rows that a session of ``chunks`` micro-turns can have: the context length that an engine needs."""
    return 1 + chunks * max_rows(words_per_chunk, extra)


def check_context(field: str, max_tokens: int, chunks: int, words_per_chunk: int, extra: int = 0) -> None:
    """Raises MetronomeError when a session of ``max_tokens``, the value of a recipe's ``field``, cannot hold every
    episode of ``chunks`` micro-turns, whatever is said and shown."""
    if (rows := context_rows(chunks, words_per_chunk, extra)) > max_tokens:
        words = "1 word" if words_per_chunk == 1 else f"{words_per_chunk} words"
        beside = f" and {extra} rows of video and events" if extra else ""
        raise MetronomeError(
            f"recipe: {field} is {max_tokens}: episodes of {chunks} chunks, with up to {words}{beside} in each, take "
            f"up to {rows} tokens; give at least {rows}, or fewer chunks (scenarios) or words (words_per_chunk)"
        )


def context_chunks(rows: int, words_per_chunk: int, extra: int = 0) -> int:
    """The most micro-turns that fit in a context of ``rows``, whatever is said: the inverse of `context_rows`.

    >>> context_chunks(context_rows(12, 1), 1), context_chunks(context_rows(12, 1) - 1, 1)
    (12, 11)
    """
    return (rows - 1) // max_rows(words_per_chunk, extra)


def chunk_starts(tokens: Sequence[int], audio: int) -> list[int]:
    """Index of each chunk's first audio row in a sequence of whole micro-turns; ``audio`` is the audio token's id.

    >>> chunk_starts([1, 2, 2, 2, 2, 3, 2, 2, 2, 2, 4, 90, 6], audio=2)
    [1, 6]
    """
    return [row for row, token in enumerate(tokens) if token == audio][::AUDIO_ROWS]


def chunk_ends(tokens: Tensor, audio: int) -> Tensor:
    """Index of each chunk's last row in one conversation: tokens int64 [T] -> int64 [chunks]. ``audio`` is the audio
    token's id.

    >>> chunk_ends(torch.tensor([1, 2, 2, 2, 2, 3, 2, 2, 2, 2, 4, 90, 6]), audio=2).tolist()
    [5, 12]
    """
    is_audio = tokens == audio
    ends = (~is_audio[:-1] & is_audio[1:]).nonzero()[1:, 0]  # without bos, the first
    return torch.cat((ends, torch.tensor([len(tokens) - 1])))


@dataclass(frozen=True)
class Grammar:
    """The grammar for one vocabulary and the most words that a micro-turn may say (ValueError below 1), video patches
    that it may see, and words of events that it may read."""

    vocabulary: Vocabulary
    words_per_chunk: int
    max_patches: int = 0
    max_event_words: int = 0
    patch: int = SMALL_PATCH  # side of the model's video patches, pixels (`model.inputs.Senses`)
    summary: Summary | None = None  # the rule by which long sessions are summarised
    own: int = NONE  # id of the token of the model's own sound; NONE without a voice (`model.inputs.Senses`)

    def __post_init__(self) -> None:
        if self.words_per_chunk < 1:
            raise ValueError(f"words_per_chunk is {self.words_per_chunk}; a micro-turn needs room for 1 word or more")
        if self.summary is not None:
            self.summary.check(self.max_rows)
        if self.voice:
            self._check_own()

    def _check_own(self) -> None:
        """Raises MetronomeError for a token of own sound that the vocabulary lacks, or that stands for something."""
        v, allowed = self.vocabulary, self.vocabulary.classes.allowed
        taken = {v.bos, v.audio, v.image, v.end, *v.modes}
        if self.own >= allowed.shape[1] or self.own in taken or bool(allowed[:, self.own].any()):
            known = v.words[self.own] if self.own < len(v.words) else ""
            what = f"is {known!r}, which has a meaning" if known else f"is none of its {allowed.shape[1]}"
            raise MetronomeError(
                f"the model's voice_config: token {self.own} of the vocabulary {what}; give one that nobody says "
                f"(model.voice.token {v.ids.get('<|pad|>', 0)})"
            )

    @property
    def max_sampled(self) -> int:
        """The most tokens that one micro-turn can sample."""
        return turn_rows(self.words_per_chunk, self.words_per_chunk)[1]

    @property
    def max_rows(self) -> int:
        """The most rows that one micro-turn can have."""
        return max_rows(self.words_per_chunk, self.extra)

    @property
    def most_new_rows(self) -> int:
        """The most rows that one forward pass computes for a session: a micro-turn's, and the beginning of a context or
        a request before it."""
        return self.max_rows + (0 if self.summary is None else 1 + self.summary.rows)

    def needs_summary(self, rows: int) -> bool:
        """Whether a context of ``rows`` tokens is to be summarised before the next micro-turn."""
        return self.summary is not None and self.summary.is_due(rows, self.max_rows)

    def summary_is_over(self, sampled: Sequence[int]) -> bool:
        """Whether a summary of these sampled tokens (at least one) has no more."""
        assert self.summary is not None
        return len(sampled) == self.summary.words or sampled[-1] == self.vocabulary.end

    def begin_context(self, sampled: Sequence[int]) -> list[int]:
        """The first tokens of the context after a summary of these sampled tokens."""
        return [self.vocabulary.bos, *(token for token in sampled if token != self.vocabulary.end)]

    @property
    def extra(self) -> int:
        """The most observed rows beside audio that one micro-turn can have."""
        return self.max_patches + self.max_event_words + (OWN_ROWS if self.voice else 0)

    @property
    def voice(self) -> bool:
        """Whether the model has a voice."""
        return self.own != NONE

    def row_class(self, sampled: Sequence[int]) -> int:
        """Row class of the token that follows a micro-turn's sampled ones: as the function `row_class` says but, with a
        voice, NEXT_TEXT directly after mode speak, where no word need follow."""
        may_go_on = self.voice and len(sampled) == 1 and self.vocabulary.modes[sampled[0]] is Mode.SPEAK
        return NEXT_TEXT if may_go_on else row_class(len(sampled))

    def observed(self, frames: Tensor = NO_FRAMES, events: Sequence[str] = (), heard_itself: bool = False) -> list[int]:
        """The tokens of a micro-turn's observed rows: audio, the model's own sound if there was some, the patches of
        ``frames`` uint8 [F, H, W, 3], the words of events."""
        v = self.vocabulary
        own = [self.own] * OWN_ROWS if heard_itself else []
        rows = [v.audio] * AUDIO_ROWS + own + [v.image] * patch_count(frames, self.patch)
        return rows + [word for text in events for word in v.encode(text)] if events else rows

    def problem(self, frames: Tensor, events: Sequence[str]) -> str:
        """Why a micro-turn cannot have these frames or events; "" if it can."""
        if (patches := patch_count(frames, self.patch)) > self.max_patches:
            allowed = f"{self.max_patches} patches (max_patches)" if self.max_patches else "no video (max_patches is 0)"
            return f"its frames are cut into {patches} patches, but a micro-turn of this engine has room for {allowed}"
        words = len(self.observed(events=events)) - AUDIO_ROWS if events else 0
        if words > self.max_event_words:
            return (
                f"its text events have {words} words, but a micro-turn of this engine has room for "
                f"{self.max_event_words} (max_event_words)"
            )
        return ""

    @property
    def stops(self) -> tuple[int, int]:
        """The tokens that end a micro-turn when sampled."""
        return self.vocabulary.listen, self.vocabulary.end

    def is_over(self, sampled: Sequence[int]) -> bool:
        """Whether a micro-turn that has sampled these tokens (at least one) samples no more."""
        return len(sampled) == self.max_sampled or sampled[-1] in self.stops

    def forced(self, sampled: Sequence[int]) -> list[int]:
        """The tokens written after all sampled ones without being sampled: the end token, or nothing."""
        return [] if sampled[-1] in self.stops else [self.vocabulary.end]

    def read(self, sampled: Sequence[int]) -> Action:
        """The action that a micro-turn's sampled tokens stand for."""
        v = self.vocabulary
        return Action(v.modes[sampled[0]], tuple(v.words[token] for token in sampled[1:] if token != v.end))

    def write(self, action: Action) -> list[int]:
        """The sampled tokens that stand for an action, the inverse of `read`. Raises ValueError for too many words and
        for a word that the tokenizer does not have."""
        v = self.vocabulary
        if action.mode is Mode.LISTEN:
            return [v.listen]
        goes_on = self.voice and action == GO_ON
        if len(action.words) > self.words_per_chunk or not (action.words or goes_on):
            raise ValueError(f"says {len(action.words)} words, need {0 if self.voice else 1} to {self.words_per_chunk}")
        tokens = [v.mode_id(action.mode), *map(v.word_id, action.words)]
        return tokens if self.is_over(tokens) else [*tokens, v.end]

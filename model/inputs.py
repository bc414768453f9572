"""The model's input: rows of many sequences, packed one after another (no batch axis, no padding).

Every row has a token; a row that holds the audio token also has the dMel codes of one frame of sound, one that holds
the image token a patch of video, one that holds the token of the model's own sound the codes of a frame of that.
`Inputs.cut` and `Inputs.part` select rows and keep all of it together. By the row contract of `kernels.ops` a
sequence's results do not depend, by a bit, on what is packed beside it or in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from kernels.layout import Segments
from model.senses.video import Frames, Patches

NONE = -1
"""No token's id: of a model without a voice."""


@dataclass(frozen=True, slots=True)
class Senses:
    """How a model takes what is no text (`model.backbone.transformer.InteractionModel.senses`)."""

    audio: int  # id of the audio token
    image: int  # id of the image token
    patch: int  # side of a video patch, pixels
    own: int = NONE  # id of the token of the model's own sound


def one_context() -> Tensor:
    """`Conversation.contexts` of a conversation that is one sequence; a tensor of its own, so that it can be saved."""
    return torch.zeros(1, dtype=torch.int64)


class Conversation(Protocol):
    """One conversation, as the model needs it; episodes and transcripts are such. It is one sequence, or several, the
    *contexts*: where a model summarises, the next context begins with the summary, and what is before is forgotten."""

    @property
    def tokens(self) -> Tensor:
        """int64 [T]"""

    @property
    def codes(self) -> Tensor:
        """uint8 [A, channels], dMel bins of the rows that hold the audio token, in order."""

    @property
    def frames(self) -> Frames:
        """What the rows that hold the image token are patches of, in order."""

    @property
    def own(self) -> Tensor:
        """uint8 [B, channels], dMel bins of the rows that hold the token of the model's own sound, in order."""

    @property
    def contexts(self) -> Tensor:
        """int64 [C], index of the first token of each context, ascending from 0."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """T rows of S conversations, A of them audio, P patches and B the model's own sound. Make it with `of` or `cat`,
    which check that the parts agree.

    Example: ``cat([episode, other], senses).cut([9, 9])`` are the first nine rows of both.
    """

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, channels]
    patches: Patches  # P
    own: Tensor  # uint8 [B, channels]
    audio_rows: Tensor  # int64 [A], ascending: the row of each frame of codes
    image_rows: Tensor  # int64 [P], ascending: the row of each patch
    own_rows: Tensor  # int64 [B], ascending: the row of each frame of own sound
    segments: Segments  # which rows are of which sequence, and where in it
    starts: list[int]  # the first row of each conversation, [S]

    @staticmethod
    def of(
        tokens: Tensor,
        codes: Tensor,
        patches: Patches,
        segments: Segments,
        senses: Senses,
        starts: list[int] | None = None,
        own: Tensor | None = None,
    ) -> Inputs:
        """tokens int64 [T], codes uint8 [A, channels], own uint8 [B, channels] (None is none); ``starts``: by default
        each segment is a conversation. Raises ValueError unless segments has T rows, and tokens A audio tokens, B of
        own sound and as many image tokens as there are patches."""
        if tokens.shape[0] != segments.rows:
            raise ValueError(f"tokens has {tokens.shape[0]} rows, segments {segments.rows}")
        audio_rows = (tokens == senses.audio).nonzero()[:, 0]
        if audio_rows.shape[0] != codes.shape[0]:
            raise ValueError(f"tokens holds {audio_rows.shape[0]} audio tokens, but codes has {codes.shape[0]} rows")
        image_rows = (tokens == senses.image).nonzero()[:, 0]
        if image_rows.shape[0] != len(patches):
            raise ValueError(f"tokens holds {image_rows.shape[0]} image tokens, but there are {len(patches)} patches")
        own = codes[:0] if own is None else own
        own_rows = _NO_ROWS if senses.own == NONE else (tokens == senses.own).nonzero()[:, 0]
        if own_rows.shape[0] != own.shape[0]:
            raise ValueError(
                f"tokens holds {own_rows.shape[0]} tokens of own sound, but its codes have {own.shape[0]} rows"
            )
        starts = segments.offset[:-1].tolist() if starts is None else starts
        return Inputs(tokens, codes, patches, own, audio_rows, image_rows, own_rows, segments, starts)

    @staticmethod
    def cat(conversations: Sequence[Conversation], senses: Senses) -> Inputs:
        """Whole conversations, each of their contexts from position 0 on. Raises ValueError as `of` does."""
        lengths = [len(c.tokens) for c in conversations]
        parts = [_context_lengths(c.contexts.tolist(), n) for c, n in zip(conversations, lengths, strict=True)]
        return Inputs.of(
            torch.cat([c.tokens for c in conversations]),
            torch.cat([c.codes for c in conversations]),
            Patches.cat([c.frames.patches(senses.patch) for c in conversations]),
            _whole([n for part in parts for n in part]),
            senses,
            _starts(lengths),
            torch.cat([c.own for c in conversations]),
        )

    def cut(self, lengths: Sequence[int]) -> Inputs:
        """The first ``lengths[s]`` rows of each whole conversation s (one at least)."""
        begins, contexts = self.segments.offset[:-1].tolist(), []
        for start, length in zip(self.starts, lengths, strict=True):
            contexts += _context_lengths([b - start for b in begins if start <= b < start + length], length)
        return self.part([(s, 0, length) for s, length in enumerate(lengths)], _whole(contexts))

    def part(self, spans: Sequence[tuple[int, int, int]], segments: Segments) -> Inputs:
        """Rows ``first`` … ``end - 1`` of conversation s for every span (s, first, end), in the order of the spans;
        ``segments`` says which sequence each span continues (`model.backbone.state.SessionState.extend`). Raises
        ValueError unless it has as many rows as the spans."""
        cuts = [(self.starts[s] + first, self.starts[s] + end) for s, first, end in spans]
        if (rows := sum(end - first for first, end in cuts)) != segments.rows:
            raise ValueError(f"the spans have {rows} rows, segments {segments.rows}")
        sound, audio_rows = _moved(self.audio_rows, cuts)
        shown, image_rows = _moved(self.image_rows, cuts)
        said, own_rows = _moved(self.own_rows, cuts)
        return Inputs(
            torch.cat([self.tokens[first:end] for first, end in cuts]),
            torch.cat([self.codes[a:b] for a, b in sound]),
            self.patches.part(shown),
            torch.cat([self.own[a:b] for a, b in said]),
            audio_rows,
            image_rows,
            own_rows,
            segments,
            _starts([end - first for first, end in cuts]),
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """What one forward pass reads, beside the kernels (`model.backbone.transformer.InteractionModel.place`)."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, channels]
    audio_rows: Tensor  # int64 [A]
    pictures: Tensor  # uint8 [Q, p, p, 3], as in `Patches`, and so `inside`
    inside: Tensor  # int16 [Q, 2]
    steps: Tensor  # int64 [2, P], see `Patches.steps`
    image_rows: Tensor  # int64 [P]
    own: Tensor  # uint8 [B, channels]
    own_rows: Tensor  # int64 [B]
    segments: Segments
    tau: Tensor | None  # fp32 [T], the factor of the rows' scores in global layers, when log scaling is on
    more: tuple[Tensor, ...]  # what the caller sent with them


_NO_ROWS = torch.empty(0, dtype=torch.int64)


def _moved(rows: Tensor, cuts: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], Tensor]:
    """Of ``rows``, ascending: those within each cut (first, end), as spans of their indices, and where they are when
    the cuts lie one after another."""
    spans: list[tuple[int, int]] = torch.searchsorted(rows, torch.tensor(cuts, device=rows.device)).tolist()
    moved, row = [], 0
    for (first, end), (a, b) in zip(cuts, spans, strict=True):
        moved.append(rows[a:b] + (row - first))
        row += end - first
    return spans, torch.cat(moved)


def _starts(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))[:-1]


def _context_lengths(contexts: list[int], length: int) -> list[int]:
    """Of a conversation of ``length`` tokens. Raises ValueError unless the contexts begin at 0 and ascend within it."""
    ends = [*contexts[1:], length]
    if not contexts or contexts[0] or any(a >= b for a, b in zip(contexts, ends, strict=True)):
        raise ValueError(f"contexts that begin at {contexts[:9]} do not divide a conversation of {length} tokens")
    return [end - begin for begin, end in zip(contexts, ends, strict=True)]


def _whole(lengths: Sequence[int]) -> Segments:
    return Segments.build(list(range(len(lengths))), [0] * len(lengths), list(lengths))

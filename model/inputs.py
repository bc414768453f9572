"""The model's input: rows of many sequences, packed one after another (no batch axis, no padding).

Every row has a token; a row that holds the audio token also has the dMel codes of one frame. `Inputs.cut` and
`Inputs.part` select rows and keep tokens and codes together. By the row contract of `kernels.ops` a sequence's results
do not depend, by a bit, on what is packed beside it or in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.layout import Segments


class Conversation(Protocol):
    """One whole sequence, as the model needs it; episodes and transcripts are such."""

    @property
    def tokens(self) -> Tensor:
        """int64 [T]"""

    @property
    def codes(self) -> Tensor:
        """uint8 [A, channels], dMel bins of the rows that hold the audio token, in order."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """T rows of S sequences, A of them audio. Make it with `of` or `cat`, which check that tokens and codes agree.

    Example: ``cat([episode, other], audio).cut([9, 9])`` are the first nine rows of both.
    """

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, channels]
    audio_rows: Tensor  # int64 [A], ascending: the row of each frame of codes
    segments: Segments  # which rows are of which sequence, and where in it

    @staticmethod
    def of(tokens: Tensor, codes: Tensor, segments: Segments, audio: int) -> Inputs:
        """tokens int64 [T], codes uint8 [A, channels]; ``audio`` is the audio token's id. Raises ValueError unless
        segments has T rows and tokens A audio tokens."""
        if tokens.shape[0] != segments.rows:
            raise ValueError(f"tokens has {tokens.shape[0]} rows, segments {segments.rows}")
        rows = (tokens == audio).nonzero()[:, 0]
        if rows.shape[0] != codes.shape[0]:
            raise ValueError(f"tokens holds {rows.shape[0]} audio tokens, but codes has {codes.shape[0]} rows")
        return Inputs(tokens, codes, rows, segments)

    @staticmethod
    def cat(conversations: Sequence[Conversation], audio: int) -> Inputs:
        """Whole sequences, each from position 0 on; ``audio`` is the audio token's id."""
        return Inputs.of(
            torch.cat([c.tokens for c in conversations]),
            torch.cat([c.codes for c in conversations]),
            _whole([len(c.tokens) for c in conversations]),
            audio,
        )

    @property
    def starts(self) -> list[int]:
        """The first row of each sequence, [S]."""
        return self.segments.offset[:-1].tolist()

    def cut(self, lengths: Sequence[int]) -> Inputs:
        """The first ``lengths[s]`` rows of each whole sequence s."""
        return self.part([(s, 0, length) for s, length in enumerate(lengths)], _whole(lengths))

    def part(self, spans: Sequence[tuple[int, int, int]], segments: Segments) -> Inputs:
        """Rows ``first`` … ``end - 1`` of sequence s for every span (s, first, end), in the order of the spans;
        ``segments`` says which sequence each span continues (`model.backbone.state.SessionState.extend`). Raises
        ValueError unless it has as many rows as the spans."""
        starts = self.starts
        cuts = [(starts[s] + first, starts[s] + end) for s, first, end in spans]
        frames = torch.searchsorted(self.audio_rows, torch.tensor(cuts, device=self.audio_rows.device)).tolist()
        moved, row = [], 0
        for (first, end), (a, b) in zip(cuts, frames, strict=True):
            moved.append(self.audio_rows[a:b] + (row - first))
            row += end - first
        if row != segments.rows:
            raise ValueError(f"the spans have {row} rows, segments {segments.rows}")
        return Inputs(
            torch.cat([self.tokens[first:end] for first, end in cuts]),
            torch.cat([self.codes[a:b] for a, b in frames]),
            torch.cat(moved),
            segments,
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """`Inputs` beside the kernels, for one forward pass (`model.backbone.transformer.InteractionModel.place`)."""

    inputs: Inputs
    tau: Tensor | None  # fp32 [T], the factor of the rows' scores in global layers, when log scaling is on
    more: tuple[Tensor, ...]  # what the caller sent with them


def _whole(lengths: Sequence[int]) -> Segments:
    return Segments.build(list(range(len(lengths))), [0] * len(lengths), list(lengths))

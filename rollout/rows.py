"""Finished conversations as packed rows: one long row of tokens, each conversation a segment starting at position 0.

The learner and the reward models read conversations through here. By the row contract of `kernels.ops` what is packed
beside a conversation, and in which order, cannot change its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.layout import Segments


class Conversation(Protocol):
    """What of an `Episode` or a `Transcript` is enough to run it through a model."""

    @property
    def tokens(self) -> Tensor:
        """int64 [T]"""

    @property
    def codes(self) -> Tensor:
        """uint8 [A, 80], dMel bins of the rows that hold the audio token, in order."""


@dataclass(frozen=True)
class Rows:
    """T rows of S conversations, A of them audio: the arguments of `InteractionModel.forward`."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    segments: Segments

    @property
    def starts(self) -> list[int]:
        """The first row of each conversation, [S]."""
        return self.segments.offset[:-1].tolist()


def pack(conversations: Sequence[Conversation], lengths: Sequence[int] | None = None) -> Rows:
    """The first ``lengths[i]`` tokens of each conversation, all by default. No audio may lie behind a cut."""
    lengths = [len(c.tokens) for c in conversations] if lengths is None else list(lengths)
    return Rows(
        tokens=torch.cat([c.tokens[:n] for c, n in zip(conversations, lengths, strict=True)]),
        codes=torch.cat([c.codes for c in conversations]),
        segments=Segments.build(list(range(len(lengths))), [0] * len(lengths), lengths),
    )

"""Conversations that begin alike are read once for as long as they do: the rollouts of a group share their scenario.

By the row contract of `kernels.ops` a row's bits depend on its own conversation's past only, so that rows shared by
many give each of them what it would have got alone. Conversations make a tree of *stems*, stretches of rows that all
below them share; one forward pass takes all stems of one depth, each continuing a fork of its parent's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.inputs import Conversation, Inputs
from rollout.turn.grammar import chunk_ends

LEAST_ROWS = 24
"""Of a stem that is worth a place in the tree; shorter ones are read with each of the conversations that share them."""


@dataclass(frozen=True, eq=False)
class Stem:
    """Rows ``first`` … ``end - 1``, equal in all ``members``, as is all before them."""

    members: list[int]
    first: int
    end: int
    branches: list[Stem] = field(default_factory=list)  # go on from here


def tree(conversations: Sequence[Conversation], audio: int) -> list[Stem]:
    """The stems that begin at row 0. Every row of every conversation is in exactly one stem of its path."""
    return list(_stems([_rows(c, audio) for c in conversations], list(range(len(conversations))), 0))


def _rows(conversation: Conversation, audio: int) -> NDArray[np.uint8]:
    """What each row is, as bytes: its token, and its codes where it is heard. [T, 8 + channels]"""
    tokens, codes = conversation.tokens, conversation.codes
    rows = np.zeros((len(tokens), 8 + codes.shape[1]), np.uint8)
    rows[:, :8] = tokens.numpy()[:, None].view(np.uint8)
    rows[(tokens == audio).numpy(), 8:] = codes.numpy()
    return rows


def _stems(rows: Sequence[NDArray[np.uint8]], members: list[int], first: int) -> Iterator[Stem]:
    """The stems at row ``first`` of members that are equal before it."""
    lead, end = rows[members[0]], min(len(rows[m]) for m in members)
    for m in members[1:]:
        differs = (rows[m][first:end] != lead[first:end]).any(1)
        end = first + int(differs.argmax()) if differs.any() else end
    parts: dict[bytes, list[int]] = {}
    for m in members:
        if end < len(rows[m]):
            parts.setdefault(rows[m][end].tobytes(), []).append(m)
    ended = [m for m in members if end == len(rows[m])]
    if end - first < LEAST_ROWS and len(members) > 1:
        for part in [*parts.values(), *([m] for m in ended)]:
            yield from _stems(rows, part, first)
    else:
        yield Stem(members, first, end, [s for part in parts.values() for s in _stems(rows, part, end)])


@torch.inference_mode()
def last_hidden(backbone: InteractionModel, conversations: Sequence[Conversation]) -> list[Tensor]:
    """The hidden state of each chunk's last row, [chunks, D] for every conversation."""
    audio = backbone.audio_token_id
    ends = [chunk_ends(c.tokens, audio) for c in conversations]
    inputs = Inputs.cat(conversations, audio)
    longest = max(len(c.tokens) for c in conversations)
    rows = sum(len(c.tokens) for c in conversations)
    state = SessionState(backbone.config, len(conversations), longest, backbone.dtype, max_rows=rows)
    found: list[list[Tensor]] = [[] for _ in conversations]
    level = [(stem, state.open()) for stem in tree(conversations, audio)]
    while level:
        segments = state.extend([slot for _, slot in level], [stem.end - stem.first for stem, _ in level])
        spans = [(stem.members[0], stem.first, stem.end) for stem, _ in level]
        hidden = backbone(inputs.part(spans, segments), state)
        for (stem, _), start in zip(level, segments.offset.tolist(), strict=False):
            for m in stem.members:
                inside = ends[m][(ends[m] >= stem.first) & (ends[m] < stem.end)]
                found[m].append(hidden[inside + (start - stem.first)])
        level = [(branch, slot) for stem, origin in level for branch, slot in _forked(state, stem, origin)]
    return [torch.cat(parts) for parts in found]


def _forked(state: SessionState, stem: Stem, slot: int) -> list[tuple[Stem, int]]:
    """A slot for each branch: the first one keeps the stem's."""
    if not stem.branches:
        state.close(slot)
        return []
    return list(zip(stem.branches, [slot, *(state.fork(slot) for _ in stem.branches[1:])], strict=True))

"""Prefix sharing: rows with which several conversations begin, as a scenario's rollouts do, are computed once.

By the row contract of `kernels.ops` a row's bits depend only on the rows before it in its conversation, so a shared row
gives each conversation the bits that it would have got alone. Conversations form a prefix tree (radix tree) whose nodes
are runs of rows. One forward pass computes all nodes of one depth; each continues a fork of its parent's cache.
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
from model.inputs import Conversation, Inputs, Senses
from model.senses.video import DIGEST_BYTES
from rollout.turn.grammar import chunk_ends

MIN_SHARED_ROWS = 24
"""Fewest rows of a node that several conversations share. Shorter shared runs are computed for each conversation, which
costs less than a further pass."""


@dataclass(frozen=True, eq=False)
class Node:
    """Rows ``first`` … ``end - 1`` of conversations that are equal up to row ``end``."""

    members: list[int]  # indices of the conversations
    first: int
    end: int
    children: list[Node] = field(default_factory=list)  # begin at row ``end``


def tree(conversations: Sequence[Conversation], senses: Senses) -> list[Node]:
    """The nodes that begin at row 0. Each row of a conversation is in exactly one node of which it is a member.
    ``senses``: the model's."""
    return list(_nodes([_rows(c, senses) for c in conversations], list(range(len(conversations))), 0))


def _rows(conversation: Conversation, senses: Senses) -> NDArray[np.uint8]:
    """Each row's input as bytes, [T, 8 + channels]: its token, and its dMel codes where it is an audio row, or a digest
    of its patch where it is one of video."""
    tokens, codes = conversation.tokens, conversation.codes
    rows = np.zeros((len(tokens), 8 + codes.shape[1]), np.uint8)
    rows[:, :8] = tokens.numpy()[:, None].view(np.uint8)
    rows[(tokens == senses.audio).numpy(), 8:] = codes.numpy()
    shown = (tokens == senses.image).numpy()
    if shown.any():
        rows[shown, 8 : 8 + DIGEST_BYTES] = np.stack(conversation.frames.patches(senses.patch).digests())
    return rows


def _nodes(rows: Sequence[NDArray[np.uint8]], members: list[int], first: int) -> Iterator[Node]:
    """The nodes that begin at row ``first``, of members that are equal before it."""
    sample, end = rows[members[0]], min(len(rows[m]) for m in members)
    for m in members[1:]:
        differs = (rows[m][first:end] != sample[first:end]).any(1)
        end = first + int(differs.argmax()) if differs.any() else end
    parts: dict[bytes, list[int]] = {}
    for m in members:
        if end < len(rows[m]):
            parts.setdefault(rows[m][end].tobytes(), []).append(m)
    ended = [m for m in members if end == len(rows[m])]
    if end - first < MIN_SHARED_ROWS and len(members) > 1:
        for part in [*parts.values(), *([m] for m in ended)]:
            yield from _nodes(rows, part, first)
    else:
        yield Node(members, first, end, [n for part in parts.values() for n in _nodes(rows, part, end)])


@torch.inference_mode()
def last_hidden(backbone: InteractionModel, conversations: Sequence[Conversation]) -> list[Tensor]:
    """The hidden state of each chunk's last row, [chunks, D] for each conversation, on the backbone's device."""
    ends = [chunk_ends(c.tokens, backbone.senses.audio) for c in conversations]
    inputs = Inputs.cat(conversations, backbone.senses)
    longest = max(len(c.tokens) for c in conversations)
    most = sum(len(c.tokens) for c in conversations)
    state = SessionState(backbone.config, len(conversations), longest, backbone.dtype, most, backbone.device)
    parts: list[list[Tensor]] = [[] for _ in conversations]
    level = [(node, state.open()) for node in tree(conversations, backbone.senses)]
    while level:
        segments = state.extend([slot for _, slot in level], [node.end - node.first for node, _ in level])
        spans = [(node.members[0], node.first, node.end) for node, _ in level]
        hidden = backbone(inputs.part(spans, segments), state)
        members, rows = [], []
        for (node, _), start in zip(level, segments.offset.tolist(), strict=False):
            for m in node.members:
                inside = ends[m][(ends[m] >= node.first) & (ends[m] < node.end)]
                members.append(m)
                rows.append(inside + (start - node.first))
        read = hidden[torch.cat(rows).to(hidden.device, non_blocking=True)]
        for m, part in zip(members, read.split([len(at) for at in rows]), strict=True):
            parts[m].append(part)
        level = [(child, slot) for node, parent_slot in level for child, slot in _forked(state, node, parent_slot)]
    return [torch.cat(of_one) for of_one in parts]


def _forked(state: SessionState, node: Node, slot: int) -> list[tuple[Node, int]]:
    """Each child with a cache slot: the first child takes over its parent's, the others get forks of it."""
    if not node.children:
        state.close(slot)
        return []
    return list(zip(node.children, [slot, *(state.fork(slot) for _ in node.children[1:])], strict=True))

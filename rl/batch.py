"""Packs episodes for the learner: one long row of tokens, each episode a segment of its own starting at position 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import Segments
from model.logprob import TokenClasses
from model.transformer import InteractionModel
from rollout.episode import Episode
from rollout.rows import pack
from rollout.transcript import Transcript


@dataclass(frozen=True)
class Batch:
    """T input rows of several episodes, N tokens that the policy chose."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    segments: Segments
    row: Tensor  # int64 [N], input row whose hidden state gives each chosen token's distribution
    target: Tensor  # int64 [N], the chosen token
    row_class: Tensor  # int64 [N]
    owner: Tensor  # int64 [N], which episode of the batch
    chunk: Tensor  # int64 [N]


def collate(episodes: Sequence[Episode | Transcript]) -> Batch:
    """Tokens after an episode's last choice are dropped: nothing is computed from them."""
    lengths = [int(e.sampled_at[-1]) for e in episodes]
    rows = pack(episodes, lengths)
    return Batch(
        tokens=rows.tokens,
        codes=rows.codes,
        segments=rows.segments,
        row=torch.cat([e.sampled_at - 1 + s for e, s in zip(episodes, rows.starts, strict=True)]),
        target=torch.cat([e.tokens[e.sampled_at] for e in episodes]),
        row_class=torch.cat([e.row_class for e in episodes]),
        owner=torch.cat([torch.full_like(e.chunk, i) for i, e in enumerate(episodes)]),
        chunk=torch.cat([e.chunk for e in episodes]),
    )


def score_choices(
    model: InteractionModel, batch: Batch, classes: TokenClasses, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The learner's own (logprob, entropy, digest) of every chosen token, each [N], under autograd."""
    hidden = model(batch.tokens, batch.codes, batch.segments)
    row = batch.row.to(hidden.device, non_blocking=True)
    return classes.score(model.logits(hidden[row]), batch.target, batch.row_class, temperature)

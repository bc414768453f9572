"""Packs episodes for the learner: one long row of tokens, each episode a segment of its own starting at position 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.logprob import TokenClasses
from rollout.record.episode import Episode
from rollout.record.transcript import Transcript


@dataclass(frozen=True)
class Batch:
    """Rows of several episodes, N tokens that the policy chose."""

    inputs: Inputs
    row: Tensor  # int64 [N], input row whose hidden state gives each chosen token's distribution
    target: Tensor  # int64 [N], the chosen token
    row_class: Tensor  # int64 [N]
    owner: Tensor  # int64 [N], which episode of the batch
    chunk: Tensor  # int64 [N]


def collate(episodes: Sequence[Episode | Transcript], audio: int) -> Batch:
    """``audio`` is the audio token's id. Tokens after an episode's last choice are dropped: nothing is computed from
    them."""
    inputs = Inputs.cat(episodes, audio).cut([int(e.text.sampled_at[-1]) for e in episodes])
    return Batch(
        inputs=inputs,
        row=torch.cat([e.text.sampled_at - 1 + s for e, s in zip(episodes, inputs.starts, strict=True)]),
        target=torch.cat([e.tokens[e.text.sampled_at] for e in episodes]),
        row_class=torch.cat([e.text.row_class for e in episodes]),
        owner=torch.cat([torch.full_like(e.text.chunk, i) for i, e in enumerate(episodes)]),
        chunk=torch.cat([e.text.chunk for e in episodes]),
    )


def score_choices(
    model: InteractionModel, batch: Batch, classes: TokenClasses, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The learner's own (logprob, entropy, digest) of every chosen token, each [N], under autograd."""
    hidden = model(batch.inputs)
    row = batch.row.to(hidden.device, non_blocking=True)
    return classes.logprob(model.logits(hidden[row]), batch.target, batch.row_class, temperature)

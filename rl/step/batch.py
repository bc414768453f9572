"""Packs episodes for the learner: one long row of tokens, each episode a segment of its own starting at position 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import ops
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs, Senses
from model.logprob import TokenClasses
from rollout.record.episode import Episode
from rollout.record.transcript import Transcript


@dataclass(frozen=True)
class Batch:
    """Several episodes in one packed sequence, and the N tokens in them that the policy chose."""

    inputs: Inputs
    row: Tensor  # int64 [N] input row whose hidden state gives the chosen token's distribution
    target: Tensor  # int64 [N] the chosen token
    row_class: Tensor  # int64 [N] which set of tokens was allowed (`TokenClasses`)
    owner: Tensor  # int64 [N] index of the token's episode in the batch
    chunk: Tensor  # int64 [N] chunk of that episode


def collate(episodes: Sequence[Episode | Transcript], senses: Senses) -> Batch:
    """Packs episodes. Rows after an episode's last chosen token are dropped: nothing depends on them. ``senses``: the
    model's."""
    inputs = Inputs.cat(episodes, senses).cut([int(e.text.sampled_at[-1]) for e in episodes])
    return Batch(
        inputs=inputs,
        row=torch.cat([e.text.sampled_at - 1 + s for e, s in zip(episodes, inputs.starts, strict=True)]),
        target=torch.cat([e.tokens[e.text.sampled_at] for e in episodes]),
        row_class=torch.cat([e.text.row_class for e in episodes]),
        owner=torch.cat([torch.full_like(e.text.chunk, i) for i, e in enumerate(episodes)]),
        chunk=torch.cat([e.text.chunk for e in episodes]),
    )


def choice_logprobs(
    model: InteractionModel, batch: Batch, classes: TokenClasses, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The learner's (log-prob fp32, entropy fp32 in nats, row digest int64) of each chosen token, [N] each, under
    autograd. ``temperature`` divides the logits."""
    with ops.deferred():  # the host waits once, at the end of the block
        placed = model.place(batch.inputs, None, batch.row, batch.target, batch.row_class)
        row, target, row_class = placed.more
        return classes.logprob(model.logits(model(placed)[row]), target, row_class, temperature)

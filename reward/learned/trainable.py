"""What TRL's `RewardTrainer` sees: a batch of pairs as one packed pass, and a module that scores their stretches.

A conversation that several pairs of a batch share goes through the model once. Packed copies of the weights are
refreshed inside every forward, so that no update, by whatever optimizer, engine or loaded checkpoint, can leave
them stale.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from kernels import exact
from reward.learned.model import RewardModel, sum_in_order
from reward.learned.preference import Preference, Stretch, distinct, from_row


@dataclass(frozen=True)
class Collator:
    """Makes the tensors of a batch from P rows of the data set. The batch holds S distinct conversations and 2P
    stretches of them: the P chosen ones, then the P rejected ones."""

    axes: tuple[str, ...]
    audio: int  # id of the audio token
    margin_scale: float = 1.0  # the loss subtracts this times the margin; unused with ``rationality``
    rationality: float | None = None  # of the simulated rater (`doubt`); None: labels are certain

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self.batch([from_row(row) for row in rows])

    def batch(self, pairs: Sequence[Preference]) -> dict[str, Tensor]:
        """The tensors of ``pairs`` by name, as `Trainable.forward` takes them."""
        stretches = [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]
        conversations, owner = distinct(stretches)
        tokens = torch.cat([s.tokens for s in conversations])
        margin = torch.tensor([p.margin for p in pairs])
        graded = self.rationality is not None
        return {
            "margin": torch.zeros_like(margin) if graded else self.margin_scale * margin,  # fp32 [P]
            "doubt": doubt(margin, self.rationality),  # fp32 [P]
            "tokens": tokens,  # int64 [T]
            "codes": torch.cat([s.codes for s in conversations]),  # uint8 [A, 80]
            "lengths": torch.tensor([len(s.tokens) for s in conversations]),  # [S]
            "owner": torch.tensor(owner),  # [2P], conversation of each stretch
            "first": torch.tensor([s.first for s in stretches]),  # [2P]
            "end": torch.tensor([s.end for s in stretches]),  # [2P]
            "axis": torch.tensor([self.axes.index(p.axis) for p in pairs] * 2),  # [2P]
            "attention_mask": torch.ones_like(tokens),  # TRL counts tokens by it
        }


class Trainable(nn.Module):
    """A `RewardModel` in the shape that TRL expects of a sequence classifier."""

    def __init__(self, reward: RewardModel) -> None:
        super().__init__()
        self.reward = reward
        self.config = copy.deepcopy(reward.backbone.config)
        self.config.num_labels = 1

    def add_model_tags(self, tags: Sequence[str]) -> None:
        """TRL calls this to tag models for upload; this program uploads none."""

    def forward(
        self,
        tokens: Tensor,
        codes: Tensor,
        lengths: Tensor,
        owner: Tensor,
        first: Tensor,
        end: Tensor,
        axis: Tensor,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Arguments as `Collator` makes them; logits fp32 [2P, 1]."""
        self.reward.repack()
        pieces = tokens.split(lengths.tolist())
        heard = [int((piece == self.reward.backbone.audio_token_id).sum()) for piece in pieces]
        conversations = [Stretch(t, c, 0, 0) for t, c in zip(pieces, codes.split(heard), strict=True)]
        scores = stretch_scores(self.reward(conversations), owner, first, end, axis)
        return SequenceClassifierOutput(logits=scores[:, None])


def doubt(margin: Tensor, rationality: float | None) -> Tensor:
    """The probability that a Boltzmann-rational rater prefers the rejected stretch: 1 - sigmoid(rationality * margin)
    (Lee et al. 2021, B-Pref, arXiv 2111.03026). 0 where the margin is 0 (unknown), and where ``rationality`` is None.
    fp32 [P] -> fp32 [P]."""
    if rationality is None:
        return torch.zeros_like(margin)
    certain = [1.0 / (1.0 + exact.exp(-rationality * m)) for m in margin.tolist()]
    return torch.where(margin > 0, 1.0 - torch.tensor(certain, dtype=torch.float64), 0.0).float()


def stretch_scores(rewards: Sequence[Tensor], owner: Tensor, first: Tensor, end: Tensor, axis: Tensor) -> Tensor:
    """The score of each of R stretches, fp32 [R]: the sum of its chunks' rewards on one axis, in ascending order.

    ``rewards``: fp32 [chunks, axes] of each conversation. int64 [R] each: ``owner``, index of the stretch's
    conversation; ``first``, ``end``: it is chunks first … end - 1; ``axis``: index of its axis."""
    padded = nn.utils.rnn.pad_sequence(list(rewards), batch_first=True)  # [S, N, axes]
    # index_select, whose gradient adds a conversation's stretches in their order; indexing may add them in any
    on_axis = padded.index_select(0, owner).gather(2, axis[:, None, None].expand(-1, padded.shape[1], 1))[:, :, 0]
    chunk = torch.arange(padded.shape[1])
    inside = (chunk >= first[:, None]) & (chunk < end[:, None])
    return sum_in_order(torch.where(inside, on_axis, 0.0))

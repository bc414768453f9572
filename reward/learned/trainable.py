"""What TRL's `RewardTrainer` sees: a batch of pairs as one packed pass, and a module that scores their stretches.

A conversation that several pairs of a batch share goes through the model once. Packed copies of the weights are
refreshed inside every forward, so that no update, by whatever optimizer, engine or loaded checkpoint, can leave
them stale.
"""

from __future__ import annotations

import copy
from collections import Counter
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

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.batch([from_row(row) for row in rows])

    def batch(self, pairs: Sequence[Preference]) -> dict[str, Any]:
        """What `Trainable.forward` takes of ``pairs``, by name. TRL moves the tensors to the device; conversations and
        their indices stay on the CPU, where the model's input is put together."""
        stretches = [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]
        conversations, owner = distinct(stretches)
        margin = torch.tensor([p.margin for p in pairs])
        graded = self.rationality is not None
        return {
            "margin": torch.zeros_like(margin) if graded else self.margin_scale * margin,  # fp32 [P]
            "doubt": doubt(margin, self.rationality),  # fp32 [P]
            "conversations": conversations,  # [S]
            "owner": owner,  # [2P], conversation of each stretch
            "first": torch.tensor([s.first for s in stretches]),  # [2P]
            "end": torch.tensor([s.end for s in stretches]),  # [2P]
            "axis": torch.tensor([self.axes.index(p.axis) for p in pairs] * 2),  # [2P]
            "attention_mask": torch.ones(
                sum(len(s.tokens) for s in conversations), dtype=torch.int64
            ),  # TRL counts tokens by it
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
        conversations: Sequence[Stretch],
        owner: Sequence[int],
        first: Tensor,
        end: Tensor,
        axis: Tensor,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Arguments as `Collator` makes them; logits fp32 [2P, 1]."""
        self.reward.repack()
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


def stretch_scores(rewards: Sequence[Tensor], owner: Sequence[int], first: Tensor, end: Tensor, axis: Tensor) -> Tensor:
    """The score of each of R stretches, fp32 [R]: the sum of its chunks' rewards on one axis, in ascending order.

    ``rewards``: fp32 [chunks, axes] of each conversation; ``owner`` [R]: index of the stretch's conversation. int64 [R]
    each, on the device of the rewards: ``first``, ``end``: it is chunks first … end - 1; ``axis``: index of its axis.
    """
    padded = nn.utils.rnn.pad_sequence(list(rewards), batch_first=True)  # [S, N, axes]
    taken: Tensor = _Taken.apply(padded, owner)
    on_axis = taken.gather(2, axis[:, None, None].expand(-1, padded.shape[1], 1))[:, :, 0]
    chunk = torch.arange(padded.shape[1], device=padded.device)
    inside = (chunk >= first[:, None]) & (chunk < end[:, None])
    return sum_in_order(torch.where(inside, on_axis, 0.0))


class _Taken(torch.autograd.Function):
    """``rows.index_select(0, owner)``, [S, …] -> [R, …]. Its gradient adds what one row was taken for in the order of
    ``owner``; torch adds in this order on the CPU, and in any on a GPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, owner: Sequence[int]) -> Tensor:
        ctx.owner, ctx.shape = owner, rows.shape
        return rows.index_select(0, torch.tensor(owner, device=rows.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        parts = turns(ctx.owner)
        at, of = (
            torch.tensor(flat).to(grad.device, non_blocking=True).split([len(part) for part in parts])
            for flat in ([r for part in parts for r in part], [ctx.owner[r] for part in parts for r in part])
        )
        out = grad.new_zeros(ctx.shape)
        for taken, row in zip(at, of, strict=True):
            out.index_add_(0, row, grad[taken])
        return out, None


def turns(owner: Sequence[int]) -> list[list[int]]:
    """The indices 0 … R - 1 in ascending order, in parts in which no owner comes twice: the first index of each owner,
    then the second of those that have one, and so on.

    >>> turns([4, 4, 0, 4, 0])
    [[0, 2], [1, 4], [3]]
    """
    parts: list[list[int]] = []
    seen: Counter[int] = Counter()
    for r, one in enumerate(owner):
        if seen[one] == len(parts):
            parts.append([])
        parts[seen[one]].append(r)
        seen[one] += 1
    return parts

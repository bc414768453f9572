"""Bradley-Terry with graded labels: how much better the chosen one is says how sure its label is.

A label that is always certain tells only the sign of a difference, so that the loss is smallest at infinity: rewards
grow without a unit, and what is a little better ends as far off as what is much better. Here the label is the
probability that a Boltzmann-rational rater gives, p = sigmoid(rationality * margin), and the loss
-p log sigmoid(d) - (1 - p) log sigmoid(-d) is smallest at d = rationality * margin: a chunk's reward means what the
rater's does, and what the model cannot tell apart gets a mean of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from trl import RewardTrainer


class GradedTrainer(RewardTrainer):
    """TRL's trainer, whose loss at p = 1 is -log sigmoid(d). Since -log sigmoid(-d) = d - log sigmoid(d), doubt adds
    (1 - p) d to it. Takes ``doubt`` = 1 - p, fp32 [P], beside what `Trainable` takes; where it is 0 nothing changes."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits[:, 0].chunk(2)
        loss = loss + (inputs["doubt"] * (chosen - rejected)).mean()
        return (loss, outputs) if return_outputs else loss

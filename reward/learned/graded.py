"""Bradley-Terry loss with graded (soft) labels: the larger a pair's margin, the more certain its label.

Hard labels tell only the sign of a difference d of scores, and -log sigmoid(d) has its minimum at infinity: rewards
grow without bound, and a slightly better stretch ends as far ahead as a much better one. Here the label is the
probability with which a Boltzmann-rational rater prefers the chosen stretch, p = sigmoid(rationality * margin). The
loss -p log sigmoid(d) - (1 - p) log sigmoid(-d) is smallest at d = rationality * margin, so learned rewards are in the
unit of the rule's rewards times ``rationality``; of stretches that the model cannot distinguish it learns the mean.

TRL's loop and its records are used; what decides a weight is computed here by our ops, so that equal pairs give equal
models on every processor and for any number of threads: log sigmoid, the norm that gradients are clipped to, AdamW.
Under accelerate's DeepSpeed the clipping is DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from trl import RewardTrainer

from kernels import ops
from model.weights.finite import NotFiniteError
from reward.learned.report import REMEDY, diverged
from reward.learned.resuming import Progress


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x), fp32 [P] -> fp32 [P], differentiable: by our op, as the log-prob of the first of two tokens with
    logits x and 0."""
    pair, first = torch.stack((x, torch.zeros_like(x)), 1), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return ops.logprob(pair, first, 1.0, torch.ones(1, 2, dtype=torch.bool, device=x.device), first)[0]


class GradedTrainer(RewardTrainer):
    """TRL's trainer with labels p instead of 1. TRL's loss is -log sigmoid(d - margin); by -log sigmoid(-d) =
    d - log sigmoid(d), a label p adds (1 - p) d. Batches hold ``doubt`` = 1 - p, fp32 [P], beside the arguments of
    `Trainable`; where it is 0 the loss is TRL's. Raises NotFiniteError, on every process, in the step in which scores,
    loss, gradient or (`reward.train.Report`) weights cease to be finite."""

    def __init__(self, *args: Any, progress: Progress | None = None, **kwargs: Any) -> None:
        """``progress``: to be added to."""
        super().__init__(*args, **kwargs)
        self.progress = Progress() if progress is None else progress

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        mean = float(self.accelerator.gather(loss).mean())
        if not math.isfinite(mean):
            raise self._diverged("loss is")
        self.progress.loss_sum += mean  # of a part of the step, and already divided by the number of parts
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # which also keeps TRL's records
        if not bool(torch.isfinite(self.accelerator.gather(outputs.logits.detach())).all()):
            raise self._diverged("scores are")
        chosen, rejected = outputs.logits[:, 0].chunk(2)
        difference, both = chosen - rejected, chosen + rejected
        terms = inputs["doubt"] * difference - log_sigmoid(difference - inputs["margin"])
        if self.args.center_rewards_coefficient is not None:
            terms = terms + self.args.center_rewards_coefficient * (both * both)
        loss = terms.mean()  # a mean's gradient is 1 / P in every term, in whatever order the value is added
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _clip_grad_norm(self, model: nn.Module) -> float:
        """Clips the gradient and returns its norm before clipping, summed in a fixed order (torch's depends on the
        number of threads)."""
        if (
            self.accelerator.distributed_type == DistributedType.DEEPSPEED
        ):  # whose engine clips, and has stepped already
            return float(super()._clip_grad_norm(model))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(math.fsum(torch.stack([ops.dot(g, g) for g in gradients]).tolist()))
        if norm > self.args.max_grad_norm:
            for g in gradients:
                g *= self.args.max_grad_norm / norm
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> Any:
        """The gradient's norm, with clipping or without; called before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._diverged("gradient is")
        return norm

    def _diverged(self, what: str) -> NotFiniteError:
        return NotFiniteError(f"{diverged(self.state.global_step + 1)}: the {what} not finite: {REMEDY}")

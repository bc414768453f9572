"""The DeepSpeed learner: exact policy-gradient sums in, one optimizer step out.

Gradients are computed here, episode batch by episode batch, in a fixed order of summation, and handed to DeepSpeed
through the surrogate loss sum(p * G), whose gradient is G. So what a step applies does not depend on DeepSpeed's bucket
sizes or hooks, and the identity check can run between gradient and step. Left out on purpose: importance ratios and
clipping of them (the ratio is 1 by the identity check) and any second step on the same episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.logprob import TokenClasses
from model.startup import import_deepspeed
from model.transformer import InteractionModel
from rl import ranks
from rl.batch import collate, score_choices
from rl.config import OptimConfig
from rollout.episode import Episode
from rollout.transcript import Transcript

TAG = "learner"
"""DeepSpeed's name for the state inside a checkpoint folder."""


@dataclass(frozen=True)
class Gradient:
    """The gradient of -sum_t weight_t * logprob_t over this rank's N chosen tokens, and what the forward pass saw."""

    parameters: tuple[Tensor, ...]  # one a parameter, in the model's order
    logprob: Tensor  # fp32 [N]
    entropy: Tensor  # fp32 [N], nats
    digest: Tensor  # int64 [N]
    owner: Tensor  # int64 [N], episode of each token


def policy_gradient(
    model: InteractionModel,
    episodes: Sequence[Episode | Transcript],
    weights: Sequence[Tensor],
    classes: TokenClasses,
    temperature: float,
    micro_batch: int,
) -> Gradient:
    """Plain policy gradient; ``weights[e]`` fp32 [N_e] is what each chosen token of episode e counts (an advantage, or
    1 for supervised learning), already divided by whatever it is to be averaged over.

    Raises MetronomeError when a log-prob is not finite."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total: list[Tensor] | None = None
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for first in range(0, len(episodes), micro_batch):
        some = episodes[first : first + micro_batch]
        batch = collate(some)
        logprob, entropy, digest = score_choices(model, batch, classes, temperature)
        if not torch.isfinite(logprob).all():
            where = int((~torch.isfinite(logprob)).nonzero()[0])
            raise MetronomeError(
                f"the learner's log-prob of token {int(batch.target[where])} in episode "
                f"{first + int(batch.owner[where])}, chunk {int(batch.chunk[where])}, is {logprob[where].item()}: the "
                "weights have diverged. Lower the learning rate, or resume from an earlier checkpoint."
            )
        loss = -(torch.cat(list(weights[first : first + micro_batch])) * logprob).sum()
        gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
        if total is None:
            total = [g.clone() for g in gradient]
        else:
            torch._foreach_add_(total, gradient)
        seen.append((logprob.detach(), entropy.detach(), digest, batch.owner + first))
    assert total is not None, "no episodes"
    return Gradient(tuple(total), *(torch.cat(column) for column in zip(*seen, strict=True)))


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up over warmup_steps, then linear decay to final_lr * lr at the last step."""
    warm = min(1.0, (step + 1) / max(optim.warmup_steps, 1))
    decay = 1.0 - (1.0 - optim.final_lr) * step / max(steps - 1, 1)
    return optim.lr * warm * decay


class Learner:
    """Owns the DeepSpeed engine of one phase (optimizer state and schedule); the model stays the caller's.

    `deepspeed.initialize` moves the parameters into one flat buffer, so weights packed before are refreshed here."""

    def __init__(self, model: InteractionModel, optim: OptimConfig, steps: int) -> None:
        self.model = model
        self.optim = optim
        self.steps = steps
        self.taken = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in self._parameters if p.ndim >= 2]
        plain = [p for p in self._parameters if p.ndim < 2]
        adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
        )
        self.engine, _, _, _ = import_deepspeed().initialize(
            model=model,
            optimizer=adamw,
            config={
                "train_batch_size": ranks.world(),
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": optim.zero_stage},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # clipped here, on the summed gradient, in one order
            },
        )
        model.repack()

    def step(self, gradient: Gradient) -> float:
        """Applies one step of the sum of all ranks' gradients and refreshes the packed weights; returns the sum's norm
        before clipping.

        Every rank adds the ranks' gradients in rank order, so all hold the same bits and DeepSpeed's mean over ranks
        gives them back exactly (for a power of two of ranks)."""
        total = ranks.sum_in_order(torch.cat([g.flatten() for g in gradient.parameters]))
        norm = float(torch.linalg.vector_norm(total, dtype=torch.float64))
        if self.optim.clip_norm and norm > self.optim.clip_norm:
            total *= self.optim.clip_norm / norm
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.optim, self.taken, self.steps)
        pieces = total.split([p.numel() for p in self._parameters])
        surrogate = torch.stack([(p.flatten() * g).sum() for p, g in zip(self._parameters, pieces, strict=True)]).sum()
        self.engine.backward(surrogate)
        self.engine.step()
        self.model.repack()
        self.taken += 1
        return norm

    def save(self, folder: Path) -> None:
        """Writes optimizer state and step count into ``folder``. Every rank must call it."""
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state={"taken": self.taken})

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, the weights included. Raises MetronomeError when the folder holds no learner."""
        if not (folder / TAG).is_dir():
            raise MetronomeError(f"{folder}: holds no learner state. Resume from another checkpoint, or start anew.")
        _, state = self.engine.load_checkpoint(str(folder), tag=TAG)
        self.taken = state["taken"]
        self.model.repack()

"""The gradient of an objective over a rank's episodes, micro-batch by micro-batch, and what the forward pass saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import ops
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.logprob import TokenClasses
from model.program.exhausted import needing
from rl.step import tree
from rl.step.batch import Voice, collate
from rl.step.objective import Objective, Tokens, policy_gradient, weighted_sum
from rl.step.sequence import all_logprobs
from rollout.record.episode import Episode
from rollout.record.transcript import Transcript

NO_SOUND = torch.empty(0), torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Gradient:
    """The gradient of minus the objective, and what the forward pass gave for this rank's N chosen tokens, on the
    CPU."""

    # fp32, one for each trained parameter, in the model's order, on its device; of a team, this member's part
    parameters: tuple[Tensor, ...]
    logprob: Tensor  # fp32 [N]
    entropy: Tensor  # fp32 [N], nats
    digest: Tensor  # int64 [N] digest of the token's whole row of log-probs
    sound_logprob: Tensor = NO_SOUND[0]  # fp32 [M] of this rank's chunks of sound (`rl.step.batch.Sound`)
    sound_digest: Tensor = NO_SOUND[1]  # int64 [M]

    def choices(self) -> tuple[Tensor, Tensor]:
        """(log-prob, digest) of all tokens and then of all sound, as `rl.step.identity.Evidence` has them."""
        return torch.cat((self.logprob, self.sound_logprob)), torch.cat((self.digest, self.sound_digest))


@needing("the learner's forward and backward pass", "lower rl.micro_batch (in a new run: it orders sums)")
def gradient_of(
    model: InteractionModel,
    episodes: Sequence[Episode | Transcript],
    weights: Sequence[Tensor],
    classes: TokenClasses,
    temperature: float,
    micro_batch: int,
    objective: Objective = policy_gradient,
    sound_weights: Sequence[Tensor] | None = None,
) -> Gradient:
    """The gradient over a rank's episodes. ``weights[e]`` fp32 [N_e]: the weight of each chosen token of episode e (an
    advantage, or 1 for supervised learning), already divided by the number of tokens to average over; ``micro_batch``:
    episodes in one forward pass; ``sound_weights[e]`` fp32 [M_e]: likewise of each chunk of sound. The members of a
    team share the rows of the same episodes (`rl.step.sequence`); what the forward pass gave is whole on each, and the
    sum of the members' gradients is the gradient.

    Raises MetronomeError when a log-prob is not finite."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total: list[Tensor] | None = None
    seen: list[tuple[Tensor, ...]] = []
    heard: list[tuple[Tensor, ...]] = [NO_SOUND]
    for first in range(0, len(episodes), micro_batch):
        batch = collate(episodes[first : first + micro_batch], model.senses)
        (logprob, entropy, digest), sound = all_logprobs(model, batch, classes, temperature)
        seen.append(ops.fetch(logprob.detach(), entropy.detach(), digest))
        finite = torch.isfinite(seen[-1][0])
        if not finite.all():
            where = int((~finite).nonzero()[0])
            raise MetronomeError(
                f"the learner's log-prob of token {int(batch.target[where])} in episode "
                f"{first + int(batch.owner[where])}, chunk {int(batch.chunk[where])}, is {logprob[where].item()}: the "
                "weights have diverged. Lower the learning rate, or resume from an earlier checkpoint."
            )
        weight = torch.cat(list(weights[first : first + micro_batch])).to(logprob.device, non_blocking=True)
        loss = -objective(Tokens(logprob, entropy, weight))
        if sound is not None and batch.voice is not None:
            heard.append((*ops.fetch(sound.logprob.detach()), sound.digest))
            _check_finite(heard[-1][0], batch.voice, first)
            if sound_weights is None:
                raise ValueError("gradient_of: the episodes have sound, but it has no weights")
            weight = torch.cat(list(sound_weights[first : first + micro_batch])).to(loss.device, non_blocking=True)
            loss = loss - weighted_sum(sound.logprob, weight)
        total = tree.over_micro_batches(total, torch.autograd.grad(loss, parameters, materialize_grads=True))
    assert total is not None, "no episodes"
    return Gradient(tuple(total), *(torch.cat(column) for part in (seen, heard) for column in zip(*part, strict=True)))


def _check_finite(logprob: Tensor, voice: Voice, first: int) -> None:
    finite = torch.isfinite(logprob)
    if not finite.all():
        where = int((~finite).nonzero()[0])
        raise MetronomeError(
            f"the learner's log-prob of the sound in episode {first + int(voice.owner[where])}, chunk "
            f"{int(voice.chunk[where])}, is {logprob[where].item()}: the weights have diverged. Lower the learning "
            "rate, or resume from an earlier checkpoint."
        )

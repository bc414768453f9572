"""From rewards to the weight of each sampled token.

Timing and content of each acting source are separate rewards: each becomes a reward-to-go per chunk, loses the mean of
the group's other rollouts, and is divided by its family's root mean square over the whole step; only then are they
added, sources in equal shares. So a learned reward's unit does not matter. The distance from the reference policy is a
reward too, but keeps its unit: divided by its own size it would pull the harder the nearer the policy is.
A chunk's tokens share the chunk's advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from reward.source import AXES, Rewards
from rl import ranks
from rl.advantage import leave_one_out, reward_to_go, scaled
from rl.config import RLConfig
from rollout.episode import Episode


def token_weights(
    episodes: Sequence[Episode], acting: Sequence[Sequence[Rewards]], log_ratio: Sequence[Tensor], config: RLConfig
) -> list[Tensor]:
    """Advantage of every sampled token, fp32 [N_e] an episode, divided by the number of tokens sampled by all ranks.

    ``acting`` [sources, episodes]; ``log_ratio`` fp32 [N_e] an episode, as `rl.reference` gives it, or nothing.
    Episodes come in groups of ``config.rollouts`` of one scenario. Raises MetronomeError for a reward that is not
    finite."""
    weight = {"timing": config.timing_weight, "content": config.content_weight}
    advantages = [torch.zeros(len(e.actions)) for e in episodes]
    for rewards in acting:
        for axis in AXES:
            per_chunk = [r.axis(axis) for r in rewards]
            _check_finite(episodes, per_chunk, axis)
            for i, advantage in enumerate(_over_rms(episodes, _advantages(per_chunk, config))):
                advantages[i] = advantages[i] + weight[axis] / len(acting) * advantage
    if config.reference_weight and log_ratio:
        cost = [-config.reference_weight * r for r in _by_chunk(episodes, log_ratio)]
        for i, advantage in enumerate(_advantages(cost, config)):
            advantages[i] = advantages[i] + advantage
    tokens = sum(ranks.gather(sum(len(e.chunk) for e in episodes)))
    return [a[e.chunk] / tokens for a, e in zip(advantages, episodes, strict=True)]


def _check_finite(episodes: Sequence[Episode], rewards: Sequence[Tensor], axis: str) -> None:
    for episode, reward in zip(episodes, rewards, strict=True):
        bad = (~torch.isfinite(reward)).nonzero()
        if len(bad):
            raise MetronomeError(
                f"episode {episode.name}: the {axis} reward of chunk {int(bad[0])} is not finite. Fix the scorer of "
                f"family {episode.family!r}, or train the reward model anew; nothing was learned from this step."
            )


def _by_chunk(episodes: Sequence[Episode], per_token: Sequence[Tensor]) -> list[Tensor]:
    """Sums over each chunk's tokens: fp32 [N_e] -> fp32 [chunks] an episode."""
    return [
        torch.zeros(len(e.actions)).index_add(0, e.chunk, values) for e, values in zip(episodes, per_token, strict=True)
    ]


def _advantages(rewards: Sequence[Tensor], config: RLConfig) -> list[Tensor]:
    """Reward-to-go, leave-one-out in the group; fp32 [chunks] an episode."""
    out: list[Tensor] = []
    for first in range(0, len(rewards), config.rollouts):
        group = torch.stack(list(rewards[first : first + config.rollouts]))
        out += leave_one_out(reward_to_go(group, config.gamma), config.rollouts).unbind()
    return out


def _over_rms(episodes: Sequence[Episode], advantages: Sequence[Tensor]) -> list[Tensor]:
    """Divided by the root mean square over the family's episodes on all ranks."""
    sums: dict[str, tuple[float, int]] = {}
    for episode, advantage in zip(episodes, advantages, strict=True):
        square, count = sums.get(episode.family, (0.0, 0))
        sums[episode.family] = (square + float(advantage.double().square().sum()), count + advantage.numel())
    everyone = ranks.gather(sums)
    out = []
    for episode, advantage in zip(episodes, advantages, strict=True):
        parts = [s[episode.family] for s in everyone if episode.family in s]
        out.append(scaled(advantage, sum(p[0] for p in parts), sum(p[1] for p in parts)))
    return out

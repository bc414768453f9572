"""From rewards to the weight of each sampled token.

The axes of each acting source (timing, content, …) are separate rewards: each becomes a reward-to-go per chunk, loses
the mean of the group's other rollouts, and is divided by its family's running scale (`rl.step.advantage.RunningScale`);
only then are they added, in the order of the family's axes, sources in equal shares. So a learned reward's unit does
not matter. The distance from the reference policy is a reward too, but keeps its unit: divided by its own size it would
pull the harder the nearer the policy is. A chunk's tokens share the chunk's advantage.

Everything is fp64 and every sum is taken in the order of the episodes, so that equal rollouts get exactly 0 and no
library's order of summation enters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from reward.source import Rewards
from rl.config import RLConfig
from rl.learner import ranks
from rl.step.advantage import RunningScale, leave_one_out, reward_to_go, told_apart
from rollout.record.episode import Episode

Scales = Mapping[str, RunningScale]
"""By ``source/family/axis``, the source's number among those that act; kept in checkpoints."""


@dataclass(frozen=True)
class Credit:
    """What a step's rewards say of this rank's tokens, and of all ranks' groups."""

    weights: list[Tensor]  # fp32 [N_e] an episode, divided by the number of tokens that all ranks sampled
    scales: dict[str, RunningScale]  # this step included
    groups: int  # of all ranks, families, sources and axes
    degenerate_groups: int  # whose rollouts were all worth the same on that axis: nothing is learned from them
    terms: int  # one a source, family and axis
    degenerate_terms: int  # of which every group was degenerate in this step

    def metrics(self) -> dict[str, float | int]:
        return {
            "credit/groups": self.groups,
            "credit/degenerate_groups": self.degenerate_groups,
            "credit/terms": self.terms,
            "credit/degenerate_terms": self.degenerate_terms,
        } | {f"credit/scale/{name}": scale.value for name, scale in sorted(self.scales.items())}


Term = list[tuple[float, int]]
"""One source's rewards on one axis for one family: (sum of squares, count) of each group's advantages, in the order of
the groups; count 0 for a degenerate group."""


def token_weights(
    episodes: Sequence[Episode],
    acting: Sequence[Sequence[Rewards]],
    log_ratio: Sequence[Tensor],
    config: RLConfig,
    scales: Scales,
) -> Credit:
    """The advantage of every sampled token, divided by the number of tokens sampled by all ranks.

    ``acting`` [sources, episodes]; ``log_ratio`` fp32 [N_e] an episode, as `rl.reference` gives it, or nothing.
    Episodes come in groups of ``config.rollouts`` of one scenario, and have the axes of its family. ``scales``: as the
    step before left them. Raises MetronomeError for a reward that is not finite."""
    advantages = [torch.zeros(len(e.actions), dtype=torch.float64) for e in episodes]
    terms: dict[str, Term] = {}
    parts: list[tuple[str, int, Tensor, float]] = []  # of a group: term, first episode, advantages, share
    for source, rewards in enumerate(acting):
        for first in range(0, len(episodes), config.rollouts):
            group = slice(first, first + config.rollouts)
            for axis in rewards[first].axes:
                per_chunk = [r.axes[axis] for r in rewards[group]]
                _check_finite(episodes[group], per_chunk, axis)
                returns = reward_to_go(torch.stack(per_chunk), config.gamma)
                advantage = leave_one_out(returns, config.rollouts)
                apart = bool(told_apart(advantage, returns, config.rollouts))
                advantage = advantage if apart else torch.zeros_like(advantage)
                squares = math.fsum(x * x for x in advantage.flatten().tolist())
                name = f"{source}/{episodes[first].family}/{axis}"
                terms.setdefault(name, []).append((squares, advantage.numel() * apart))
                parts.append((name, first, advantage, config.axis_weights.get(axis, 1.0) / len(acting)))
    everyone = _over_ranks(terms)
    updated = dict(scales) | {
        name: scales.get(name, RunningScale()).updated(math.fsum(s for s, _ in term), sum(n for _, n in term))
        for name, term in everyone.items()
    }
    for name, first, advantage, share in parts:
        for i, row in enumerate(advantage / updated[name].value, first):
            advantages[i] = advantages[i] + share * row
    if config.reference_weight and log_ratio:
        cost = [-config.reference_weight * r for r in _by_chunk(episodes, log_ratio)]
        rows = (
            row for group in _groups(cost, config)
            for row in leave_one_out(reward_to_go(group, config.gamma), config.rollouts)
        )  # fmt: skip
        advantages = [advantage + row for advantage, row in zip(advantages, rows, strict=True)]
    tokens = sum(ranks.gather(sum(len(e.text.chunk) for e in episodes)))
    return Credit(
        weights=[(a[e.text.chunk] / tokens).float() for a, e in zip(advantages, episodes, strict=True)],
        scales=updated,
        groups=sum(map(len, everyone.values())),
        degenerate_groups=sum(count == 0 for term in everyone.values() for _, count in term),
        terms=len(everyone),
        degenerate_terms=sum(not any(count for _, count in term) for term in everyone.values()),
    )


def _check_finite(episodes: Sequence[Episode], rewards: Sequence[Tensor], axis: str) -> None:
    for episode, reward in zip(episodes, rewards, strict=True):
        bad = (~torch.isfinite(reward)).nonzero()
        if len(bad):
            raise MetronomeError(
                f"episode {episode.name}: the {axis} reward of chunk {int(bad[0])} is not finite. Fix the scorer of "
                f"family {episode.family!r}, or train the reward model anew; nothing was learned from this step."
            )


def _groups(rewards: Sequence[Tensor], config: RLConfig) -> list[Tensor]:
    """[chunks] an episode -> [rollouts, chunks] a group."""
    size = config.rollouts
    return [torch.stack(list(rewards[first : first + size])) for first in range(0, len(rewards), size)]


def _over_ranks(terms: dict[str, Term]) -> dict[str, Term]:
    found: dict[str, Term] = {}
    for part in ranks.gather(terms):
        for name, term in part.items():
            found[name] = found.get(name, []) + term
    return found


def _by_chunk(episodes: Sequence[Episode], per_token: Sequence[Tensor]) -> list[Tensor]:
    """Sums over each chunk's tokens, in their order: fp32 [N_e] -> fp64 [chunks] an episode."""
    out = []
    for episode, values in zip(episodes, per_token, strict=True):
        sums = [0.0] * len(episode.actions)
        for chunk, value in zip(episode.text.chunk.tolist(), values.tolist(), strict=True):
            sums[chunk] += value
        out.append(torch.tensor(sums, dtype=torch.float64))
    return out

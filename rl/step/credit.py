"""From rewards to the weight of each sampled token.

Each axis (timing, content, …) of each source that RL learns from is a reward of its own: it becomes a reward-to-go for
each chunk, minus the mean of the group's other rollouts (`rl.step.advantage`), divided by a running scale of its
source, family and axis. Only then are axes and sources added, in a fixed order and with equal shares of the sources, so
that the unit of a learned reward does not matter. The KL penalty towards the reference policy is a reward too but is
not scaled: divided by its own size it would pull harder the closer the policy is. All tokens of a chunk have the
chunk's advantage, and so has its sound; with ``rl.sound_axes`` only the part of it that is of these axes. What sound
does not decide, such as when words are said, is noise in its gradient (factored baselines: Wu et al. 2018, arXiv
1803.07246).

All is fp64 and summed in the order of the episodes, so that equal rollouts get exactly 0 and no library's order of
summation enters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.program import teams
from reward.source import Rewards
from rl.config import RLConfig
from rl.step.advantage import RunningScale, informative_groups, leave_one_out, reward_to_go
from rollout.record.episode import Episode, Stream

Scales = Mapping[str, RunningScale]
"""``<source>/<family>/<axis>`` -> its scale; <source> is its index in `Judged.acting`. Saved in checkpoints."""


@dataclass(frozen=True)
class Credit:
    """The weights of this team's tokens, and counts over all teams' groups."""

    weights: list[Tensor]  # for each episode fp32 [N_e]: advantages divided by the number of tokens of all teams
    sound_weights: list[Tensor]  # fp32 [M_e]: those of chunks of sound, divided by `sound_numbers`, too
    scales: dict[str, RunningScale]  # updated by this step
    groups: int  # counted once for each source and axis
    degenerate_groups: int  # those whose rollouts had equal returns, so that nothing is learned from them
    terms: int  # combinations of source, family and axis
    degenerate_terms: int  # those in which every group was degenerate

    def metrics(self) -> dict[str, float | int]:
        """For metrics.jsonl, under ``credit/``."""
        return {
            "credit/groups": self.groups,
            "credit/degenerate_groups": self.degenerate_groups,
            "credit/terms": self.terms,
            "credit/degenerate_terms": self.degenerate_terms,
        } | {f"credit/scale/{name}": scale.value for name, scale in sorted(self.scales.items())}


Term = list[tuple[float, int]]
"""For one source, family and axis: (sum of squares, count) of each group's advantages; count 0 if degenerate."""


def token_weights(
    episodes: Sequence[Episode],
    acting: Sequence[Sequence[Rewards]],
    log_ratio: Sequence[Tensor],
    config: RLConfig,
    scales: Scales,
) -> Credit:
    """The advantage of every sampled token, divided by the number of tokens sampled by all teams.

    ``episodes``: this team's, ``config.rollouts`` of each scenario one after another. ``acting`` [sources, episodes]:
    the rewards to learn from. ``log_ratio``: for each episode fp32 [N_e], as `rl.reference` gives it; empty without a
    reference. ``scales``: as the step before left them. Raises MetronomeError for a reward that is not finite."""
    if any(len(rewards) != len(episodes) for rewards in acting):
        raise ValueError(f"{[len(r) for r in acting]} rewards of the sources for {len(episodes)} episodes")
    advantages = [torch.zeros(len(e.actions), dtype=torch.float64) for e in episodes]
    of_sound = [torch.zeros(len(e.actions), dtype=torch.float64) for e in episodes]  # with `sound_axes`
    terms: dict[str, Term] = {}
    parts: list[tuple[str, str, int, Tensor, float]] = []  # a group's term, axis, first episode, advantages, weight
    for source, rewards in enumerate(acting):
        for first in range(0, len(episodes), config.rollouts):
            group = slice(first, first + config.rollouts)
            for axis in rewards[first].axes:
                per_chunk = [r.axes[axis] for r in rewards[group]]
                _check_finite(episodes[group], per_chunk, axis)
                returns = reward_to_go(torch.stack(per_chunk), config.gamma)
                advantage = leave_one_out(returns, config.rollouts)
                informative = bool(informative_groups(advantage, returns, config.rollouts))
                advantage = advantage if informative else torch.zeros_like(advantage)
                squares = math.fsum(x * x for x in advantage.flatten().tolist())
                name = f"{source}/{episodes[first].family}/{axis}"
                terms.setdefault(name, []).append((squares, advantage.numel() * informative))
                parts.append((name, axis, first, advantage, config.axis_weights.get(axis, 1.0) / len(acting)))
    everyone = _over_ranks(terms)
    updated = dict(scales) | {
        name: scales.get(name, RunningScale()).updated(math.fsum(s for s, _ in term), sum(n for _, n in term))
        for name, term in everyone.items()
    }
    for name, axis, first, advantage, share in parts:
        for i, row in enumerate(advantage / updated[name].value, first):
            advantages[i] = advantages[i] + share * row
            if axis in config.sound_axes:
                of_sound[i] = of_sound[i] + share * row
    if config.reference_weight and log_ratio:
        cost = [-config.reference_weight * r for r in _by_chunk(episodes, log_ratio)]
        rows = (
            row for group in _groups(cost, config)
            for row in leave_one_out(reward_to_go(group, config.gamma), config.rollouts)
        )  # fmt: skip
        advantages = [advantage + row for advantage, row in zip(advantages, rows, strict=True)]
    tokens = sum(teams.gather(sum(len(e.text.chunk) for e in episodes)))
    return Credit(
        weights=[(a[e.text.chunk] / tokens).float() for a, e in zip(advantages, episodes, strict=True)],
        sound_weights=[
            (a[v.chunk] * (config.voice_weight / (sound_numbers(v) * tokens))).float()
            if (v := e.voice) is not None
            else torch.empty(0)
            for a, e in zip(of_sound if config.sound_axes else advantages, episodes, strict=True)
        ],
        scales=updated,
        groups=sum(map(len, everyone.values())),
        degenerate_groups=sum(count == 0 for term in everyone.values() for _, count in term),
        terms=len(everyone),
        degenerate_terms=sum(not any(count for _, count in term) for term in everyone.values()),
    )


def sound_numbers(voice: Stream) -> int:
    """How many numbers were drawn for a chunk of sound, in all steps of its chain. The log-prob of a chain is a sum
    over them, and so is its gradient; divided by their number it is of the size of a token's. The log-prob itself is
    never scaled."""
    assert voice.payload is not None
    return (voice.payload.shape[1] - 1) * voice.payload.shape[2]


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
    merged: dict[str, Term] = {}
    for part in teams.gather(terms):
        for name, term in part.items():
            merged[name] = merged.get(name, []) + term
    return merged


def _by_chunk(episodes: Sequence[Episode], per_token: Sequence[Tensor]) -> list[Tensor]:
    """Sums over each chunk's tokens, in their order: fp32 [N_e] -> fp64 [chunks] an episode."""
    out = []
    for episode, values in zip(episodes, per_token, strict=True):
        sums = [0.0] * len(episode.actions)
        for chunk, value in zip(episode.text.chunk.tolist(), values.tolist(), strict=True):
            sums[chunk] += value
        out.append(torch.tensor(sums, dtype=torch.float64))
    return out

"""From scores to the weight of each sampled token.

Timing and content are separate rewards: each becomes a reward-to-go per chunk, loses the mean of the group's other
rollouts, and is divided by its family's root mean square over the whole step; only then are they added. A chunk's
tokens share the chunk's advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from reward.score import Score
from rl import ranks
from rl.advantage import leave_one_out, reward_to_go, scaled
from rl.config import RLConfig
from rollout.episode import Episode


def token_weights(episodes: Sequence[Episode], scores: Sequence[Score], config: RLConfig) -> list[Tensor]:
    """Advantage of every sampled token, fp32 [N_e] an episode, divided by the number of tokens sampled by all ranks.

    Episodes come in groups of ``config.rollouts`` of one scenario. Raises MetronomeError for a reward that is not
    finite."""
    for episode, score in zip(episodes, scores, strict=True):
        for kind, reward in (("timing", score.timing), ("content", score.content)):
            bad = (~torch.isfinite(torch.as_tensor(reward))).nonzero()
            if len(bad):
                raise MetronomeError(
                    f"episode {episode.name}: the {kind} reward of chunk {int(bad[0])} is not finite. Fix the scorer "
                    f"of family {episode.family!r}; nothing was learned from this step."
                )
    advantages = [torch.zeros(len(e.actions)) for e in episodes]
    for kind, weight in (("timing", config.timing_weight), ("content", config.content_weight)):
        for i, advantage in enumerate(_normalised(episodes, scores, kind, config)):
            advantages[i] = advantages[i] + weight * advantage
    tokens = sum(ranks.gather(sum(len(e.chunk) for e in episodes)))
    return [a[e.chunk] / tokens for a, e in zip(advantages, episodes, strict=True)]


def _normalised(episodes: Sequence[Episode], scores: Sequence[Score], kind: str, config: RLConfig) -> list[Tensor]:
    """One kind's advantages, fp32 [chunks] an episode: leave-one-out in the group, over the family's RMS."""
    raw: list[Tensor] = []
    for first in range(0, len(episodes), config.rollouts):
        group = [torch.as_tensor(getattr(s, kind)) for s in scores[first : first + config.rollouts]]
        raw += leave_one_out(reward_to_go(torch.stack(group), config.gamma), config.rollouts).unbind()
    sums: dict[str, tuple[float, int]] = {}
    for episode, advantage in zip(episodes, raw, strict=True):
        square, count = sums.get(episode.family, (0.0, 0))
        sums[episode.family] = (square + float(advantage.double().square().sum()), count + advantage.numel())
    everyone = ranks.gather(sums)
    out = []
    for episode, advantage in zip(episodes, raw, strict=True):
        parts = [s[episode.family] for s in everyone if episode.family in s]
        out.append(scaled(advantage, sum(p[0] for p in parts), sum(p[1] for p in parts)))
    return out

"""Held-out evaluation: plays unseen scenarios and averages their scores over families."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from reward.combine import score
from reward.score import RewardConfig
from rl import ranks
from rollout.play import Play, play
from rollout.scenarios.base import Scenario
from rollout.session import SessionEngine


def evaluate(engine: SessionEngine, scenarios: Sequence[Scenario], reward: RewardConfig, seed: int) -> dict[str, float]:
    """Mean value of each family, its tight score under ``<family>_tight``, and the mean of the families under ``""``.

    Every rank plays its share of the scenarios; the result is the same on all, and for any number of ranks."""
    mine = [Play(scenarios[i], 0) for i in ranks.share(len(scenarios))]
    episodes = play(engine, mine, seed)
    found = [(e.family, s.value, s.tight) for e in episodes for s in [score(e.family, e.facts, e.actions, reward)]]
    every = [item for part in ranks.gather(found) for item in part]
    families = sorted({family for family, _, _ in every})
    result = {"": fmean(fmean(v for f, v, _ in every if f == family) for family in families)}
    for family in families:
        result[family] = fmean(v for f, v, _ in every if f == family)
        result[f"{family}_tight"] = fmean(t for f, _, t in every if f == family)
    return result


def named(prefix: str, result: dict[str, float]) -> dict[str, float]:
    """``eval/before`` and ``eval/before/<family>`` from a result of `evaluate`."""
    return {f"{prefix}/{name}" if name else prefix: value for name, value in result.items()}

"""Held-out evaluation: plays unseen scenarios and averages the rules' scores and the reward models' rewards over
families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from reward.source import RewardSource
from rl.learner import ranks
from rollout.engines.roller import Roller
from rollout.play import Play
from rollout.world.base import Scenario


@dataclass(frozen=True)
class HeldOut:
    """A policy's held-out results. Both mappings hold each family's mean under its name, and the mean of the families
    under ``""``."""

    score: dict[str, float]  # by the rules, in [0, 1]; the tight score is under ``<family>_tight``
    proxy: dict[str, float]  # learned reward of an episode; empty without reward models

    def named(self, when: str) -> dict[str, float]:
        """As metrics: for ``when`` = "before", ``eval/before``, ``eval/before/<family>``, ``proxy/before`` …"""
        return named(f"eval/{when}", self.score) | named(f"proxy/{when}", self.proxy)


def evaluate(
    roller: Roller, scenarios: Sequence[Scenario], source: RewardSource, seed: int, temperature: float
) -> HeldOut:
    """Every rank plays its share of the scenarios; the result is the same on all, and for any number of ranks."""
    episodes = roller.play([Play(scenarios[i], 0) for i in ranks.share(len(scenarios))], seed, temperature)
    judged = source.judge(episodes)
    scores = [(e.family, s.value, s.tight) for e, s in zip(episodes, judged.scores, strict=True)]
    proxies = [(e.family, p.total) for e, p in zip(episodes, judged.proxy, strict=bool(judged.proxy))]
    every = [item for part in ranks.gather(scores) for item in part]
    score = _by_family([(family, value) for family, value, _ in every])
    tight = _by_family([(f"{family}_tight", value) for family, _, value in every])
    proxy = _by_family([item for part in ranks.gather(proxies) for item in part])
    return HeldOut(score | {name: value for name, value in tight.items() if name}, proxy)


def _by_family(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean of each family, and the mean of these under ``""``; nothing of nothing."""
    families = sorted({family for family, _ in values})
    means = {family: fmean(value for f, value in values if f == family) for family in families}
    return {"": fmean(means.values()), **means} if means else {}


def named(prefix: str, result: Mapping[str, float]) -> dict[str, float]:
    """``eval/before`` and ``eval/before/<family>`` from a result of `evaluate`."""
    return {f"{prefix}/{name}" if name else prefix: value for name, value in result.items()}

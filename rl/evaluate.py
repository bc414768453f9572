"""Held-out evaluation: plays unseen scenarios and averages the rules' scores and the reward models' rewards over
families."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean, variance

from kernels.errors import MetronomeError
from model.program import ranks
from model.program.exhausted import needing
from reward.source import RewardSource
from rl.rollers import SMALLER
from rollout.engines.roller import Roller
from rollout.play import Play
from rollout.world.base import Scenario

WATCHED = "watched"
"""Name of the mean of the families over the scenarios that a run evaluates during RL, in a result over more of them."""
INTERVAL = "interval"
"""Name of half the 95 % interval of the mean of the families: the mean plus or minus so much."""


@dataclass(frozen=True)
class HeldOut:
    """A policy's held-out results. Both mappings hold each family's mean under its name, the mean of the families under
    ``""``, and the same mean over the first scenarios alone under `WATCHED` where that was asked for."""

    score: dict[str, float]  # by the rules, in [0, 1]; also `INTERVAL`, and the tight score under ``<family>_tight``
    proxy: dict[str, float]  # learned reward of an episode; empty without reward models

    def named(self, when: str) -> dict[str, float]:
        """As metrics: for ``when`` = "before", ``eval/before``, ``eval/before/<family>``, ``proxy/before`` …"""
        return named(f"eval/{when}", self.score) | named(f"proxy/{when}", self.proxy)


@needing("the held-out evaluation", SMALLER)
def evaluate(
    roller: Roller,
    scenarios: Sequence[Scenario],
    source: RewardSource,
    seed: int,
    temperature: float,
    watched: int = 0,
) -> HeldOut:
    """Every rank plays its share of the scenarios; the result is the same on all, and for any number of ranks.

    ``watched``: over how many of the first scenarios the means are given under `WATCHED`, too: those that an evaluation
    of these scenarios alone would give. Raises MetronomeError for a score or reward that is not finite."""
    own = ranks.share(len(scenarios))
    episodes = roller.play([Play(scenarios[i], 0) for i in own], seed, temperature)
    judged = source.judge(episodes)
    scores = [(i, e.family, s.value, s.tight) for i, e, s in zip(own, episodes, judged.scores, strict=True)]
    proxies = [(i, p.total) for i, p in zip(own, judged.proxy, strict=bool(judged.proxy))]
    every = [item for part in ranks.gather(scores) for item in part]
    families = {i: family for i, family, _, _ in every}
    values = {i: value for i, _, value, _ in every}
    rewards = {i: total for part in ranks.gather(proxies) for i, total in part}
    for what, found in (("score by the rules", values), ("learned reward", rewards)):
        if bad := [i for i, value in found.items() if not math.isfinite(value)]:
            name = scenarios[bad[0]].id
            raise MetronomeError(f"held-out scenario {name}: the {what} is {found[bad[0]]}, which is no result")
    tight = _by_family([(f"{family}_tight", value) for _, family, _, value in every])
    score, proxy = (_means(found, families, watched) for found in (values, rewards))
    within = _interval([(families[i], value) for i, value in values.items()])
    return HeldOut(score | {name: value for name, value in tight.items() if name} | within, proxy)


def _means(values: Mapping[int, float], families: Mapping[int, str], watched: int) -> dict[str, float]:
    """Means over scenarios, by their place in the list; nothing of nothing."""
    means = _by_family([(families[i], value) for i, value in values.items()])
    first = _by_family([(families[i], value) for i, value in values.items() if i < watched])
    return means | ({WATCHED: first[""]} if first else {})


def _by_family(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean of each family, and the mean of these under ``""``; nothing of nothing."""
    families = sorted({family for family, _ in values})
    means = {family: fmean(value for f, value in values if f == family) for family in families}
    return {"": fmean(means.values()), **means} if means else {}


def _interval(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    """`INTERVAL` of the mean of the families' means: 1.96 standard errors, over scenarios; nothing where a family has
    fewer than two."""
    of = {family: [value for f, value in values if f == family] for family in dict(values)}
    if not of or min(map(len, of.values())) < 2:
        return {}
    return {INTERVAL: 1.96 * math.sqrt(fsum(variance(one) / len(one) for one in of.values())) / len(of)}


def named(prefix: str, result: Mapping[str, float]) -> dict[str, float]:
    """``eval/before`` and ``eval/before/<family>`` from a result of `evaluate`."""
    return {f"{prefix}/{name}" if name else prefix: value for name, value in result.items()}

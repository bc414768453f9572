"""Where RL's rewards come from: the rules, learned reward models, or both.

The rules judge every episode, whatever acts: their verdict is what is reported, and what the learned rewards (the
*proxy*) are watched against. Learned models score every episode too, as soon as the recipe names any; with
``rewards: rules`` they are only watched. Knows nothing of advantages: how rewards of two sources are brought to one
scale is for `rl.step.credit` to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import Literal

from torch import Tensor, as_tensor

from kernels.errors import MetronomeError
from model.inputs import Conversation
from model.weights.checkpoint import weights_digest
from reward.learned.model import RewardModel
from reward.score import score
from reward.study.overoptimisation import WatchConfig
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Score


@dataclass(frozen=True)
class SourceConfig:
    """Which rewards RL learns from, and the learned models that give or watch them."""

    rewards: Literal["rules", "learned", "both"] = "rules"
    models: tuple[str, ...] = ()  # folders of reward models; together they score the families' axes, each once
    watch: WatchConfig = field(default_factory=WatchConfig)


@dataclass(frozen=True, eq=False)
class Rewards:
    """What one source gives one episode."""

    axes: Mapping[str, Tensor]  # fp32 [chunks] each, in the order of the episode's family

    def sum(self, axis: str) -> float:
        return fsum(self.axes[axis].tolist())  # exactly rounded: no order of summation to depend on

    @property
    def total(self) -> float:
        """The score of the whole episode."""
        return fsum(self.sum(axis) for axis in self.axes)


@dataclass(frozen=True, eq=False)
class Judged:
    """A judgement of E episodes, in their order."""

    scores: list[Score]  # [E] the rules' verdict, always
    rules: list[Rewards]  # [E] the rules' shaped rewards, always
    proxy: list[Rewards]  # [E] the learned models' rewards, [0] when there are none
    acting: list[list[Rewards]]  # [sources, E] those that RL learns from


class RewardSource:
    """Owns the learned models of a run. Judges each episode by itself: the same bits in any batch, on any rank."""

    def __init__(self, scenarios: ScenarioConfig, rewards: str, models: Sequence[RewardModel]) -> None:
        """``scenarios``: the families whose rules judge. Raises MetronomeError unless the models fit together, or when
        learned rewards are to act and there are none."""
        axes = [axis for model in models for axis in model.axes]
        if sorted(axes) != sorted(scenarios.axes) and (models or rewards != "rules"):
            raise MetronomeError(
                f"source.models score {', '.join(axes) or 'nothing'}, but source.rewards = {rewards} needs "
                f"{' and '.join(scenarios.axes)}, each once: name one reward model of each, or one of all"
            )
        self.models = tuple(models)
        self._scenarios = scenarios
        self._rewards = rewards

    @staticmethod
    def load(scenarios: ScenarioConfig, config: SourceConfig) -> RewardSource:
        """Raises MetronomeError when a named model is not there or cannot be read, or none is named though one must
        act."""
        if config.rewards != "rules" and not config.models:
            raise MetronomeError(
                f"source.rewards is {config.rewards}, but source.models names no reward model: give the folders that "
                "`reward.train` wrote, or learn from the rules"
            )
        for folder in config.models:
            if not Path(folder).is_dir():
                raise MetronomeError(
                    f"source.models: there is no folder {folder}; train a reward model with `reward.train`, or name "
                    "the folder of one"
                )
        return RewardSource(scenarios, config.rewards, [RewardModel.load(folder) for folder in config.models])

    @property
    def digests(self) -> tuple[str, ...]:
        """Digest of each model's weights, in the recipe's order."""
        return tuple(weights_digest(model) for model in self.models)

    def judge(self, episodes: Sequence[Episode]) -> Judged:
        scores = [score(e.family, e.facts, e.actions, self._scenarios) for e in episodes]
        rules = [Rewards({axis: as_tensor(values) for axis, values in s.rewards.items()}) for s in scores]
        proxy = self.learned(episodes, [e.family for e in episodes])
        acting = {"rules": [rules], "learned": [proxy], "both": [rules, proxy]}[self._rewards]
        return Judged(scores, rules, proxy, acting)

    def learned(self, episodes: Sequence[Conversation], families: Sequence[str]) -> list[Rewards]:
        """What the learned models alone say of episodes or transcripts of ``families`` [E], on their families' axes;
        nothing when there are none."""
        if not self.models or not episodes:
            return []
        columns = {
            axis: [one[:, i] for one in found]
            for model in self.models
            for found in [model.score(episodes)]
            for i, axis in enumerate(model.axes)
        }
        axes = {name: family.axes for name, family in self._scenarios.members.items()}
        return [Rewards({axis: columns[axis][i] for axis in axes[name]}) for i, name in enumerate(families)]

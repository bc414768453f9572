"""Where RL's rewards come from: the rules, learned reward models, or both.

The rules score every episode, even where RL learns from learned rewards only: their score is what is reported, and
what the learned rewards (the *proxy*) are compared with. Reward models score every episode as soon as the recipe names
any; with ``rewards: rules`` their rewards are only recorded. A listener (`reward.voice.listener`), where the recipe
asks for one, adds an axis to the rules' rewards of families whose words are said aloud; it is no part of their score.
Knows nothing of advantages: `rl.step.credit` brings the rewards of two sources to one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import Literal

from torch import Tensor, as_tensor

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.inputs import Conversation
from model.program.ranges import FilePaths
from model.weights.checkpoint import weights_digest
from reward.learned.model import RewardModel, check_silent
from reward.score import score
from reward.study.overoptimisation import WatchConfig
from reward.voice.listener import UNDERSTOOD, Listener
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Score
from rollout.turn.vocabulary import Vocabulary


@dataclass(frozen=True)
class SourceConfig:
    """Which rewards RL learns from, the reward models, and the watch for over-optimisation of them."""

    rewards: Literal["rules", "learned", "both"] = "rules"
    models: FilePaths = ()  # folders of reward models; together they score the families' axes, each once
    listener: bool = False  # reward by what a recogniser understands, as the rules' axis understood (extra `voice`)
    watch: WatchConfig = field(default_factory=WatchConfig)


@dataclass(frozen=True, eq=False)
class Rewards:
    """The rewards of one episode by one source (the rules, or the reward models together)."""

    axes: Mapping[str, Tensor]  # fp32 [chunks] each, on the CPU, in the order of the episode's family

    def sum(self, axis: str) -> float:
        """The episode's reward on one axis."""
        return fsum(self.axes[axis].tolist())  # exactly rounded: no order of summation to depend on

    @property
    def total(self) -> float:
        """The episode's reward: the sum over chunks and axes."""
        return fsum(self.sum(axis) for axis in self.axes)


@dataclass(frozen=True, eq=False)
class Judged:
    """Scores and rewards of E episodes, in their order."""

    scores: list[Score]  # [E] by the rules
    rules: list[Rewards]  # [E] by the rules
    proxy: list[Rewards]  # [E] by the reward models; empty without any
    acting: list[list[Rewards]]  # [sources, E] those that RL learns from


class RewardSource:
    """Owns the reward models of a run. An episode's rewards have the same bits in any batch and on any rank; a
    listener's are promised on one machine only (`reward.voice.recognise`)."""

    def __init__(
        self,
        scenarios: ScenarioConfig,
        rewards: str,
        models: Sequence[RewardModel],
        listeners: Mapping[str, Listener] | None = None,
    ) -> None:
        """``scenarios``: the families whose rules score; ``rewards``: as in `SourceConfig`; ``listeners``: by family.
        Raises MetronomeError unless the models together score each axis of the families once; no models are needed
        where ``rewards`` is "rules"."""
        axes = [axis for model in models for axis in model.axes]
        if sorted(axes) != sorted(scenarios.axes) and (models or rewards != "rules"):
            raise MetronomeError(
                f"source.models score {', '.join(axes) or 'nothing'}, but source.rewards = {rewards} needs "
                f"{' and '.join(scenarios.axes)}, each once: name one reward model of each, or one of all"
            )
        self.models = tuple(models)
        self._listeners = dict(listeners or {})
        self._scenarios = scenarios
        self._rewards = rewards

    @staticmethod
    def load(scenarios: ScenarioConfig, config: SourceConfig) -> RewardSource:
        """Raises MetronomeError when a named model is missing or cannot be read, when none is named though RL is to
        learn from learned rewards, when a listener is asked for where nothing is said aloud or no recogniser is
        installed, or as the constructor does."""
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
        ears = listeners(scenarios) if config.listener else {}
        models = [RewardModel.load(folder) for folder in config.models]
        return RewardSource(scenarios, config.rewards, models, ears)

    @property
    def digests(self) -> tuple[str, ...]:
        """Digest of each model's weights, in the recipe's order."""
        return tuple(weights_digest(model) for model in self.models)

    def check_policy(self, policy: InteractionModel) -> None:
        """Raises MetronomeError for a reward model that has another tokenizer than the policy that it is to judge, and
        for any where the policy has a voice."""
        for model in self.models:
            check_silent(policy, "the policy")
            Vocabulary.of(policy).check_same(model.backbone, model.name)

    def judge(self, episodes: Sequence[Episode]) -> Judged:
        """Raises what `reward.score.score` raises."""
        scores = [score(e.family, e.facts, e.actions, self._scenarios) for e in episodes]
        rules = [
            Rewards({axis: as_tensor(values) for axis, values in s.rewards.items()} | self._listen(e))
            for s, e in zip(scores, episodes, strict=True)
        ]
        proxy = self.learned(episodes, [e.family for e in episodes])
        acting = {"rules": [rules], "learned": [proxy], "both": [rules, proxy]}[self._rewards]
        return Judged(scores, rules, proxy, acting)

    def _listen(self, episode: Episode) -> dict[str, Tensor]:
        listener = self._listeners.get(episode.family)
        return {} if listener is None else {UNDERSTOOD: listener.rewards(episode.actions)}

    def learned(self, episodes: Sequence[Conversation], families: Sequence[str]) -> list[Rewards]:
        """The reward models' rewards of E episodes or transcripts, on the axes of their ``families`` [E]; empty without
        models or episodes."""
        if not self.models or not episodes:
            return []
        columns = {
            axis: [of_episode[:, i] for of_episode in rewards]
            for model in self.models
            for rewards in [model.score(episodes)]
            for i, axis in enumerate(model.axes)
        }
        axes = {name: family.axes for name, family in self._scenarios.members.items()}
        return [Rewards({axis: columns[axis][i] for axis in axes[name]}) for i, name in enumerate(families)]


def listeners(scenarios: ScenarioConfig) -> dict[str, Listener]:
    """Those of the families whose words are said aloud. Raises MetronomeError where there is none, and as `Listener`
    does."""
    ears = {name: Listener(words, scenarios.settings_of(name).audible_db) for name, words in scenarios.aloud.items()}
    if not ears:
        raise MetronomeError(
            f"source.listener: nothing is said aloud in {', '.join(scenarios.members)}: leave it out, or take a family "
            "that is, as repeat"
        )
    return ears

"""The rules' score of an episode, by its family's scorer, and the rewards of events that the shipped scorers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.errors import MetronomeError
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Score
from rollout.turn.action import Action


@dataclass(frozen=True)
class EventRewards:
    """Rewards of single events. Hit 1, spurious -0.8 and miss -1 balance: milder ones taught either spam or silence."""

    hit: float = 1.0
    edge: float = 0.2  # timing reward of a hit at the edge of its window, as a fraction of `hit`
    miss: float = -1.0
    spurious: float = -0.8
    right_words: float = 1.0
    wrong_words: float = -1.0


def score(family: str, facts: Mapping[str, Any], actions: Sequence[Action], scenarios: ScenarioConfig) -> Score:
    """Scores an episode from what is stored with it: ``facts`` as `Facts.to_json` gave them, ``actions`` [chunks].

    Raises ValueError where these do not belong together, MetronomeError where the scorer breaks its family's word."""
    if facts["family"] != family:
        raise ValueError(f"an episode of {family} carries facts of {facts['family']}")
    kind, read = scenarios.family(family), scenarios.facts(facts)
    if len(actions) != read.chunks:
        raise ValueError(f"{family}: {len(actions)} actions for an episode of {read.chunks} chunks")
    scored: Score = kind.score(read, actions, scenarios.settings_of(family))
    forms = {axis: rewards.shape for axis, rewards in scored.rewards.items()}
    if list(forms.items()) != [(axis, (read.chunks,)) for axis in kind.axes]:
        raise MetronomeError(
            f"the scorer of family {family!r} gave rewards of {forms}; its family names the axes "
            f"{', '.join(kind.axes)} in this order, each [{read.chunks}], one reward a chunk"
        )
    return scored

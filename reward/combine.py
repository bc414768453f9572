"""One door to all rule scorers: facts and actions of an episode in, its score out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reward.score import RewardConfig, Score
from reward.timespeak import score_timespeak
from reward.turn_taking import score_turn_taking
from rollout.chunk import Action
from rollout.scenarios.registry import facts_from_json
from rollout.scenarios.timespeak import TimespeakFacts


def score(family: str, facts: Mapping[str, Any], actions: Sequence[Action], config: RewardConfig) -> Score:
    """Scores an episode from what is stored with it: ``facts`` as `Facts.to_json` gave them, ``actions`` [chunks]."""
    if facts["family"] != family:
        raise ValueError(f"an episode of {family} carries facts of {facts['family']}")
    read = facts_from_json(facts)
    if len(actions) != read.chunks:
        raise ValueError(f"{family}: {len(actions)} actions for an episode of {read.chunks} chunks")
    if isinstance(read, TimespeakFacts):
        return score_timespeak(read, actions, config)
    return score_turn_taking(read, actions, config)

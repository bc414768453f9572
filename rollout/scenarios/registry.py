"""The scenario families: their names, their settings, and how a scenario or its facts are found by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.scenarios.base import Scenario
from rollout.scenarios.timespeak import TimespeakConfig, TimespeakFacts, timespeak
from rollout.scenarios.turn_taking import TurnTakingConfig, TurnTakingFacts, turn_taking
from rollout.speech import SpeechBank, Split

FAMILIES = ("timespeak", "turn_taking")


@dataclass(frozen=True)
class ScenarioConfig:
    """The settings of every family."""

    timespeak: TimespeakConfig = field(default_factory=TimespeakConfig)
    turn_taking: TurnTakingConfig = field(default_factory=TurnTakingConfig)


def scenario(family: str, split: Split, seed: int, bank: SpeechBank, config: ScenarioConfig) -> Scenario:
    """The scenario "family/split/seed": a pure function of its arguments."""
    match family:
        case "timespeak":
            return timespeak(split, seed, bank, config.timespeak)
        case "turn_taking":
            return turn_taking(split, seed, bank, config.turn_taking)
    raise ValueError(f"no scenario family is called {family!r}: choose one of {', '.join(FAMILIES)}")


def facts_from_json(fields: Mapping[str, Any]) -> TimespeakFacts | TurnTakingFacts:
    """Reads back what `Facts.to_json` wrote."""
    match fields["family"]:
        case "timespeak":
            return TimespeakFacts.from_json(fields)
        case "turn_taking":
            return TurnTakingFacts.from_json(fields)
    raise ValueError(f"facts name an unknown family {fields['family']!r}: expected one of {', '.join(FAMILIES)}")

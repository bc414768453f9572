"""The rules' score of an episode, by its family's scorer, and the rewards of events that the shipped scorers share."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from kernels.errors import MetronomeError
from model.program.ranges import Probability, Range
from model.program.reading import UnreadableError
from model.weights.finite import NotFiniteError
from rollout.record.episode import Episode, check_tensors
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Score
from rollout.turn.action import Action
from rollout.world.base import Facts

Reward = Annotated[float, Range(-100.0, 100.0)]


@dataclass(frozen=True)
class EventRewards:
    """Rewards of single events, without unit. With a hit at 1, a weaker penalty than -1 for a miss taught silence, and
    a weaker one than -0.8 for spurious speech taught constant speech."""

    hit: Reward = 1.0
    edge: Probability = 0.2  # timing reward of a hit at the edge of its window, as a fraction of `hit`
    miss: Reward = -1.0
    spurious: Reward = -0.8
    right_words: Reward = 1.0
    wrong_words: Reward = -1.0


def score(family: str, facts: Mapping[str, Any], actions: Sequence[Action], scenarios: ScenarioConfig) -> Score:
    """Scores an episode from what is stored with it: ``facts`` as `Facts.to_json` gave them, ``actions`` [chunks].

    Raises ValueError where facts, family and actions do not belong together, MetronomeError for a scorer whose rewards
    have other axes or another length than its family states, or are not finite."""
    return _scored(family, _read(family, facts, actions, scenarios), actions, scenarios)


def _read(family: str, facts: Mapping[str, Any], actions: Sequence[Action], scenarios: ScenarioConfig) -> Facts:
    if facts["family"] != family:
        raise ValueError(f"an episode of {family} carries facts of {facts['family']}")
    read = scenarios.facts(facts)
    if len(actions) != read.chunks:
        raise ValueError(f"{family}: {len(actions)} actions for an episode of {read.chunks} chunks")
    return read


def _scored(family: str, facts: Facts, actions: Sequence[Action], scenarios: ScenarioConfig) -> Score:
    kind = scenarios.family(family)
    scored: Score = kind.score(facts, actions, scenarios.settings_of(family))
    forms = {axis: rewards.shape for axis, rewards in scored.rewards.items()}
    if list(forms.items()) != [(axis, (facts.chunks,)) for axis in kind.axes]:
        raise MetronomeError(
            f"the scorer of family {family!r} gave rewards of {forms}; its family names the axes "
            f"{', '.join(kind.axes)} in this order, each [{facts.chunks}], one reward a chunk"
        )
    for name, values in {"score": scored.value, "tight score": scored.tight, **scored.rewards}.items():
        if not np.isfinite(np.asarray(values)).all():
            raise NotFiniteError(f"the scorer of family {family!r} gave a {name} that is not finite")
    return scored


def score_stored(episode: Episode, scenarios: ScenarioConfig) -> Score | None:
    """The score of an episode that comes from a file; None where its facts are not what its family reads, or its
    tensors not an episode's. Raises MetronomeError, naming family and episode, when the scorer itself fails on facts
    that could be read."""
    try:
        check_tensors(episode)
        scenarios.stored_facts(episode.facts)
        facts = _read(episode.family, episode.facts, episode.actions, scenarios)
    except (UnreadableError, KeyError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError):
        return None
    try:
        return _scored(episode.family, facts, episode.actions, scenarios)
    except MetronomeError:
        raise
    except Exception as error:  # a family's scorer may be anyone's code and raise anything
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())} ({at.filename}, line {at.lineno})"
        raise MetronomeError(
            f"the scorer of family {episode.family!r} fails on the stored episode {episode.name}: {what}; the scorer "
            "has a bug, or the facts are another version's"
        ) from error

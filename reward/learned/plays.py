"""Conversations with the rule's rewards beside them, and the preferences that follow from these rewards.

The rule's reward of a stretch is the sum of its chunks' rewards on one axis; of two stretches the one with more is
chosen, and the difference is the margin. Differences too small to matter give no preference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels import exact
from model.senses.video import Frames
from reward.learned.corrupt import FAULTS_OF, Expert, draw
from reward.learned.preference import Preference, Stretch
from reward.score import score
from rollout.record.episode import Episode
from rollout.record.transcript import from_observations
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.seeds import generator
from rollout.turn.action import Action
from rollout.turn.grammar import Grammar
from rollout.turn.observation import Observation, stack_audio
from rollout.world.base import Facts, Scenario, Script, User

MIN_MARGIN = 0.05
"""Smallest difference of rewards that makes a preference, in the rule's units (an event on time is worth 1)."""
LONG_SHARE = 0.5
"""Probability with which `segment_preferences` compares stretches of a random length instead of one chunk. At higher
values models spread the reward of a finished reply over all of its words."""


@dataclass(frozen=True, eq=False)
class Played:
    """One conversation and the rule's rewards of it."""

    scenario: Scenario
    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    frames: Frames
    rewards: Mapping[str, NDArray[np.float32]]  # axis -> [chunks]
    source: str  # "expert", a kind of fault, "mistakes" or "rollouts"
    size_ms: int = 0  # size of the fault

    def total(self, axis: str, first: int = 0, end: int | None = None) -> float:
        """The rule's reward of chunks ``first`` … ``end - 1`` on one axis; all chunks by default."""
        return fsum(self.rewards[axis][first:end].tolist())

    def stretch(self, first: int = 0, end: int | None = None) -> Stretch:
        """Chunks ``first`` … ``end - 1``; all chunks by default."""
        end = self.scenario.chunks if end is None else end
        return Stretch(self.tokens, self.codes, first, end, self.frames)


class Writer:
    """Plays scenarios by their experts and writes the plays as token sequences, with the rule's rewards."""

    def __init__(self, grammar: Grammar, scenarios: ScenarioConfig) -> None:
        self._grammar = grammar
        self._scenarios = scenarios

    def demonstration(
        self,
        scenario: Scenario,
        played: tuple[Sequence[Observation], Sequence[Action], Facts],
        source: str,
        size_ms: int = 0,
    ) -> Played:
        """``played``: what `enact` returned; ``source`` and ``size_ms``: as in `Played`."""
        observed, actions, facts = played
        written = from_observations(observed, actions, self._grammar)
        rewards = score(scenario.family, facts.to_json(), actions, self._scenarios).rewards
        return Played(scenario, written.tokens, written.codes, written.frames, rewards, source, size_ms)

    def demonstrations(
        self,
        scenario: Scenario,
        words: Sequence[str],
        sizes: Sequence[int],
        faults: int,
        mistakes: int,
    ) -> list[Played]:
        """The expert's play of a scenario, then at most ``faults`` corruptions of it for each axis, then ``mistakes``
        plays by an expert with frequent mistakes. Kinds of faults and sizes are drawn by the scenario's id; every
        fault's size, as it is counted, is one of ``sizes`` (chunks). ``words``: what faults may say."""
        rng = generator("faults", scenario.id)

        def faultless() -> Callable[[User], Script]:
            return self._scenarios.expert(scenario, generator("expert", scenario.id), mistake_scale=0)

        observed, actions, facts = enact(scenario, faultless())
        known = Expert.of(stack_audio(observed).numpy(), actions, words)
        plays = [self.demonstration(scenario, (observed, actions, facts), "expert")]
        axes = [axis for axis in plays[0].rewards if axis in FAULTS_OF]
        for kinds in [FAULTS_OF[axis] for axis in axes for _ in range(faults)]:
            fault = draw(known, kinds[int(rng.integers(len(kinds)))], sizes, rng)
            if fault is not None:
                played = enact(scenario, faultless(), fault.edits)
                plays.append(self.demonstration(scenario, played, fault.kind, fault.size_ms))
        for i in range(mistakes):
            erring = self._scenarios.expert(scenario, generator("mistakes", scenario.id, i), gross=True)
            played = enact(scenario, erring)
            plays.append(self.demonstration(scenario, played, "mistakes"))
        return plays


def of_episode(scenario: Scenario, episode: Episode, scenarios: ScenarioConfig) -> Played:
    """A rollout with the rule's rewards."""
    rewards = score(episode.family, episode.facts, episode.actions, scenarios).rewards
    return Played(scenario, episode.tokens, episode.codes, episode.frames, rewards, "rollouts")


def prefer(
    axis: str, source: str, a: tuple[Played, int, int], b: tuple[Played, int, int], size_ms: int = 0
) -> Preference | None:
    """The preference between two stretches, each given as (play, first chunk, end); None when the rule's rewards differ
    by less than `MIN_MARGIN`."""
    margin = a[0].total(axis, a[1], a[2]) - b[0].total(axis, b[1], b[2])
    if abs(margin) < MIN_MARGIN:
        return None
    (better, *at), (worse, *other) = (a, b) if margin > 0 else (b, a)
    return Preference(
        chosen=better.stretch(*at),
        rejected=worse.stretch(*other),
        axis=axis,
        source=source,
        size_ms=size_ms,
        family=better.scenario.family,
        scenario=better.scenario.id,
        margin=abs(margin),
    )


def fault_preferences(axis: str, plays: Sequence[Played]) -> Iterator[Preference]:
    """The expert's play ``plays[0]`` preferred to each of the others, where the rule rewards it more."""
    expert = plays[0]
    for play in plays[1:]:
        if expert.total(axis) > play.total(axis):
            preference = prefer(axis, play.source, _whole(expert), _whole(play), play.size_ms)
            if preference is not None:
                yield preference


def whole_preferences(axis: str, plays: Sequence[Played], count: int, rng: np.random.Generator) -> Iterator[Preference]:
    """Up to ``count`` preferences between whole conversations, drawn two at a time."""
    for _ in range(count):
        a, b = (plays[int(i)] for i in rng.choice(len(plays), 2, replace=False))
        preference = prefer(axis, "rollouts", _whole(a), _whole(b))
        if preference is not None:
            yield preference


def segment_preferences(
    axis: str, plays: Sequence[Played], count: int, rng: np.random.Generator, aligned: bool
) -> Iterator[Preference]:
    """Up to ``count`` preferences between two stretches of equal length, from which a model learns *which chunks* earn
    a reward.

    With ``aligned``, both stretches are the same chunks of two different plays (which must be of one scenario) around a
    chunk that the rule rewards differently in them. Otherwise the first holds a chunk with a reward or penalty, and the
    second is drawn anywhere, possibly in the same play. Half are one chunk long, the others have log-uniform
    lengths."""
    for _ in range(count):
        a, b = (plays[int(i)] for i in rng.choice(len(plays), 2, replace=not aligned))
        shortest = min(a.scenario.chunks, b.scenario.chunks)
        other = b.rewards[axis][:shortest] if aligned else np.float32(0)
        eventful = np.flatnonzero(a.rewards[axis][:shortest] != other)
        if not len(eventful):
            continue
        length = int(exact.exp(rng.uniform(0.0, exact.ln(shortest)))) if rng.random() < LONG_SHARE else 1
        event = int(eventful[int(rng.integers(len(eventful)))])
        first, last = max(0, event - length + 1), min(event, shortest - length)
        if first > last:
            continue
        at = int(rng.integers(first, last + 1))
        other_at = at if aligned else int(rng.integers(b.scenario.chunks - length + 1))
        preference = prefer(axis, "segments", (a, at, at + length), (b, other_at, other_at + length))
        if preference is not None:
            yield preference


def _whole(play: Played) -> tuple[Played, int, int]:
    return play, 0, play.scenario.chunks

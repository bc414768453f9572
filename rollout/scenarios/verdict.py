"""What a scorer says of an episode: a list of events that a person can read, and what follows from them.

Two things are kept apart. The *verdict* of an episode is the share of what was due that was done right,
``value = correct / (due + spurious)``: what is reported. The *rewards* are per chunk and graded, one number for each
axis of the family (when the model acted, what it said): what RL learns from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

TIMING, CONTENT = "timing", "content"
"""The shipped families' axes of reward: for when the model spoke or kept silent, and for what it said. A family may
have others."""


class Outcome(StrEnum):
    """How an event enters the verdict: hit, wrong and missed were due; spurious was not; shaping does not count."""

    HIT = "hit"
    WRONG = "wrong"  # done when due, but with the wrong words
    MISSED = "missed"
    SPURIOUS = "spurious"
    SHAPING = "shaping"


@dataclass(frozen=True)
class Event:
    """One thing that was due, or done, or both. Example: ``Event(27, "reminder", Outcome.HIT, 28, {TIMING: 0.6})``."""

    chunk: int  # where it was done, or became a miss; its rewards go there
    kind: str  # "echo", "reminder", "stop", "onset", "reply", "speech"
    outcome: Outcome
    due: int | None = None  # the best chunk, None where nothing was due
    rewards: Mapping[str, float] = field(default_factory=dict)  # by axis; 0 on those left out


@dataclass(frozen=True, eq=False)
class Score:
    """The verdict and the rewards of one episode."""

    rewards: Mapping[str, NDArray[np.float32]]  # by axis, in the family's order, [chunks] each
    correct: int
    due: int
    spurious: int
    value: float  # correct / (due + spurious), in [0, 1]; 1 if nothing was due and nothing said
    tight: float  # the same with tight windows
    events: tuple[Event, ...]


def ratio(events: Sequence[Event]) -> float:
    """correct / (due + spurious)."""
    correct, due, spurious = counts(events)
    return correct / (due + spurious) if due + spurious else 1.0


def counts(events: Sequence[Event]) -> tuple[int, int, int]:
    """How many events were done right, were due, and were spurious."""
    outcomes = [event.outcome for event in events]
    correct = outcomes.count(Outcome.HIT)
    due = correct + outcomes.count(Outcome.WRONG) + outcomes.count(Outcome.MISSED)
    return correct, due, outcomes.count(Outcome.SPURIOUS)


def assemble(events: Sequence[Event], tight: Sequence[Event], chunks: int, axes: Sequence[str]) -> Score:
    """Adds up the events of the ordinary windows; those of the tight windows only give `Score.tight`. Raises KeyError
    for an event that is rewarded on none of the ``axes``."""
    rewards = {axis: np.zeros(chunks, np.float32) for axis in axes}
    for event in events:
        for axis, reward in event.rewards.items():
            rewards[axis][event.chunk] += np.float32(reward)
    correct, due, spurious = counts(events)
    return Score(rewards, correct, due, spurious, ratio(events), ratio(tight), tuple(events))

"""A scorer's result for an episode: a list of events that a person can read, and two numbers derived from it.

`Score.value` is reported: the fraction of due actions that were right, correct / (due + spurious). `Score.rewards` is
what RL learns from: per chunk, graded, one number for each axis of the family (timing, content).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

TIMING, CONTENT = "timing", "content"
"""The shipped families' axes of reward: whether the model spoke and was silent at the right times, and whether its
words were right. Other families may have other axes."""


class Outcome(StrEnum):
    """How an event counts in `Score.value`: hit, wrong and missed were due; spurious was not due; shaping is not
    counted and only gives rewards."""

    HIT = "hit"
    WRONG = "wrong"  # done when due, but with the wrong words
    MISSED = "missed"
    SPURIOUS = "spurious"
    SHAPING = "shaping"


@dataclass(frozen=True)
class Event:
    """One thing that was due, or done, or both. Example: ``Event(27, "reminder", Outcome.HIT, 28, {TIMING: 0.6})``."""

    chunk: int  # in which it was done, or became a miss; the rewards are given in it
    kind: str  # "echo", "reminder", "stop", "onset", "reply", "speech"
    outcome: Outcome
    due: int | None = None  # the best chunk, None where nothing was due
    rewards: Mapping[str, float] = field(default_factory=dict)  # by axis; 0 on those left out


@dataclass(frozen=True, eq=False)
class Score:
    """The result for one episode."""

    rewards: Mapping[str, NDArray[np.float32]]  # by axis, in the family's order, [chunks] each
    correct: int
    due: int
    spurious: int
    value: float  # correct / (due + spurious), in [0, 1]; 1 if nothing was due and nothing said
    tight: float  # value with narrower time windows
    events: tuple[Event, ...]


def ratio(events: Sequence[Event]) -> float:
    """correct / (due + spurious); 1 if both are 0."""
    correct, due, spurious = counts(events)
    return correct / (due + spurious) if due + spurious else 1.0


def counts(events: Sequence[Event]) -> tuple[int, int, int]:
    """(correct, due, spurious) numbers of events."""
    outcomes = [event.outcome for event in events]
    correct = outcomes.count(Outcome.HIT)
    due = correct + outcomes.count(Outcome.WRONG) + outcomes.count(Outcome.MISSED)
    return correct, due, outcomes.count(Outcome.SPURIOUS)


def assemble(events: Sequence[Event], tight: Sequence[Event], chunks: int, axes: Sequence[str]) -> Score:
    """The score of ``events``; ``tight``: the events under narrower time windows, which only give `Score.tight`. Raises
    KeyError for an event with a reward on another axis than ``axes``."""
    rewards = {axis: np.zeros(chunks, np.float32) for axis in axes}
    for event in events:
        for axis, reward in event.rewards.items():
            rewards[axis][event.chunk] += np.float32(reward)
    correct, due, spurious = counts(events)
    return Score(rewards, correct, due, spurious, ratio(events), ratio(tight), tuple(events))

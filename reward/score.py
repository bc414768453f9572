"""What a score is, and the constants that shape it.

Two things are kept apart. The *verdict* of an episode is the share of what was due that was done right,
``value = correct / (due + spurious)``: what is reported. The *rewards* are per chunk and graded, one number for
when the model acted and one for what it said: what RL learns from. Both come from one list of `Event`s, which a
person can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TimespeakReward:
    """Windows in chunks around the moment something is due."""

    echo_delay: int = 1  # chunks from the request's end to the echo's best moment
    echo_late: int = 3  # chunks from the request's end to the last moment of an echo; the first is the number's end
    tolerance: float = 0.2  # half-width of a reminder's window, as a fraction of the interval, and at least 1 chunk
    stop_grace: int = 1  # chunks after the stop in which speech is forgiven


@dataclass(frozen=True)
class TurnTakingReward:
    """Windows in chunks after the end of a turn or the onset of an interruption."""

    onset: tuple[int, int] = (1, 3)  # first and last chunk, after the end of the turn, in which a reply may begin
    prompt_onset: int = 2  # up to here an onset earns the full reward, and counts in the tight score
    stop: int = 2  # the first silent chunk is at most so many after the interruption's first chunk
    prompt_stop: int = 1  # up to here stopping earns the full reward, and counts in the tight score
    reply_chunks: tuple[int, int] = (5, 7)  # length of a reply that nobody interrupts
    reply_words: int = 5  # words of the reply that must be right, each in its place


@dataclass(frozen=True)
class RewardConfig:
    """Rewards of single events. Hit 1, spurious -0.8 and miss -1 balance: milder ones taught either spam or silence."""

    hit: float = 1.0
    edge: float = 0.2  # timing reward of a hit at the edge of its window, as a fraction of `hit`
    tight_chunks: int = 1  # half-width of every window in timespeak's tight score
    miss: float = -1.0
    spurious: float = -0.8
    trailing: float = -0.4  # each further chunk of an utterance that should not have begun
    right_words: float = 1.0  # in timespeak times the timing's grade
    wrong_words: float = -1.0
    reply_word: float = 0.3  # each word of a reply after its first: plus if right, minus if wrong
    timespeak: TimespeakReward = field(default_factory=TimespeakReward)
    turn_taking: TurnTakingReward = field(default_factory=TurnTakingReward)


class Outcome(StrEnum):
    """How an event enters the verdict: hit, wrong and missed were due; spurious was not; shaping does not count."""

    HIT = "hit"
    WRONG = "wrong"  # done when due, but with the wrong words
    MISSED = "missed"
    SPURIOUS = "spurious"
    SHAPING = "shaping"


@dataclass(frozen=True)
class Event:
    """One thing that was due, or done, or both. Example: ``Event(27, "reminder", Outcome.HIT, 28, 0.6, 1.0)``."""

    chunk: int  # where it was done, or became a miss; its rewards go there
    kind: str  # "echo", "reminder", "stop", "onset", "reply", "speech"
    outcome: Outcome
    due: int | None = None  # the best chunk, None where nothing was due
    timing: float = 0.0
    content: float = 0.0


@dataclass(frozen=True, eq=False)
class Score:
    """The verdict and the rewards of one episode."""

    timing: NDArray[np.float32]  # [chunks] reward for when the model spoke or kept silent
    content: NDArray[np.float32]  # [chunks] reward for what it said, only where the timing was right
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


def assemble(events: Sequence[Event], tight: Sequence[Event], chunks: int) -> Score:
    """Adds up the events of the ordinary windows; those of the tight windows only give `Score.tight`."""
    timing = np.zeros(chunks, np.float32)
    content = np.zeros(chunks, np.float32)
    for event in events:
        timing[event.chunk] += np.float32(event.timing)
        content[event.chunk] += np.float32(event.content)
    correct, due, spurious = counts(events)
    return Score(timing, content, correct, due, spurious, ratio(events), ratio(tight), tuple(events))

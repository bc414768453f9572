"""Scripted experts that play a scenario with full knowledge of it, and the mistakes that they make on purpose.

Demonstrations start a policy off; they are corrupted at stated rates so that the warm-started policy acts at all
but leaves RL something to learn. With every rate 0 (`PERFECT`) the expert is faultless, which a test holds over
many seeds.

An expert sees the user's facts so far in each chunk, the future of what was already decided included; it does not
score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollout.chunk import CHUNKS_PER_SECOND, LISTEN, Action, speak
from rollout.scenarios.base import Facts, Scenario, User
from rollout.scenarios.timespeak import TimespeakFacts, TimespeakScenario
from rollout.scenarios.turn_taking import TurnTakingFacts, TurnTakingScenario
from rollout.speech import NUMBER_WORDS
from rollout.turn.observation import audio_of


@dataclass(frozen=True)
class Corruption:
    """How often a demonstration is wrong. All are probabilities but ``jitter``."""

    wrong_number: float = 0.12  # timespeak: another number is said back, and its interval kept
    jitter: float = 0.08  # timespeak: standard deviation of an interval, as a fraction of it
    omission: float = 0.10  # timespeak: of each reminder
    ignored_stop: float = 0.60  # timespeak
    pause_reply: float = 0.35  # turn_taking: of each pause, a reply begins in it
    wrong_delay: float = 0.45  # turn_taking: of each turn, the reply comes too early or too late
    ignored_interruption: float = 0.50  # turn_taking: the reply goes on to its end


PERFECT = Corruption(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
Script = Callable[[int], Action]
"""The action of chunk k, after the user's audio of chunk k; called once for every chunk, in order."""

NO_EDITS: Mapping[int, Action] = {}


def demonstrate(
    scenario: Scenario, rng: np.random.Generator, corruption: Corruption, edits: Mapping[int, Action] = NO_EDITS
) -> tuple[NDArray[np.float32], list[Action], Facts]:
    """Plays one episode: the user's audio float32 [chunks, CHUNK_SAMPLES], the expert's actions [chunks], the user's
    facts.

    ``edits`` puts other actions into the chunks that it names (from its first to its last one: silence where it names
    none), and the user reacts to those; after them the expert, who has not noticed, is heard again from its next
    silence on."""
    return enact(scenario, lambda user: _edited(expert(scenario, user, rng, corruption), edits))


def enact(scenario: Scenario, cast: Callable[[User], Script]) -> tuple[NDArray[np.float32], list[Action], Facts]:
    """Plays one episode by the script that ``cast`` has for its user; returns what `demonstrate` does."""
    user = scenario.user()
    script = cast(user)
    observed, actions = [], []
    heard: Action | None = None
    for k in range(scenario.chunks):
        observed.append(user.next_chunk(heard))
        heard = script(k)
        actions.append(heard)
    return audio_of(observed).numpy(), actions, user.facts()


def _edited(script: Script, edits: Mapping[int, Action]) -> Script:
    if not edits:
        return script
    first, last = min(edits), max(edits)
    muted = False

    def edited(k: int) -> Action:
        nonlocal muted
        action = script(k)
        if first <= k <= last:
            muted = True
            return edits.get(k, LISTEN)
        muted = muted and action.speaks
        return LISTEN if muted else action

    return edited


class _Expert(ABC):
    @abstractmethod
    def act(self, k: int) -> Action:
        """The action of chunk k, after the user's audio of chunk k."""


def expert(scenario: Scenario, user: User, rng: np.random.Generator, corruption: Corruption) -> Callable[[int], Action]:
    """The script of the family's expert, for `enact`."""
    if isinstance(scenario, TimespeakScenario):
        return _TimespeakExpert(user, rng, corruption, scenario.numbers).act
    if isinstance(scenario, TurnTakingScenario):
        return _TurnTakingExpert(user, rng, corruption).act
    raise TypeError(f"no expert plays scenarios of {type(scenario).__name__}")


class _TimespeakExpert(_Expert):
    """Says the number back one chunk after the request, then reminds until the stop has been heard."""

    def __init__(self, user: User, rng: np.random.Generator, corruption: Corruption, numbers: tuple[str, ...]) -> None:
        self._user = user
        self._rng = rng
        self._corruption = corruption
        facts = self._facts()
        others = [number for number in numbers if number != facts.number]
        wrong = rng.random() < corruption.wrong_number and others
        self._number = others[int(rng.integers(len(others)))] if wrong else facts.number
        self._interval = NUMBER_WORDS.index(self._number) * CHUNKS_PER_SECOND
        self._ignores_stop = rng.random() < corruption.ignored_stop
        self._omits = rng.random() < corruption.omission
        self._echo = facts.request_end + 1
        self._due = self._echo + self._jittered()

    def _facts(self) -> TimespeakFacts:
        facts = self._user.facts()
        assert isinstance(facts, TimespeakFacts)
        return facts

    def _jittered(self) -> int:
        return max(1, round(self._interval * (1.0 + self._corruption.jitter * _nearly_normal(self._rng))))

    def act(self, k: int) -> Action:
        facts = self._facts()
        if facts.stop_end is not None and k >= facts.stop_end and not self._ignores_stop:
            return LISTEN
        if k == self._echo:
            return speak(self._number)
        if k != self._due:
            return LISTEN
        omitted = self._omits
        self._omits = self._rng.random() < self._corruption.omission
        self._due = k + self._jittered()
        return LISTEN if omitted else speak(facts.reminder)


def _nearly_normal(rng: np.random.Generator) -> float:
    """Mean 0, deviation 1: the sum of twelve uniforms less 6. Made of integers, it has the same bits on every machine;
    numpy's own normal numbers take logarithms from libm."""
    return sum(rng.integers(1 << 32, size=12).tolist()) / (1 << 32) - 6.0


class _TurnTakingExpert(_Expert):
    """Replies two chunks after each turn's end (the middle of the window), word by word, and stops when interrupted."""

    DELAY = 2
    WRONG_DELAYS = (-1, 0, 5, 6)
    PAUSE_WORDS = 3  # how far a reply in a pause gets before the user's next sentence stops it

    def __init__(self, user: User, rng: np.random.Generator, corruption: Corruption) -> None:
        self._user = user
        self._rng = rng
        self._corruption = corruption
        self._turns_planned = 0
        self._onsets: dict[int, int] = {}  # chunk in which to begin to speak -> number of words
        self._ignores_interruption = False
        self._said = 0  # words of the running utterance
        self._length = 0  # words that it is to have

    def act(self, k: int) -> Action:
        facts = self._user.facts()
        assert isinstance(facts, TurnTakingFacts)
        if len(facts.turns) > self._turns_planned:  # the user has just begun a turn
            self._turns_planned = len(facts.turns)
            self._plan(facts)
            if facts.turns[-1].interrupts and not self._ignores_interruption:
                # One more word: the barge-in is heard while it is spoken.
                self._length = min(self._said + 1, self._length)
            self._ignores_interruption = self._rng.random() < self._corruption.ignored_interruption
        if self._said == self._length and k in self._onsets:
            self._said, self._length = 0, self._onsets[k]
        if self._said == self._length:
            return LISTEN
        self._said += 1
        return speak(facts.reply[self._said - 1])

    def _plan(self, facts: TurnTakingFacts) -> None:
        """Decides when to speak in and after the turn that has just begun."""
        turn = facts.turns[-1]
        for first, last in turn.pauses:
            if self._rng.random() < self._corruption.pause_reply:
                self._onsets[int(self._rng.integers(first, last + 1))] = self.PAUSE_WORDS
        wrong = self._rng.random() < self._corruption.wrong_delay
        delay = self.WRONG_DELAYS[int(self._rng.integers(len(self.WRONG_DELAYS)))] if wrong else self.DELAY
        self._onsets[turn.end + delay] = len(facts.reply)

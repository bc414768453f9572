"""The rule scorer of lookout: name the place of each shape, once, soon after it appears, and be silent otherwise.

What is due: an *answer* to each shape, in a window that opens when it appears and ends a few chunks later, or when the
next shape appears. Only the first speech in it counts, and nothing but the place's word is right. A shape whose window
is still open when the episode ends is due only if it was answered.

Every other chunk of speech is spurious: an answer too late, a second one, or one to a flicker or a spot. The tight
score has windows of one chunk on each side of the best moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model.program.ranges import Few
from reward.rules.content import says, word_credit
from reward.rules.timing import graded
from reward.score import EventRewards
from rollout.scenarios.family import Family
from rollout.scenarios.lookout import (
    FAMILY,
    PLACES,
    LookoutConfig,
    LookoutExpert,
    LookoutFacts,
    LookoutScenario,
    lookout,
)
from rollout.scenarios.verdict import CONTENT, TIMING, Event, Outcome, Score, assemble
from rollout.turn.action import LISTEN, Action, speak
from rollout.world.base import Script, User


@dataclass(frozen=True)
class LookoutReward(EventRewards):
    """Rewards, and the windows in chunks of 200 ms after the one in which a shape appears."""

    best: Few = LookoutExpert.DELAY  # the answer's best moment
    late: Few = 4  # the last moment of an answer; the first is the shape's first chunk
    tight_chunks: Few = 1  # half-width of the window in the tight score


@dataclass(frozen=True)
class LookoutSettings(LookoutConfig):
    """The family's part of a recipe."""

    reward: LookoutReward = field(default_factory=LookoutReward)


def score_lookout(facts: LookoutFacts, actions: Sequence[Action], settings: LookoutSettings) -> Score:
    """Scores one episode; ``actions`` [chunks]."""
    rule = settings.reward
    loose = _events(facts, actions, rule, 0, rule.late)
    tight = _events(facts, actions, rule, max(0, rule.best - rule.tight_chunks), rule.best + rule.tight_chunks)
    return assemble(loose, tight, facts.chunks, (TIMING, CONTENT))


def _events(facts: LookoutFacts, actions: Sequence[Action], rule: LookoutReward, first: int, last: int) -> list[Event]:
    """The events in order. ``first`` and ``last``: chunks from a shape's appearance to its window's ends."""
    events: list[Event] = []
    width = max(rule.best, rule.late - rule.best)
    upcoming = iter((*facts.shapes, None))
    pending, following = None, next(upcoming)  # the latest shape if it has not been answered, and the next one
    for k, action in enumerate(actions):
        if following is not None and k == following.start:
            if pending is not None:
                events.append(Event(k, "answer", Outcome.MISSED, pending.start + rule.best, {TIMING: rule.miss}))
            pending, following = following, next(upcoming)
        if pending is not None and action.speaks and first <= k - pending.start <= last:
            right, due = says(action, [pending.place]), pending.start + rule.best
            grade = graded(k - due, width, rule.edge)
            rewards = {
                TIMING: rule.hit * grade,
                CONTENT: word_credit(right, rule.right_words * grade, rule.wrong_words),
            }
            events.append(Event(k, "answer", Outcome.HIT if right else Outcome.WRONG, due, rewards))
            pending = None
        elif action.speaks:
            events.append(Event(k, "speech", Outcome.SPURIOUS, rewards={TIMING: rule.spurious}))
        if pending is not None and k == pending.start + last:
            events.append(Event(k, "answer", Outcome.MISSED, pending.start + rule.best, {TIMING: rule.miss}))
            pending = None
    return events


def _repeats_a_place(scenario: LookoutScenario, user: User) -> Script:
    return lambda k: speak("left")


def _says_every_place_in_turn(scenario: LookoutScenario, user: User) -> Script:
    words = list(PLACES)
    return lambda k: speak(words[k % len(words)])


def _at_each(user: User, shapes: bool, distractions: bool, words: Sequence[str]) -> Script:
    """Says the next of ``words`` one chunk after a shape or a distraction has appeared."""
    answers: dict[int, str] = {}
    seen = 0

    def script(k: int) -> Action:
        nonlocal seen
        facts = user.facts()
        assert isinstance(facts, LookoutFacts)
        now = len(facts.shapes) * shapes + len(facts.distractions) * distractions
        if now > seen:
            answers[k + LookoutExpert.DELAY] = words[seen % len(words)]
        seen = now
        return speak(answers[k]) if k in answers else LISTEN

    return script


def _guesses_a_place(scenario: LookoutScenario, user: User) -> Script:
    """Every place in a random order, each at a shape's best moment."""
    rng = np.random.default_rng(scenario.seed)
    return _at_each(user, True, False, [list(PLACES)[i] for i in rng.integers(len(PLACES), size=scenario.chunks)])


def _answers_every_change(scenario: LookoutScenario, user: User) -> Script:
    """The same word whenever anything appears, a flicker or spot too."""
    return _at_each(user, True, True, ["left"])


LOOKOUT = Family(
    name=FAMILY,
    axes=(TIMING, CONTENT),
    settings=LookoutSettings,
    make=lookout,
    facts=LookoutFacts.from_json,
    expert=lambda scenario, user, rng, settings: LookoutExpert(user, rng, settings).act,
    score=score_lookout,
    words=lambda facts: facts.places,
    hacks={
        "repeats a word": _repeats_a_place,
        "every place in turn": _says_every_place_in_turn,
        "guesses a place": _guesses_a_place,
        "answers every change": _answers_every_change,
    },
)

"""The rule scorer of timespeak: repeat the number, give reminders on time, be silent otherwise and after "stop".

What is due:
- the *echo*: the number, once, between the chunk in which the user finishes saying it and a few chunks after the
  request. Only the first word said in that window counts;
- a *reminder* one interval after each hit (the echo's or a reminder's), or after the time at which the echo or reminder
  that was missed or wrong was due. A reminder whose window is still open when the user's "stop" or the episode ends is
  not due, but counts if it was said;
- the *stop*, if the user says it: no speech after a short grace. The user says it only after having heard reminders, so
  a model that is always silent earns nothing by it.

Every other chunk of speech is spurious. The tight score uses windows of one chunk on each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.program.ranges import Few, Probability
from reward.rules.content import says, word_credit
from reward.rules.timing import graded, half_width
from reward.score import EventRewards
from rollout.scenarios.family import Family
from rollout.scenarios.timespeak import (
    FAMILY,
    REMINDER,
    TimespeakConfig,
    TimespeakExpert,
    TimespeakFacts,
    TimespeakScenario,
    timespeak,
)
from rollout.scenarios.verdict import CONTENT, TIMING, Event, Outcome, Score, assemble
from rollout.turn.action import Action, speak
from rollout.world.base import Script, User


@dataclass(frozen=True)
class TimespeakReward(EventRewards):
    """Rewards, and the windows in which things are due, in chunks of 200 ms."""

    tight_chunks: Few = 1  # half-width of every window in the tight score
    echo_delay: Few = 1  # chunks from the request's end to the echo's best moment
    echo_late: Few = 3  # chunks from the request's end to the last moment of an echo; the first is the number's end
    # Half-width of a reminder's window, as a fraction of the interval, and at least 1 chunk.
    tolerance: Probability = 0.2
    stop_grace: Few = 1  # chunks after the stop in which speech is forgiven


@dataclass(frozen=True)
class TimespeakSettings(TimespeakConfig):
    """The family's part of a recipe."""

    reward: TimespeakReward = field(default_factory=TimespeakReward)


def score_timespeak(facts: TimespeakFacts, actions: Sequence[Action], settings: TimespeakSettings) -> Score:
    """Scores one episode; ``actions`` [chunks]."""
    rule = settings.reward
    width = half_width(facts.interval, rule.tolerance)
    best = facts.request_end + rule.echo_delay
    loose = _events(facts, actions, rule, width, (facts.number_end, facts.request_end + rule.echo_late))
    narrow = rule.tight_chunks
    tight = _events(facts, actions, rule, min(width, narrow), (best - narrow, best + narrow))
    return assemble(loose, tight, facts.chunks, (TIMING, CONTENT))


def _events(
    facts: TimespeakFacts, actions: Sequence[Action], rule: TimespeakReward, width: int, echo: tuple[int, int]
) -> list[Event]:
    """The events in order. ``width``: half-width of a reminder's window; ``echo``: (first, last) chunk of the
    echo's."""
    events: list[Event] = []
    best_echo = facts.request_end + rule.echo_delay
    echo_width = max(best_echo - echo[0], echo[1] - best_echo)
    echo_pending = True
    due = best_echo + facts.interval
    for k in range(facts.chunks if facts.stop_end is None else facts.stop_end):
        if actions[k].speaks:
            if echo_pending and echo[0] <= k <= echo[1]:
                event = _attempt(k, "echo", facts.number, best_echo, echo_width, actions[k], rule)
                events.append(event)
                echo_pending = False
                due = (k if event.outcome is Outcome.HIT else best_echo) + facts.interval
            elif abs(k - due) <= width:
                event = _attempt(k, "reminder", facts.reminder, due, width, actions[k], rule)
                events.append(event)
                due = (k if event.outcome is Outcome.HIT else due) + facts.interval
            else:
                events.append(Event(k, "speech", Outcome.SPURIOUS, rewards={TIMING: rule.spurious}))
        if echo_pending and k == echo[1]:
            events.append(Event(k, "echo", Outcome.MISSED, best_echo, {TIMING: rule.miss}))
            echo_pending = False
        if k == due + width:
            events.append(Event(k, "reminder", Outcome.MISSED, due, {TIMING: rule.miss}))
            due += facts.interval
    if facts.stop_end is not None:
        events.extend(_after_stop(facts.stop_end, actions, rule))
    return events


def _attempt(k: int, kind: str, word: str, due: int, width: int, action: Action, rule: TimespeakReward) -> Event:
    """Speech inside a window. Its timing is graded whatever the words are.

    Right words earn `right_words` times the timing's grade, not full credit anywhere in the window: as reward-to-go is
    discounted, equal credit would make early speech the best."""
    right = says(action, [word])
    grade = graded(k - due, width, rule.edge)
    return Event(
        chunk=k,
        kind=kind,
        outcome=Outcome.HIT if right else Outcome.WRONG,
        due=due,
        rewards={
            TIMING: rule.hit * grade,
            CONTENT: word_credit(right, rule.right_words * grade, rule.wrong_words),
        },
    )


def _after_stop(stop_end: int, actions: Sequence[Action], rule: TimespeakReward) -> list[Event]:
    """The first chunk of speech after the grace is a missed stop, further ones are spurious; silence is a hit.

    The hit earns no reward: the advantage over rollouts that missed the stop is enough, and a reward in the last chunk
    would be discounted away."""
    late = [k for k in range(stop_end + rule.stop_grace + 1, len(actions)) if actions[k].speaks]
    if not late:
        return [Event(len(actions) - 1, "stop", Outcome.HIT, stop_end)]
    broken = Event(late[0], "stop", Outcome.MISSED, stop_end, {TIMING: rule.miss})
    return [broken, *(Event(k, "speech", Outcome.SPURIOUS, rewards={TIMING: rule.spurious}) for k in late[1:])]


def _repeats_the_reminder(scenario: TimespeakScenario, user: User) -> Script:
    return lambda k: speak(REMINDER)


TIMESPEAK = Family(
    name=FAMILY,
    axes=(TIMING, CONTENT),
    settings=TimespeakSettings,
    make=timespeak,
    facts=TimespeakFacts.from_json,
    expert=lambda scenario, user, rng, settings: TimespeakExpert(scenario, user, rng, settings).act,
    score=score_timespeak,
    words=lambda facts: (facts.number, *[facts.reminder] * 5),
    hacks={"repeats a word": _repeats_the_reminder},
)

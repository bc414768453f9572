"""The rule scorer of timespeak: number said back, reminders on time, silence elsewhere and after the stop.

What is due:
- the *echo*: the number, once, from the chunk in which the number ended until a few chunks after the request; the first
  word said in that window decides;
- a *reminder* an interval after each hit, the echo included; after a miss, or a wrong word, an interval after the
  moment it was due. One that could still have been said when the stop ended, or when the episode ended, is not due,
  but counts if it was said;
- the *stop*, if the user said it: no speech later than a short grace after it. The user says it only after
  reminders that it heard, so silence throughout earns nothing here.

Every other chunk of speech is spurious. In the tight score every window is one chunk wide on each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """Windows in chunks around the moment something is due. Right words earn `right_words` times the timing's grade."""

    tight_chunks: int = 1  # half-width of every window in the tight score
    echo_delay: int = 1  # chunks from the request's end to the echo's best moment
    echo_late: int = 3  # chunks from the request's end to the last moment of an echo; the first is the number's end
    tolerance: float = 0.2  # half-width of a reminder's window, as a fraction of the interval, and at least 1 chunk
    stop_grace: int = 1  # chunks after the stop in which speech is forgiven


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
    """Walks through the episode once. ``width``: half the reminder's window; ``echo``: first and last chunk of the
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
    """Speech inside a window: its timing is graded whatever was said, its words are judged beside it.

    Right words are worth as much as their timing: full credit anywhere in the window would pay for haste, since a
    discounted reward-to-go prefers the same reward sooner."""
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
    """The first speech after the grace breaks the stop, further chunks are spurious; silence to the end respects it.

    Respecting it earns no reward of its own: the advantage over rollouts that broke it is enough, and a reward in
    the last chunk would be discounted away."""
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

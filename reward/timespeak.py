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

from reward.content import says, word_credit
from reward.score import Event, Outcome, RewardConfig, Score, assemble
from reward.timing import graded, half_width
from rollout.chunk import Action
from rollout.scenarios.timespeak import TimespeakFacts


def score_timespeak(facts: TimespeakFacts, actions: Sequence[Action], config: RewardConfig) -> Score:
    """Scores one episode; ``actions`` [chunks]."""
    rule = config.timespeak
    width = half_width(facts.interval, rule.tolerance)
    best = facts.request_end + rule.echo_delay
    loose = _events(facts, actions, config, width, (facts.number_end, facts.request_end + rule.echo_late))
    narrow = config.tight_chunks
    tight = _events(facts, actions, config, min(width, narrow), (best - narrow, best + narrow))
    return assemble(loose, tight, facts.chunks)


def _events(
    facts: TimespeakFacts, actions: Sequence[Action], config: RewardConfig, width: int, echo: tuple[int, int]
) -> list[Event]:
    """Walks through the episode once. ``width``: half the reminder's window; ``echo``: first and last chunk of the
    echo's."""
    events: list[Event] = []
    best_echo = facts.request_end + config.timespeak.echo_delay
    echo_width = max(best_echo - echo[0], echo[1] - best_echo)
    echo_pending = True
    due = best_echo + facts.interval
    for k in range(facts.chunks if facts.stop_end is None else facts.stop_end):
        if actions[k].speaks:
            if echo_pending and echo[0] <= k <= echo[1]:
                event = _attempt(k, "echo", facts.number, best_echo, echo_width, actions[k], config)
                events.append(event)
                echo_pending = False
                due = (k if event.outcome is Outcome.HIT else best_echo) + facts.interval
            elif abs(k - due) <= width:
                event = _attempt(k, "reminder", facts.reminder, due, width, actions[k], config)
                events.append(event)
                due = (k if event.outcome is Outcome.HIT else due) + facts.interval
            else:
                events.append(Event(k, "speech", Outcome.SPURIOUS, timing=config.spurious))
        if echo_pending and k == echo[1]:
            events.append(Event(k, "echo", Outcome.MISSED, best_echo, config.miss))
            echo_pending = False
        if k == due + width:
            events.append(Event(k, "reminder", Outcome.MISSED, due, config.miss))
            due += facts.interval
    if facts.stop_end is not None:
        events.extend(_after_stop(facts.stop_end, actions, config))
    return events


def _attempt(k: int, kind: str, word: str, due: int, width: int, action: Action, config: RewardConfig) -> Event:
    """Speech inside a window: its timing is graded whatever was said, its words are judged beside it.

    Right words are worth as much as their timing: full credit anywhere in the window would pay for haste, since a
    discounted reward-to-go prefers the same reward sooner."""
    right = says(action, [word])
    grade = graded(k - due, width, config.edge)
    return Event(
        chunk=k,
        kind=kind,
        outcome=Outcome.HIT if right else Outcome.WRONG,
        due=due,
        timing=config.hit * grade,
        content=word_credit(right, config.right_words * grade, config.wrong_words),
    )


def _after_stop(stop_end: int, actions: Sequence[Action], config: RewardConfig) -> list[Event]:
    """The first speech after the grace breaks the stop, further chunks are spurious; silence to the end respects it.

    Respecting it earns no reward of its own: the advantage over rollouts that broke it is enough, and a reward in
    the last chunk would be discounted away."""
    late = [k for k in range(stop_end + config.timespeak.stop_grace + 1, len(actions)) if actions[k].speaks]
    if not late:
        return [Event(len(actions) - 1, "stop", Outcome.HIT, stop_end)]
    broken = Event(late[0], "stop", Outcome.MISSED, stop_end, config.miss)
    return [broken, *(Event(k, "speech", Outcome.SPURIOUS, timing=config.spurious) for k in late[1:])]

"""An episode drawn as text, for people: one column a chunk, the user above the model, then the scorer's events.

    chunk  0         1         2
           012345678901234567890
    user   ..ffffNfff...........
    model  ..........F....B.....

The user's letters: ``f`` the request, ``N`` chunk in which the number ends, ``s`` stop, ``#`` a turn, ``-`` a pause
inside it, ``!`` a turn that interrupts. The model's: the first letter of what it said, ``.`` for silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reward.score import Event, Outcome, Score
from rollout.chunk import Action
from rollout.scenarios.registry import facts_from_json
from rollout.scenarios.timespeak import TimespeakFacts
from rollout.scenarios.turn_taking import TurnTakingFacts


def timeline(facts: Mapping[str, Any], actions: Sequence[Action], score: Score) -> str:
    """The drawing of one episode; ``facts`` as stored with it, ``actions`` [chunks]."""
    read = facts_from_json(facts)
    chunks = range(read.chunks)
    if isinstance(read, TimespeakFacts):
        title = f'timespeak: "{read.number}", {read.reminder!r} every {read.interval} chunks'
        user = _timespeak_user(read)
    else:
        title = f"turn_taking: {len(read.turns)} turns, {sum(turn.interrupts for turn in read.turns)} interruptions"
        user = _turn_taking_user(read)
    lines = [
        title,
        "chunk  " + "".join(str(k // 10) if k % 10 == 0 else " " for k in chunks),
        "       " + "".join(str(k % 10) for k in chunks),
        "user   " + user,
        "model  " + "".join(action.words[0][0].upper() if action.words else "." for action in actions),
        f"score  {score.value:.2f} (tight {score.tight:.2f}): {score.correct} right of {score.due} due, "
        f"{score.spurious} spurious; reward {score.timing.sum():+.2f} timing, {score.content.sum():+.2f} content",
    ]
    told = sorted((event for event in score.events if event.outcome is not Outcome.SHAPING), key=lambda e: e.chunk)
    return "\n".join([*lines, *(_event_line(event, actions) for event in told)])


def _event_line(event: Event, actions: Sequence[Action]) -> str:
    words = " ".join(actions[event.chunk].words)
    said = f' "{words}"' if words else ""
    due = "" if event.due is None else f", due {event.due}"
    rewards = f"{event.timing:+.2f} timing {event.content:+.2f} content"
    return f"  {event.chunk:3d}  {event.kind:9s}{event.outcome.value:9s}{rewards}{due}{said}"


def _timespeak_user(facts: TimespeakFacts) -> str:
    row = ["."] * facts.chunks
    row[facts.request_start : facts.request_end + 1] = "f" * (facts.request_end + 1 - facts.request_start)
    row[facts.number_end] = "N"
    if facts.stop_start is not None and facts.stop_end is not None:
        row[facts.stop_start : facts.stop_end + 1] = "s" * (facts.stop_end + 1 - facts.stop_start)
    return "".join(row)


def _turn_taking_user(facts: TurnTakingFacts) -> str:
    row = ["."] * facts.chunks
    for turn in facts.turns:
        row[turn.start : turn.end + 1] = ("!" if turn.interrupts else "#") * (turn.end + 1 - turn.start)
        for first, last in turn.pauses:
            row[first : last + 1] = "-" * (last + 1 - first)
    return "".join(row)

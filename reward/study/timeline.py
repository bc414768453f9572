"""An episode drawn as text, for people: one column a chunk, the user above the model, then the scorer's events.

    chunk  0         1         2
           012345678901234567890
    user   ..ffffNfff...........
    model  ..........F....B.....

The user's letters are those of its family's `Span`s. The model's: the first letter of what it said, ``.`` for silence.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout.scenarios.verdict import Event, Outcome, Score
from rollout.turn.action import Action
from rollout.world.base import Facts


def timeline(facts: Facts, actions: Sequence[Action], score: Score) -> str:
    """The text for one episode; ``actions`` [chunks]. Events that do not count in the score are left out."""
    chunks = range(facts.chunks)
    user = ["."] * facts.chunks
    for span in facts.spans():
        user[span.first : span.last + 1] = span.letters
    rewards = ", ".join(f"{values.sum():+.2f} {axis}" for axis, values in score.rewards.items())
    lines = [
        facts.title(),
        "chunk  " + "".join(str(k // 10) if k % 10 == 0 else " " for k in chunks),
        "       " + "".join(str(k % 10) for k in chunks),
        "user   " + "".join(user),
        "model  " + "".join(action.words[0][0].upper() if action.words else "." for action in actions),
        f"score  {score.value:.2f} (tight {score.tight:.2f}): {score.correct} right of {score.due} due, "
        f"{score.spurious} spurious; reward {rewards}",
    ]
    counted = sorted((event for event in score.events if event.outcome is not Outcome.SHAPING), key=lambda e: e.chunk)
    return "\n".join([*lines, *(_event_line(event, actions, tuple(score.rewards)) for event in counted)])


def _event_line(event: Event, actions: Sequence[Action], axes: Sequence[str]) -> str:
    words = " ".join(actions[event.chunk].words)
    said = f' "{words}"' if words else ""
    due = "" if event.due is None else f", due {event.due}"
    rewards = " ".join(f"{event.rewards.get(axis, 0.0):+.2f} {axis}" for axis in axes)
    return f"  {event.chunk:3d}  {event.kind:9s}{event.outcome.value:9s}{rewards}{due}{said}"

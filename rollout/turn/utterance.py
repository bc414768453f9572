"""What is heard of a model's speech: utterances, from actions.

All times are of the sound and not of the words' tokens: a word whose sound is silence is not heard. A model without a
voice has actions without sound; what it says is heard in the chunk in which it says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.voice.level import loudness_db
from rollout.turn.action import Action


@dataclass(frozen=True)
class Utterance:
    """What is heard of the chunks from one that says words, or begins to make sound, to the next such one."""

    words: tuple[str, ...]
    start: int  # the first chunk that is heard
    end: int  # the chunk after the last one


def audible(action: Action, audible_db: float) -> bool:
    """Whether something is heard in a chunk: speech whose sound is at least as loud as ``audible_db`` of full scale."""
    return action.speaks and (action.sound is None or loudness_db(action.sound) >= audible_db)


def heard(actions: Sequence[Action], audible_db: float) -> list[Utterance]:
    """The utterances of which something is heard, in order; ``actions`` [chunks]."""
    found: list[Utterance] = []
    words: tuple[str, ...] | None = None  # of the utterance that runs, None in silence
    start: int | None = None  # its first chunk that was heard
    for k, action in enumerate(actions):
        if not action.speaks:
            words = start = None
            continue
        if words is None or action.words:
            words, start = action.words, None
        if audible(action, audible_db):
            if start is None:
                start = k
                found.append(Utterance(words, k, k + 1))
            found[-1] = Utterance(words, start, k + 1)
    return found

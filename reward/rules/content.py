"""Rules for what was said, by exact comparison of words; synonyms and meaning do not count.

They know nothing of time. Scorers apply them only to words said inside a window, so that right words at the wrong time
earn nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout.turn.action import Action


def says(action: Action, words: Sequence[str]) -> bool:
    """Whether a chunk says exactly these words."""
    return action.speaks and action.words == tuple(words)


def word_credit(right: bool, plus: float, minus: float) -> float:
    """``plus`` for right words, ``minus`` for wrong ones."""
    return plus if right else minus


def right_places(said: Sequence[str], expected: Sequence[str]) -> int:
    """How many words equal the expected word at the same index; the longer list's rest is ignored."""
    return sum(a == b for a, b in zip(said, expected, strict=False))

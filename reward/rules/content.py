"""Rules for what was said. They compare words exactly: nothing here listens to meaning.

Whether the words came at the right time is not decided here, but no scorer asks these rules about words that came
at the wrong time: right words earn nothing there.
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
    """How many words are the expected ones, each compared at its own place."""
    return sum(a == b for a, b in zip(said, expected, strict=False))

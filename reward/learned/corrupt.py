"""Controlled corruptions of an expert's play: one fault of a known kind and size.

Knows actions and loudness only, no family: whatever a family's expert does can be said too early, too late, not at all,
again, over the user, cut short or in other words. A corruption is a set of edits for
`rollout.scenarios.demonstrate.enact`, which plays them against the user, so that what the user says fits what it
heard. Whether the result really is worse, and by how much, is for the family's rule to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels import exact
from reward.rules.timing import Run, runs
from rollout.scenarios.verdict import CONTENT, TIMING
from rollout.turn.action import CHUNK_MS, LISTEN, Action, speak

SPEECH_RMS_RATIO = 3.0
"""The user is taken to speak in a chunk whose RMS is more than this times the RMS at the lowest decile of chunks."""


@dataclass(frozen=True)
class Fault:
    """What to change in a play. Example: ``Fault("shift", -400, {9: speak("four"), 10: LISTEN, 11: LISTEN})``."""

    kind: str
    size_ms: int  # how far it was shifted (negative: too early), or how much was cut, replaced or added
    edits: dict[int, Action]  # by chunk, without gaps


@dataclass(frozen=True, eq=False)
class Expert:
    """A faultless play, and what a corruption needs to know beside it."""

    actions: tuple[Action, ...]  # [chunks]
    user_speaks: NDArray[np.bool_]  # [chunks]
    words: tuple[str, ...]  # words that ``swap`` and ``talk_over`` may say

    @staticmethod
    def of(audio: NDArray[np.float32], actions: Sequence[Action], words: Sequence[str]) -> Expert:
        """``audio`` float32 [chunks, samples]."""
        level = np.sqrt(exact.total(np.square(audio, dtype=np.float64)) / audio.shape[1])
        return Expert(tuple(actions), level > SPEECH_RMS_RATIO * np.quantile(level, 0.1), tuple(words))

    def silent(self, first: int, end: int) -> bool:
        """Whether the chunks first … end - 1 exist and nothing is said in them."""
        return first >= 0 and end <= len(self.actions) and not any(a.speaks for a in self.actions[first:end])

    def other(self, word: str, rng: np.random.Generator) -> str:
        """Another one of ``words``, drawn at random."""
        others = [w for w in self.words if w != word]
        return others[int(rng.integers(len(others)))]


Corrupt = Callable[[Expert, Run, int, np.random.Generator], dict[int, Action] | None]
"""(play, an utterance in it, size in chunks, random generator) -> edits by chunk; None where the fault does not fit."""


def shift(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """The utterance begins n chunks later (n < 0: earlier), into silence."""
    fits = expert.silent(run.end, run.end + n) if n > 0 else expert.silent(run.start + n, run.start)
    if not fits:
        return None
    edits = dict.fromkeys(range(min(run.start, run.start + n), max(run.end, run.end + n)), LISTEN)
    return edits | {k + n: expert.actions[k] for k in range(run.start, run.end)}


def truncate(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """The last n chunks of the utterance are not said."""
    return dict.fromkeys(range(run.end - n, run.end), LISTEN) if n < run.chunks else None


def omit(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """Nothing is said in the n chunks from the utterance's start on; an utterance under way at their end is dropped."""
    return dict.fromkeys(range(run.start, min(run.start + n, len(expert.actions))), LISTEN)


def repeat(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """The utterance is said again, over and over, for n chunks."""
    said = [expert.actions[k] for k in range(run.start, run.end)]
    return {run.end + i: said[i % len(said)] for i in range(n) if run.end + i < len(expert.actions)} or None


def swap(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """n chunks of the utterance (all of a shorter one), anywhere in it, hold other words."""
    n = min(n, run.chunks)
    first = run.start + int(rng.integers(run.chunks - n + 1))
    return {
        k: speak(*(expert.other(word, rng) for word in expert.actions[k].words)) if first <= k < first + n
        else expert.actions[k]
        for k in range(run.start, run.end)
    }  # fmt: skip


def talk_over(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """Words in n chunks, from a random chunk on in which the user speaks and the expert is silent."""
    moments = [k for k, a in enumerate(expert.actions) if expert.user_speaks[k] and not a.speaks]
    if not moments:
        return None
    first = moments[int(rng.integers(len(moments)))]
    one_word = rng.random() < 0.5
    words = [expert.words[int(i)] for i in rng.integers(len(expert.words), size=n)]
    return {first + i: speak(words[0 if one_word else i]) for i in range(n) if first + i < len(expert.actions)}


FAULTS: dict[str, Corrupt] = {
    f.__name__: f for f in (shift, truncate, omit, repeat, swap, talk_over)
}  # fmt: skip
FAULTS_OF = {TIMING: ("shift", "truncate", "omit", "repeat", "talk_over"), CONTENT: ("swap",)}
"""Axis of reward -> the faults that change it. For axes that only some families have there are no faults: their pairs
come from rollouts and from experts' mistakes."""


def corrupt(expert: Expert, kind: str, n: int, rng: np.random.Generator) -> Fault | None:
    """A fault of n chunks at an utterance drawn at random; None where the play has no utterance or the fault does not
    fit the drawn one. ``kind``: a key of `FAULTS`; "shift" goes either way with probability 1/2."""
    utterances = runs(expert.actions)
    if not utterances:
        return None
    run = utterances[int(rng.integers(len(utterances)))]
    if kind == "shift":
        n *= 1 if rng.random() < 0.5 else -1
    edits = FAULTS[kind](expert, run, n, rng)
    if edits is None:
        return None
    size = sum(a != expert.actions[k] for k, a in edits.items()) if kind == "swap" else n
    return Fault(kind, size * CHUNK_MS, edits)

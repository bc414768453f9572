"""Controlled corruptions of an expert's play: one fault of a known kind and size.

Knows actions and loudness only, no family: whatever a family's expert does can be said too early, too late, not at all,
again, over the user, cut short or in other words. A corruption is a set of edits for
`rollout.scenarios.demonstrate.enact`, which plays them against the user, so that what the user says fits what it
heard. Whether the result really is worse, and by how much, is for the family's rule to say.

A fault's size is counted in what it changed, not in what was asked for: the number of chunks in which the edits give
another action than the expert's, what `enact` mutes of an utterance under way at their end included; for ``shift`` the
distance, and what would push part of the play out is no shift. What the user and the expert then do differently in
answer to the edits is not counted. `draw` keeps faults of wanted sizes only, so that two lists of sizes without a
common one give faults without a common size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from kernels import exact
from reward.rules.timing import Run, runs
from rollout.scenarios.verdict import CONTENT, TIMING
from rollout.turn.action import CHUNK_MS, LISTEN, Action, speak

SPEECH_RMS_RATIO = 3.0
"""The user is taken to speak in a chunk whose RMS is more than this times the RMS at the lowest decile of chunks."""
TRIES = 8
"""How often `draw` draws a size and an utterance, before it gives up."""


@dataclass(frozen=True)
class Fault:
    """What to change in a play. Example: ``Fault("shift", -400, {9: speak("four"), 10: LISTEN, 11: LISTEN})``."""

    kind: str
    size_ms: int  # how far it was shifted (negative: too early), or how many chunks have another action, times 200 ms
    edits: dict[int, Action]  # by chunk, without gaps; after them the expert does not speak


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
"""(play, an utterance in it, wanted size in chunks, random generator) -> edits by chunk; None where the fault does not
fit."""


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
    if run.end + n > len(expert.actions):
        return None
    said = [expert.actions[k] for k in range(run.start, run.end)]
    return {run.end + i: said[i % len(said)] for i in range(n)}


def swap(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """n chunks of speech in a row hold other words: anywhere in the utterance, or from its start on and in the
    utterances after it."""
    spoken = [k for k in range(run.start, len(expert.actions)) if expert.actions[k].speaks]
    first = int(rng.integers(run.chunks - n + 1)) if n <= run.chunks else 0
    swapped = spoken[first : first + n]
    if len(swapped) < n or len(set(expert.words)) < 2:
        return None
    end = next((k for k in range(swapped[-1], len(expert.actions)) if not expert.actions[k].speaks), None)
    return {
        k: speak(*(expert.other(word, rng) for word in action.words)) if k in swapped else action
        for k, action in list(enumerate(expert.actions))[run.start : end]
    }


def talk_over(expert: Expert, run: Run, n: int, rng: np.random.Generator) -> dict[int, Action] | None:
    """Words in n chunks, from a random chunk on in which the user speaks and the expert is silent."""
    end = len(expert.actions) - n + 1
    moments = [k for k, a in enumerate(expert.actions[: max(end, 0)]) if expert.user_speaks[k] and not a.speaks]
    if not moments:
        return None
    first = moments[int(rng.integers(len(moments)))]
    one_word = rng.random() < 0.5
    words = [expert.words[int(i)] for i in rng.integers(len(expert.words), size=n)]
    return {first + i: speak(words[0 if one_word else i]) for i in range(n)}


FAULTS: dict[str, Corrupt] = {
    f.__name__: f for f in (shift, truncate, omit, repeat, swap, talk_over)
}  # fmt: skip
FAULTS_OF = {TIMING: ("shift", "truncate", "omit", "repeat", "talk_over"), CONTENT: ("swap",)}
"""Axis of reward -> the faults that change it. For axes that only some families have there are no faults: their pairs
come from rollouts and from experts' mistakes."""


def draw(expert: Expert, kind: str, sizes: Sequence[int], rng: np.random.Generator) -> Fault | None:
    """A fault whose counted size is one of ``sizes`` (chunks); None when none of `TRIES` drawn ones fits the play.
    ``kind``: as in `corrupt`."""
    for _ in range(TRIES):
        fault = corrupt(expert, kind, int(sizes[int(rng.integers(len(sizes)))]), rng)
        if fault is not None and abs(fault.size_ms) // CHUNK_MS in sizes:
            return fault
    return None


def corrupt(expert: Expert, kind: str, n: int, rng: np.random.Generator) -> Fault | None:
    """A fault for which n chunks are asked, at an utterance drawn at random; None where the play has no utterance or
    the fault does not fit the drawn one, or changes nothing. ``kind``: a key of `FAULTS`; "shift" goes either way with
    probability 1/2."""
    utterances = runs(expert.actions)
    if not utterances:
        return None
    run = utterances[int(rng.integers(len(utterances)))]
    if kind == "shift":
        n *= 1 if rng.random() < 0.5 else -1
    edits = FAULTS[kind](expert, run, n, rng)
    if edits is None:
        return None
    muted = list(takewhile(lambda k: expert.actions[k].speaks, range(max(edits) + 1, len(expert.actions))))
    edits |= dict.fromkeys(muted, LISTEN)  # as `enact` will: nothing of the expert's begins in the middle
    changed = sum(action != expert.actions[k] for k, action in edits.items())
    if not changed or (kind == "shift" and muted):
        return None
    return Fault(kind, (n if kind == "shift" else changed) * CHUNK_MS, edits)

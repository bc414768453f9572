"""The rule scorer of repeat: say the user's word after them, whole, in time, as loud as the noise asks for.

All times are of what is *heard* (`rollout.turn.utterance`): an utterance begins with its first chunk that is loud
enough, whenever its word was chosen, and one of silence does not exist. What is due, for each word of the user's:
- the *answer*: the same word, its sound beginning in a window of a few chunks after the user's has ended. It is a hit
  only if it sounds right, too: whole, at the right level, and near the sound that the lexicon has of the word. Without
  a voice the word is enough;
- the *stop*, where the user begins to speak while an utterance is heard: silence at most two chunks later.

An utterance anywhere else is spurious, and so is what is heard of an answer after its last chunk. What the end of the
episode cuts off is due only where it was begun. Each chunk of a right answer earns a reward of its own on axis voice:
for its level, and, as an anchor that keeps it intelligible, for being near the lexicon's chunk at its level. Chunks are
counted from the first that is heard: a word so soft that its first chunk is not (of 8 of the 30 words, at -48 dB) is
compared with the wrong ones, and earns as little as it should.

The tight score has a window of one chunk on each side of the best moment, and half the tolerance of level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import fsum
from typing import Annotated

import numpy as np
from torch import Tensor

from kernels import exact
from model.program.ranges import Few, Range
from model.voice.config import NUMBERS
from model.voice.level import louder, loudness_db
from reward.rules.content import word_credit
from reward.rules.timing import graded
from reward.score import EventRewards, Reward
from rollout.scenarios.family import Family
from rollout.scenarios.repeat import (
    FAMILY,
    Prompt,
    RepeatConfig,
    RepeatExpert,
    RepeatFacts,
    RepeatScenario,
    repeat,
    said,
    sound_of,
)
from rollout.scenarios.verdict import CONTENT, TIMING, Event, Outcome, Score, assemble
from rollout.turn.action import LISTEN, Action
from rollout.turn.utterance import Utterance, heard
from rollout.world.base import Script, User
from rollout.world.lexicon import lexicon

VOICE = "voice"
"""The axis of how a word sounds: its level, and its distance from the lexicon's sound."""

Tolerance = Annotated[float, Range(0.1, 100.0)]


@dataclass(frozen=True)
class RepeatReward(EventRewards):
    """Rewards, and windows in chunks of 200 ms after the user's last chunk, or the first of an interruption."""

    trailing: Reward = -0.6  # each further chunk that is heard where nothing is due
    cut: Reward = -3.0  # ending a word too early: the share of it that is missing
    best: Few = RepeatExpert.DELAY  # the answer's best moment
    late: Few = 4  # the last moment of an answer; the first is the user's last chunk
    tight_chunks: Few = 1  # half-width of the window in the tight score
    stop: Few = 2  # last chunk, after an interruption's first, in which silence may begin
    prompt_stop: Few = RepeatExpert.STOP  # the last one that earns the full reward and is in the tight window
    level: Reward = 1.5  # of a whole word at the right level; a chunk has its share. As far below 0 at the worst
    level_db: Tolerance = 8.0  # error of a chunk's level at which this is 0; it is the negative at twice the error
    anchor: Reward = 1.5  # of a whole word exactly as in the lexicon; a chunk has its share
    distance: Tolerance = 0.6  # mean squared error of a chunk's numbers at which this is 0
    right_level_db: Tolerance = 4.0  # largest mean error of level of a sound that is a hit
    right_distance: Tolerance = 0.5  # its largest mean squared error


@dataclass(frozen=True)
class RepeatSettings(RepeatConfig):
    """The family's part of a recipe."""

    reward: RepeatReward = field(default_factory=RepeatReward)


def score_repeat(facts: RepeatFacts, actions: Sequence[Action], settings: RepeatSettings) -> Score:
    """Scores one episode; ``actions`` [chunks]."""
    rule = settings.reward
    spoken = heard(actions, settings.audible_db)
    errors: dict[tuple[str, int, int], tuple[float, float]] = {}
    loose = _Judge(facts, actions, settings, spoken, errors, (0, rule.late), rule.stop, rule.right_level_db)
    best = max(0, rule.best - rule.tight_chunks), rule.best + rule.tight_chunks
    tight = _Judge(facts, actions, settings, spoken, errors, best, rule.prompt_stop, rule.right_level_db / 2.0)
    return assemble(loose.events(), tight.events(), facts.chunks, (TIMING, CONTENT, VOICE))


@dataclass(frozen=True)
class _Sound:
    """The verdict on an answer's sound; right where there is none."""

    events: tuple[Event, ...]
    right: bool


@dataclass(frozen=True)
class _Judge:
    """One episode and the windows by which it is judged."""

    facts: RepeatFacts
    actions: Sequence[Action]  # [chunks]
    settings: RepeatSettings
    spoken: Sequence[Utterance]
    errors: dict[tuple[str, int, int], tuple[float, float]]  # what `compare` has found: word, its chunk, the episode's
    window: tuple[int, int]  # first and last chunk of an answer's onset, after the user's last
    last_stop: int  # last chunk in which silence may begin, after an interruption's first
    right_level_db: float

    def events(self) -> list[Event]:
        """All, in the order of the words, then what was not an answer."""
        events: list[Event] = []
        answers: set[Utterance] = set()
        for prompt, following in zip(self.facts.prompts, (*self.facts.prompts[1:], None), strict=True):
            first, last = (prompt.end + chunks for chunks in self.window)
            if following is not None:
                last = min(last, following.start - 1)
            answer = next((u for u in self.spoken if first <= u.start <= last), None)
            due = prompt.end + self.settings.reward.best
            if answer is not None:
                answers.add(answer)
                events += self._answer(answer, prompt, due)
            elif last < self.facts.chunks:
                events.append(Event(last, "answer", Outcome.MISSED, due, {TIMING: self.settings.reward.miss}))
        for utterance in self.spoken:
            events += self._after(utterance, utterance in answers)
        return events

    def _answer(self, answer: Utterance, prompt: Prompt, due: int) -> list[Event]:
        rule = self.settings.reward
        right, sound = answer.words == (prompt.word,), _Sound((), True)
        if right:
            sound = self._sound(answer, prompt.word)
        grade = graded(answer.start - due, max(rule.best, rule.late - rule.best), rule.edge)
        rewards = {
            TIMING: rule.hit * grade,
            CONTENT: word_credit(right, rule.right_words * grade, rule.wrong_words),
        }
        outcome = Outcome.HIT if right and sound.right else Outcome.WRONG
        return [Event(answer.start, "answer", outcome, due, rewards), *sound.events]

    def _sound(self, answer: Utterance, word: str) -> _Sound:
        """Judges how a right word sounds, chunk by chunk until the user interrupts, and whether it is whole."""
        rule, audible_db = self.settings.reward, self.settings.audible_db
        (due, least), interruption = _due(word, self.facts.target_db, audible_db), self._interruption(answer)
        judged = min(answer.end, answer.start + len(due))
        if interruption is not None:
            judged = min(judged, interruption + 1)
        events: list[Event] = []
        errors: list[tuple[float, float]] = []
        for i, k in enumerate(range(answer.start, judged)):
            sound = self.actions[k].sound
            if sound is None:
                return _Sound((), True)
            if (word, i, k) not in self.errors:
                self.errors[word, i, k] = compare(sound, due[i], audible_db)
            level, distance = self.errors[word, i, k]
            errors.append((level, distance))
            credit = rule.level * _falling(level / rule.level_db) + rule.anchor * _falling(distance / rule.distance)
            events.append(Event(k, "sound", Outcome.SHAPING, rewards={VOICE: credit / len(due)}))
        level, distance = (fsum(values) / len(errors) for values in zip(*errors, strict=True))
        missing = answer.start + least - answer.end
        if missing <= 0 or answer.end == self.facts.chunks or interruption is not None:
            missing = 0
        else:
            events.append(Event(answer.end, "end", Outcome.SHAPING, rewards={TIMING: rule.cut * missing / least}))
        return _Sound(tuple(events), level <= self.right_level_db and distance <= rule.right_distance and not missing)

    def _interruption(self, utterance: Utterance) -> int | None:
        """The chunk in which the user began to speak while it was heard, or right after it was."""
        starts = (prompt.start for prompt in self.facts.prompts)
        return next((start for start in starts if utterance.start < start <= utterance.end), None)

    def _after(self, utterance: Utterance, due: bool) -> list[Event]:
        """Stops, and what is heard that should not be. ``due``: whether it is an answer."""
        rule, interruption = self.settings.reward, self._interruption(utterance)
        whole = _chunks_of(utterance.words) if due else 0
        over = range(utterance.start + whole, utterance.end)  # what should not be heard
        events: list[Event] = []
        if interruption is not None:
            over = range(over.start, min(over.stop, interruption))
            events += self._stop(utterance, interruption, due)
        for i, k in enumerate(over):
            outcome, reward = (Outcome.SHAPING, rule.trailing) if i else (Outcome.SPURIOUS, rule.spurious)
            events.append(Event(k, "speech", outcome, rewards={TIMING: reward}))
        return events

    def _stop(self, utterance: Utterance, interruption: int, due: bool) -> list[Event]:
        """Ending what should not have begun earns nothing."""
        rule, best = self.settings.reward, self.settings.reward.prompt_stop
        if utterance.end - interruption <= self.last_stop:
            if not due:
                return []
            late = max(0, utterance.end - interruption - best)
            credit = rule.hit * graded(late, max(0, rule.stop - best), rule.edge)
            judged = min(utterance.end, self.facts.chunks - 1)
            return [Event(judged, "stop", Outcome.HIT, interruption + best, {TIMING: credit})]
        missed = interruption + self.last_stop
        over = range(missed + 1, utterance.end)
        return [
            Event(missed, "stop", Outcome.MISSED, interruption + best, {TIMING: rule.miss}),
            *(Event(k, "speech", Outcome.SHAPING, rewards={TIMING: rule.trailing}) for k in over),
        ]


def compare(sound: Tensor, due: Tensor, audible_db: float) -> tuple[float, float]:
    """(error of level in dB, mean squared error of the numbers at the level of ``sound``) of a chunk of sound, fp32
    [FRAMES, BANDS], where the chunk ``due`` is right. Levels that are too soft to be heard count as ``audible_db``; if
    only one of the two is heard, the distance is `NOTHING_IN_COMMON`."""
    level, right = float(loudness_db(sound)), float(loudness_db(due))
    error = abs(max(level, audible_db) - max(right, audible_db))
    if (level < audible_db) != (right < audible_db):
        return error, NOTHING_IN_COMMON
    same = louder(due, level - right)
    numbers = (sound.numpy().astype(np.float64) - same.numpy().astype(np.float64)).reshape(NUMBERS)
    return error, float(exact.total(numbers * numbers)) / NUMBERS


NOTHING_IN_COMMON = 4.0
"""Distance of sound and silence. That of two independent draws of numbers of variance 1 is 2."""


def _falling(error: float) -> float:
    """1 without an error, 0 at 1, -1 at 2 and beyond."""
    return max(-1.0, 1.0 - error)


@lru_cache(maxsize=512)
def _due(word: str, level: float, audible_db: float) -> tuple[tuple[Tensor, ...], int]:
    """(the sound of a word at a level, how many of its chunks must be heard: its last ones may be too soft)."""
    sound = sound_of(word, level)
    return sound, max(i + 1 for i, chunk in enumerate(sound) if i == 0 or float(loudness_db(chunk)) >= audible_db)


def _chunks_of(words: tuple[str, ...]) -> int:
    """How long words last in the lexicon; at least one chunk."""
    return max([1, *(len(lexicon().target(word)) for word in words if word in lexicon().words)])


_Made = Callable[[str, float], Sequence[Action]]
"""From a word and the level that is asked for to the actions of saying it."""


def _answering(make: _Made) -> Callable[[RepeatScenario, User], Script]:
    """The hack that says what ``make`` makes of each word, one chunk after the user's has ended, until it has said all
    or the user says the next one."""

    def cast(scenario: RepeatScenario, user: User) -> Script:
        seen, first = 0, 0
        made: Sequence[Action] = ()

        def script(k: int) -> Action:
            nonlocal seen, first, made
            facts = user.facts()
            assert isinstance(facts, RepeatFacts)
            if len(facts.prompts) > seen:
                seen, prompt = len(facts.prompts), facts.prompts[-1]
                first, made = prompt.end + RepeatExpert.DELAY, make(prompt.word, facts.target_db)
            return made[k - first] if 0 <= k - first < len(made) else LISTEN

        return script

    return cast


def _at(level: float) -> _Made:
    return lambda word, target: said(word, sound_of(word, level))


def _of_another_word(word: str, target: float) -> Sequence[Action]:
    known = lexicon().words
    return said(word, sound_of(known[(known.index(word) + 1) % len(known)], target))


def _again_and_again(word: str, target: float) -> Sequence[Action]:
    return said(word, sound_of(word, target)) * 10


def _holds_its_first_chunk(word: str, target: float) -> Sequence[Action]:
    sound = sound_of(word, target)
    return said(word, sound[:1] * len(sound))


def _talks_always(scenario: RepeatScenario, user: User) -> Script:
    word = scenario.words[0]
    made = said(word, sound_of(word, scenario.target_db))
    return lambda k: made[k % len(made)]


SILENCE_DB, WHISPER_DB = -300.0, -49.0

REPEAT = Family(
    name=FAMILY,
    axes=(TIMING, CONTENT, VOICE),
    settings=RepeatSettings,
    make=repeat,
    facts=RepeatFacts.from_json,
    expert=lambda scenario, user, rng, settings: RepeatExpert(scenario, user, rng, settings.mistakes).act,
    score=score_repeat,
    words=lambda facts: facts.words,
    hacks={
        "mumbles": _answering(_at(SILENCE_DB)),  # the right words, and nothing is heard
        "whispers": _answering(_at(WHISPER_DB)),
        "shouts": _answering(_at(0.0)),
        "another word's sound": _answering(_of_another_word),
        "one chunk": _answering(lambda word, target: said(word, sound_of(word, target)[:1])),
        "holds a chunk": _answering(_holds_its_first_chunk),
        "again and again": _answering(_again_and_again),
        "talks always": _talks_always,
    },
)

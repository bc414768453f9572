"""repeat: the user says a word, and the model says it after them, aloud.

Behind the user there is noise, which is quiet, middling or loud. The user says one word of the lexicon. The model
should say the same word soon after it has ended, and then be silent: a word's sound lasts several chunks. It should be
as loud as the noise asks for: be heard, and do not shout (`RepeatConfig.target_db`).

The user reacts to what is *heard*: a chunk of speech whose sound is at least as loud as ``audible_db``. A word token
with silence as its sound is not heard. The next word comes some chunks after the answer has ended, or when the user has
waited long enough. Some words interrupt the answer to the word before: the model should then be silent at once, and
say the new one.

A model without a voice has actions without sound. What it says is heard in the chunk in which it says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.errors import MetronomeError
from model.program.ranges import Ascending, Distinct, Few, FewPair, Length, Probability, Range, SomeChunks, Text
from rollout.seeds import generator
from rollout.turn.action import CHUNK_SAMPLES, LISTEN, Action, Mode
from rollout.turn.observation import Observation
from rollout.turn.utterance import audible
from rollout.world.base import ChunkIndex, Mistakes, Scenario, Span, User
from rollout.world.lexicon import WORDS_FOLDER, lexicon
from rollout.world.sound import GainPair, Track, amplitude, background
from rollout.world.speech import Clip, SpeechBank, Split, pick

FAMILY = "repeat"
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("breathe", "cancelled", "down", "echo", "goodbye", "hello", "here", "left", "message", "november", "okay"),
    *("pound", "right", "second", "stop", "sure", "time", "up", "yes"),
)
"""30 words that the lexicon has a sound of and the shipped tokenizer knows."""

Decibels = Annotated[float, Range(-120.0, 0.0)]
"""Of full scale."""
_Words = Annotated[tuple[Annotated[str, Text(40)], ...], Length(1, 1000), Distinct()]
_Some = Annotated[int, Range(1, 100)]
_NoiseLevels = Annotated[tuple[Annotated[float, Range(-100.0, -10.0)], ...], Length(1, 10)]


@dataclass(frozen=True)
class RepeatMistakes(Mistakes):
    """Probabilities of mistakes in demonstrations, for each word that the user says."""

    wrong_word: Probability = 0.12  # another word is said
    wrong_delay: Probability = 0.2  # the answer comes at once, or late
    omission: Probability = 0.08  # no answer
    stops_early: Probability = 0.1  # the last one or two chunks are not said
    goes_on: Probability = 0.1  # two chunks follow the whole word
    wrong_level: Probability = 0.35  # too loud or too soft
    ignored_interruption: Probability = 0.3  # the word is finished while the user says the next one


@dataclass(frozen=True)
class RepeatConfig:
    """Defaults are those of configs/voice.yaml. Ranges are uniform and inclusive; levels are of full scale."""

    chunks: SomeChunks = 40  # 8 s
    words: _Words = WORDS  # that the user may say
    noise_db: _NoiseLevels = (-70.0, -55.0, -40.0)  # RMS of the noise: one of these, and
    noise_spread_db: Annotated[float, Range(0.0, 10.0)] = 1.5  # up to so much more or less
    softest_db: Decibels = -35.0  # level at which the model should speak in the quietest noise
    rise: Annotated[float, Range(0.0, 1.0)] = 0.5  # dB that it should be louder for each dB of more noise
    audible_db: Decibels = -50.0  # of a chunk: what is softer is not heard
    gain_db: GainPair = (-5.0, 6.0)  # train: loudness of the user's words, at gain 0 -20 dB
    held_out_gain_db: GainPair = (-4.0, 5.0)
    first: FewPair = (0, 4)  # chunk in which the first word begins
    gap: Annotated[tuple[_Some, _Some], Ascending()] = (1, 4)  # chunks of silence between an answer and the next word
    patience: Few = 8  # chunks that the user waits for an answer
    tolerance: Few = 10  # chunks of one answer after which the user talks over it
    interruptions: Probability = 0.25  # probability that a word interrupts the answer to the one before
    mistakes: RepeatMistakes = field(default_factory=RepeatMistakes)

    @property
    def aloud(self) -> tuple[str, ...]:
        """See `rollout.scenarios.family.Settings`."""
        return self.words

    def target_db(self, noise_db: float) -> float:
        """The level at which a word should be said in such noise: that of its loudest chunk."""
        return min(0.0, max(self.audible_db, self.softest_db + self.rise * (noise_db - min(self.noise_db))))


_recordings = cache(lambda: SpeechBank.open(WORDS_FOLDER))


def saying(word: str, bank: SpeechBank) -> tuple[Clip, ...]:
    """The bank's recordings of a word, or else those that ship for the voice. Raises `SpeechError` if there is none."""
    own = tuple(clip for clip in bank.clips if clip.words == (word,))
    return own or _recordings().saying(word)


def sound_of(word: str, level: float) -> tuple[Tensor, ...]:
    """The lexicon's sound of a word, its loudest chunk at ``level`` dB: chunks fp32 [FRAMES, BANDS]."""
    return lexicon().at(word, level).unbind()


@dataclass(frozen=True)
class Prompt:
    """A word of the user's. Example: ``Prompt(3, 5, "four")``."""

    start: ChunkIndex  # chunk with its first sample
    end: ChunkIndex  # chunk with its last sample
    word: str


@dataclass(frozen=True)
class RepeatFacts:
    """What the user said. Example: ``RepeatFacts(40, ("four", "echo"), -55.0, -27.5, (Prompt(3, 5, "four"),))``."""

    chunks: ChunkIndex
    words: tuple[str, ...]  # all that would be said if the model answered at once
    noise_db: Decibels
    target_db: Decibels  # level at which they should be said
    prompts: tuple[Prompt, ...]  # the words that were said, in order

    def to_json(self) -> dict[str, Any]:
        return {"family": FAMILY, **asdict(self)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> RepeatFacts:
        words, prompts = tuple(fields["words"]), tuple(Prompt(**one) for one in fields["prompts"])
        if unknown := {*words, *(prompt.word for prompt in prompts)} - {*lexicon().words}:
            raise ValueError(f"the lexicon has no sound of {min(unknown)!r}")
        return RepeatFacts(fields["chunks"], words, fields["noise_db"], fields["target_db"], prompts)

    def title(self) -> str:
        return f"repeat: {len(self.prompts)} words, noise at {self.noise_db:.0f} dB, voice at {self.target_db:.0f} dB"

    def spans(self) -> list[Span]:
        """Letters: ``w`` a word, ``W`` the chunk in which it ends."""
        return [Span(p.start, p.end, "word", p.word, "w" * (p.end - p.start) + "W") for p in self.prompts]


@dataclass(frozen=True)
class PlannedWord:
    """A word that the user will say, if there is time."""

    word: str
    clip: Clip
    offset: int  # samples from the start of the chunk in which it begins
    gap: int  # chunks of silence after the answer to the word before; the first word's chunk
    interrupts: bool  # whether it begins as soon as an answer to the word before is heard

    def at(self, k: int) -> Prompt:
        """It, if it begins in chunk k."""
        return Prompt(k, k + (self.offset + len(self.clip.samples) - 1) // CHUNK_SAMPLES, self.word)


@dataclass(frozen=True, eq=False)
class RepeatScenario(Scenario):
    """Some words in noise. What is said is fixed; when it is depends on the model."""

    noise: NDArray[np.float32]  # [chunks * CHUNK_SAMPLES]
    noise_db: float
    target_db: float
    gain: float
    plan: tuple[PlannedWord, ...]
    words: tuple[str, ...]  # all that may be said
    audible_db: float
    patience: int
    tolerance: int

    def user(self) -> RepeatUser:
        return RepeatUser(self)


class RepeatUser(User):
    """Says one word after another, at times that depend on what is heard of the model."""

    def __init__(self, scenario: RepeatScenario) -> None:
        super().__init__(scenario.chunks)
        self._scenario = scenario
        self._track = Track(scenario.noise)
        self._prompts: list[Prompt] = []
        self._begins: int | None = scenario.plan[0].gap  # chunk in which the next word begins, if that is decided
        self._onset: int | None = None  # first chunk that was heard of the answer to the latest word

    def _produce(self, k: int, heard: Action | None) -> Observation:
        if heard is not None and self._begins is None and k > self._prompts[-1].end:
            self._begins = self._decide(k, audible(heard, self._scenario.audible_db))
        if k == self._begins:
            self._say(k)
        return Observation(torch.from_numpy(self._track.chunk(k)))

    def _decide(self, k: int, speaking: bool) -> int | None:
        """The chunk, from k on, in which the next word begins; None: not yet known. ``speaking``: whether something was
        heard in chunk k - 1."""
        planned = self._upcoming
        if planned is None:
            return None
        if self._onset is None and speaking:
            self._onset = k - 1
        if self._onset is None:
            return k if k - self._prompts[-1].end > self._scenario.patience else None
        if not speaking:
            return k - 1 + planned.gap
        return k if planned.interrupts or k - self._onset >= self._scenario.tolerance else None

    @property
    def _upcoming(self) -> PlannedWord | None:
        plan, said = self._scenario.plan, len(self._prompts)
        return plan[said] if said < len(plan) else None

    def _say(self, k: int) -> None:
        """Begins the next word in chunk k, if it can end within the episode."""
        planned = self._upcoming
        if planned is None or planned.at(k).end >= self._chunks:
            return
        self._track.add(planned.clip.samples, k * CHUNK_SAMPLES + planned.offset, self._scenario.gain)
        self._prompts.append(planned.at(k))
        self._begins = self._onset = None

    def facts(self) -> RepeatFacts:
        scenario = self._scenario
        words = tuple(planned.word for planned in scenario.plan)
        return RepeatFacts(self._chunks, words, scenario.noise_db, scenario.target_db, tuple(self._prompts))


def repeat(split: Split, seed: int, bank: SpeechBank, config: RepeatConfig) -> RepeatScenario:
    """The scenario of a seed. Raises MetronomeError for a word that the lexicon lacks and for an episode that is too
    short for a word, `SpeechError` for a word that no recording says."""
    rng = generator(FAMILY, split, seed)
    known = lexicon().words
    words = config.words
    if unknown := [word for word in words if word not in known]:
        raise MetronomeError(
            f"scenarios.repeat.words: the lexicon has no sound of {unknown[0]!r}; choose from {', '.join(known)}"
        )
    low, high = config.held_out_gain_db if split == "held_out" else config.gain_db
    spread = config.noise_spread_db
    noise_db = config.noise_db[int(rng.integers(len(config.noise_db)))] + float(rng.uniform(-spread, spread))
    plan: list[PlannedWord] = []
    room = config.chunks
    while room > 0:
        plan.append(_planned(rng, words, plan[-1].word if plan else None, bank, config))
        room -= plan[-1].at(0).end + 1
    if (end := plan[0].at(plan[0].gap).end) >= config.chunks:
        raise MetronomeError(
            f"scenarios.repeat.chunks is {config.chunks}, too few: the first word of seed {seed} ends in chunk {end}"
        )
    return RepeatScenario(
        family=FAMILY,
        split=split,
        seed=seed,
        chunks=config.chunks,
        noise=background(rng, split, amplitude(noise_db), config.chunks),
        noise_db=noise_db,
        target_db=config.target_db(noise_db),
        gain=amplitude(rng.uniform(low, high)),
        plan=tuple(plan),
        words=words,
        audible_db=config.audible_db,
        patience=config.patience,
        tolerance=config.tolerance,
    )


def _planned(
    rng: np.random.Generator, words: tuple[str, ...], before: str | None, bank: SpeechBank, config: RepeatConfig
) -> PlannedWord:
    """The next word, another one than ``before`` if there is another."""
    others = [word for word in words if word != before] or list(words)
    word = others[int(rng.integers(len(others)))]
    clip, offset = pick(rng, saying(word, bank)), int(rng.integers(CHUNK_SAMPLES))
    low, high = config.gap if before is not None else config.first
    gap, interrupts = int(rng.integers(low, high + 1)), rng.random() < config.interruptions
    return PlannedWord(word, clip, offset, gap, before is not None and bool(interrupts))


class RepeatExpert:
    """Says the word in the chunk after its last, and is silent from the chunk after the one in which the user
    interrupts."""

    DELAY = 1  # chunks from the word's last to the answer's first
    STOP = 1  # chunks from an interruption's first to silence
    WRONG_DELAYS = (0, 3, 4, 6)  # in place of `DELAY`, for mistakes
    WRONG_LEVELS_DB = (-13.0, -9.0, -6.0, 6.0, 9.0, 13.0)

    def __init__(
        self, scenario: RepeatScenario, user: User, rng: np.random.Generator, mistakes: RepeatMistakes
    ) -> None:
        self._words, self._user, self._rng, self._mistakes = scenario.words, user, rng, mistakes
        self._actions: dict[int, Action] = {}  # by chunk
        self._seen = 0  # prompts for which a decision was made

    def act(self, k: int) -> Action:
        facts = self._user.facts()
        assert isinstance(facts, RepeatFacts)
        if len(facts.prompts) > self._seen:
            self._seen = len(facts.prompts)
            if not self._happens(self._mistakes.ignored_interruption):
                self._actions = {i: action for i, action in self._actions.items() if i < k + self.STOP}
            self._plan(facts.prompts[-1], facts.target_db)
        return self._actions.get(k, LISTEN)

    def _plan(self, prompt: Prompt, level: float) -> None:
        """Decides when to say what, and how."""
        if self._happens(self._mistakes.omission):
            return
        word, start = prompt.word, prompt.end + self.DELAY
        if (others := [w for w in self._words if w != word]) and self._happens(self._mistakes.wrong_word):
            word = others[int(self._rng.integers(len(others)))]
        if self._happens(self._mistakes.wrong_delay):
            start = prompt.end + self.WRONG_DELAYS[int(self._rng.integers(len(self.WRONG_DELAYS)))]
        if self._happens(self._mistakes.wrong_level):
            level += self.WRONG_LEVELS_DB[int(self._rng.integers(len(self.WRONG_LEVELS_DB)))]
        sound = sound_of(word, level)
        if self._happens(self._mistakes.stops_early):
            sound = sound[: max(1, len(sound) - int(self._rng.integers(1, 3)))]
        elif self._happens(self._mistakes.goes_on):
            sound = (*sound, *sound[:2])
        self._actions = {i: action for i, action in self._actions.items() if i < start}
        self._actions |= {start + i: action for i, action in enumerate(said(word, sound))}

    def _happens(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)


def said(word: str, sound: tuple[Tensor, ...]) -> list[Action]:
    """The actions of saying a word with such sound, one a chunk: the word is in the first."""
    return [Action(Mode.SPEAK, () if i else (word,), chunk) for i, chunk in enumerate(sound)]

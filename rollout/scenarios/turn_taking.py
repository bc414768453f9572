"""turn_taking: the user talks with pauses, yields the floor with a closing phrase, and may interrupt the reply.

A turn is one or more sentences with pauses between them, then "thank you" (`YIELD_PHRASE`). The model should be silent
during speech and pauses, begin its reply (`REPLY`) shortly after the turn's end, and stop soon when the user barges in.

The user reacts. In some scenarios it barges in, some chunks after it *heard* the reply begin. Otherwise it waits for
the end of the reply, but begins its next turn when no reply comes (`patience`) or the reply does not end (`tolerance`).
A turn begins only if it and a whole reply fit into the rest of the episode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.errors import MetronomeError
from model.program.ranges import Ascending, Probability, Range, SecondsPair, SomeChunks
from rollout.seeds import generator
from rollout.turn.action import CHUNK_SAMPLES, LISTEN, Action, speak
from rollout.turn.observation import Observation
from rollout.world.base import ChunkIndex, Mistakes, Scenario, Span, User
from rollout.world.sound import SoundConfig, Track, background, seconds_to_samples
from rollout.world.speech import Clip, SpeechBank, Split, pick

FAMILY = "turn_taking"
YIELD_PHRASE = "thank you"
REPLY = ("yes", "sure", "here", "is", "the", "answer")  # one word a chunk
LATEST_ONSET = 3  # chunks after a turn's end in which a reply may begin; a turn needs room for it
MARGIN = 2  # chunks left free after the latest possible reply


@dataclass(frozen=True)
class TurnTakingMistakes(Mistakes):
    """Probabilities of mistakes in demonstrations."""

    pause_reply: Probability = 0.35  # for each pause: a reply begins in it
    wrong_delay: Probability = 0.45  # for each turn: the reply begins too early or too late
    ignored_interruption: Probability = 0.50  # for each interruption: the reply continues to its end


_Some = Annotated[int, Range(1, 100)]
_SomePair = Annotated[tuple[_Some, _Some], Ascending()]


@dataclass(frozen=True)
class TurnTakingConfig:
    """Defaults are the quickstart's. Ranges are uniform and inclusive."""

    chunks: SomeChunks = 60  # 12 s
    turns: _Some = 2  # at most; later ones start only where they fit
    sentences: _SomePair = (1, 2)  # of the first turn; later turns have one
    sentence_words: _SomePair = (2, 12)
    sentence_s: SecondsPair = (0.7, 2.0)
    pause_s: SecondsPair = (0.4, 1.2)  # inside a turn, between sentences and before the closing phrase
    interrupts: Probability = 0.6  # probability that the user means to interrupt a reply, for every turn but the last
    interrupt_after: _SomePair = (2, 3)  # chunks from the reply's onset to the interruption's first sample
    gap: _SomePair = (3, 5)  # chunks of silence after a reply, before the next turn
    # Chunks after a turn's end without a reply, before the user goes on.
    patience: Annotated[int, Range(LATEST_ONSET + 1, 3000)] = 7
    tolerance: SomeChunks = 9  # chunks of reply after which the user cuts in
    sound: SoundConfig = field(default_factory=SoundConfig)
    mistakes: TurnTakingMistakes = field(default_factory=TurnTakingMistakes)


@dataclass(frozen=True)
class Turn:
    """One turn of the user, in chunk indices."""

    start: ChunkIndex  # chunk with its first sample
    pauses: tuple[
        tuple[ChunkIndex, ChunkIndex], ...
    ]  # first and last chunk that hold no speech at all, for every pause
    end: ChunkIndex  # chunk with its last sample
    interrupts: bool  # whether the model was speaking in the chunk before `start`


@dataclass(frozen=True)
class TurnTakingFacts:
    """What happened on the user's side. Example: ``TurnTakingFacts(60, (Turn(2, ((10, 13),), 24, False), Turn(29, (),
    40, True)))``: the user interrupted the reply to its first turn at chunk 29."""

    chunks: ChunkIndex
    turns: tuple[Turn, ...]
    reply: tuple[str, ...] = REPLY

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists for tuples, as when it is read back
        return {"family": FAMILY, **plain}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> TurnTakingFacts:
        turns = tuple(
            Turn(turn["start"], tuple((first, last) for first, last in turn["pauses"]), turn["end"], turn["interrupts"])
            for turn in fields["turns"]
        )
        return TurnTakingFacts(fields["chunks"], turns, tuple(fields["reply"]))

    def title(self) -> str:
        interruptions = len([turn for turn in self.turns if turn.interrupts])
        return f"turn_taking: {len(self.turns)} turns, {interruptions} interruptions"

    def spans(self) -> list[Span]:
        """Letters: ``#`` a turn, ``!`` a turn that interrupts, ``-`` a pause inside it."""
        spans = []
        for turn in self.turns:
            kind, does, letter = ("interruption", "interrupts", "!") if turn.interrupts else ("turn", "speaks", "#")
            spans.append(Span(turn.start, turn.end, kind, does, letter * (turn.end + 1 - turn.start)))
            spans += [Span(first, last, "pause", "pauses", "-" * (last + 1 - first)) for first, last in turn.pauses]
        return spans


@dataclass(frozen=True, eq=False)
class PlannedTurn:
    """What the user will say in a turn, and its intended reaction to the reply."""

    clips: tuple[tuple[int, Clip], ...]  # (samples from the turn's first, clip); the last one yields the floor
    offset: int  # samples from the start of the turn's first chunk to its first sample
    interrupt_after: int | None  # chunks from the onset of the reply to *this* turn; None: not at all
    gap: int  # chunks of silence after the reply before the next turn

    @property
    def samples(self) -> int:
        """Length from the first chunk's start to the last sample, in samples."""
        first, clip = self.clips[-1]
        return self.offset + first + len(clip.samples)

    def at(self, chunk: int, interrupts: bool) -> Turn:
        """The facts of this turn when it starts in ``chunk``."""
        base = chunk * CHUNK_SAMPLES + self.offset
        pauses = []
        for (first, clip), (following, _) in zip(self.clips, self.clips[1:], strict=False):
            silent_from = (base + first + len(clip.samples) - 1) // CHUNK_SAMPLES + 1
            silent_to = (base + following) // CHUNK_SAMPLES - 1
            if silent_from <= silent_to:
                pauses.append((silent_from, silent_to))
        return Turn(chunk, tuple(pauses), (chunk * CHUNK_SAMPLES + self.samples - 1) // CHUNK_SAMPLES, interrupts)


@dataclass(frozen=True, eq=False)
class TurnTakingScenario(Scenario):
    """A conversation of a few turns. Their words are fixed, their times depend on the model."""

    noise: NDArray[np.float32]  # [chunks * CHUNK_SAMPLES]
    gain: float
    first_chunk: int
    plan: tuple[PlannedTurn, ...]
    patience: int  # chunks
    tolerance: int  # chunks

    def user(self) -> TurnTakingUser:
        return TurnTakingUser(self)


class TurnTakingUser(User):
    """Says its turns one after another, at times that depend on the model's actions."""

    def __init__(self, scenario: TurnTakingScenario) -> None:
        super().__init__(scenario.chunks)
        self._scenario = scenario
        self._track = Track(scenario.noise)
        self._turns: list[Turn] = []
        self._reply_onset: int | None = None  # first chunk of the model's reply to the latest turn
        self._silent_since: int | None = None  # first chunk of silence after that reply
        self._done = False
        self._start_turn(scenario.first_chunk, interrupts=False)

    def _produce(self, k: int, heard: Action | None) -> Observation:
        if heard is not None and not self._done and k > self._turns[-1].end + 1:
            self._consider(k, heard.speaks)
        return Observation(torch.from_numpy(self._track.chunk(k)))

    def _consider(self, k: int, speaking: bool) -> None:
        """Decides, after the latest turn's end, whether the next turn starts in chunk k. ``speaking``: whether the
        model spoke in chunk k - 1."""
        if speaking:
            if self._reply_onset is None or self._silent_since is not None:
                self._reply_onset = k - 1
            self._silent_since = None
        elif self._reply_onset is not None and self._silent_since is None:
            self._silent_since = k - 1
        planned = self._scenario.plan[len(self._turns) - 1]
        if self._reply_onset is None:
            if k - self._turns[-1].end > self._scenario.patience:
                self._start_turn(k, interrupts=False)
        elif self._silent_since is not None:
            if k - self._silent_since >= planned.gap:
                self._start_turn(k, interrupts=False)
        else:
            spoken = k - self._reply_onset
            if spoken == planned.interrupt_after or spoken >= self._scenario.tolerance:
                self._start_turn(k, interrupts=True)

    def _start_turn(self, k: int, interrupts: bool) -> None:
        if len(self._turns) == len(self._scenario.plan):
            self._done = True
            return
        planned = self._scenario.plan[len(self._turns)]
        turn = planned.at(k, interrupts)
        if turn.end + LATEST_ONSET + len(REPLY) + MARGIN > self._chunks:
            self._done = True
            return
        for first, clip in planned.clips:
            self._track.add(clip.samples, k * CHUNK_SAMPLES + planned.offset + first, self._scenario.gain)
        self._turns.append(turn)
        self._reply_onset = self._silent_since = None

    def facts(self) -> TurnTakingFacts:
        return TurnTakingFacts(self._chunks, tuple(self._turns))


def turn_taking(split: Split, seed: int, bank: SpeechBank, config: TurnTakingConfig) -> TurnTakingScenario:
    """The scenario of a seed. Raises `SpeechError` when the bank lacks sentences or the closing phrase."""
    rng = generator(FAMILY, split, seed)
    sound = config.sound
    sentences = bank.fillers(split, words=config.sentence_words, seconds=config.sentence_s)
    closings = bank.saying(YIELD_PHRASE)
    start = seconds_to_samples(rng.uniform(*sound.start_s))
    plan = []
    for index in range(config.turns):
        count = int(rng.integers(config.sentences[0], config.sentences[1] + 1)) if index == 0 else 1
        clips: list[tuple[int, Clip]] = []
        at = 0
        for clip in (*(pick(rng, sentences) for _ in range(count)), pick(rng, closings)):
            clips.append((at, clip))
            at += len(clip.samples) + seconds_to_samples(rng.uniform(*config.pause_s))
        interrupts = rng.random() < config.interrupts and index < config.turns - 1
        interrupt_after = int(rng.integers(config.interrupt_after[0], config.interrupt_after[1] + 1))
        plan.append(
            PlannedTurn(
                clips=tuple(clips),
                # A turn that interrupts starts near its chunk's start, so that the chunk lets it be heard.
                offset=start % CHUNK_SAMPLES if index == 0 else int(rng.integers(CHUNK_SAMPLES // 4)),
                interrupt_after=interrupt_after if interrupts else None,
                gap=int(rng.integers(config.gap[0], config.gap[1] + 1)),
            )
        )
    gain, noise_rms = sound.draw(rng, split)
    first_chunk = start // CHUNK_SAMPLES
    if plan[0].at(first_chunk, interrupts=False).end + LATEST_ONSET + len(REPLY) + MARGIN > config.chunks:
        raise MetronomeError(
            f"scenarios.turn_taking.chunks is {config.chunks}, too few: the first turn of seed {seed} and a reply to "
            "it do not fit"
        )
    return TurnTakingScenario(
        family=FAMILY,
        split=split,
        seed=seed,
        chunks=config.chunks,
        noise=background(rng, split, noise_rms, config.chunks),
        gain=gain,
        first_chunk=first_chunk,
        plan=tuple(plan),
        patience=config.patience,
        tolerance=config.tolerance,
    )


class TurnTakingExpert:
    """Replies two chunks after each turn's end (the middle of the window), word by word, and stops when interrupted."""

    DELAY = 2  # chunks from a turn's end to the reply
    WRONG_DELAYS = (-1, 0, 5, 6)  # the same, for mistakes
    PAUSE_WORDS = 3  # length of a mistaken reply in a pause

    def __init__(
        self, scenario: TurnTakingScenario, user: User, rng: np.random.Generator, config: TurnTakingConfig
    ) -> None:
        self._user = user
        self._rng = rng
        self._mistakes = config.mistakes
        self._turns_planned = 0
        self._onsets: dict[int, int] = {}  # chunk in which to begin to speak -> number of words
        self._ignores_interruption = False
        self._said = 0  # words of the running utterance
        self._length = 0  # words that it is to have

    def act(self, k: int) -> Action:
        facts = self._user.facts()
        assert isinstance(facts, TurnTakingFacts)
        if len(facts.turns) > self._turns_planned:  # the user has just begun a turn
            self._turns_planned = len(facts.turns)
            self._plan(facts)
            if facts.turns[-1].interrupts and not self._ignores_interruption:
                # One more word: the barge-in is heard while it is spoken.
                self._length = min(self._said + 1, self._length)
            self._ignores_interruption = self._rng.random() < self._mistakes.ignored_interruption
        if self._said == self._length and k in self._onsets:
            self._said, self._length = 0, self._onsets[k]
        if self._said == self._length:
            return LISTEN
        self._said += 1
        return speak(facts.reply[self._said - 1])

    def _plan(self, facts: TurnTakingFacts) -> None:
        """Decides when to speak in and after the turn that has just begun."""
        turn = facts.turns[-1]
        for first, last in turn.pauses:
            if self._rng.random() < self._mistakes.pause_reply:
                self._onsets[int(self._rng.integers(first, last + 1))] = self.PAUSE_WORDS
        wrong = self._rng.random() < self._mistakes.wrong_delay
        delay = self.WRONG_DELAYS[int(self._rng.integers(len(self.WRONG_DELAYS)))] if wrong else self.DELAY
        self._onsets[turn.end + delay] = len(facts.reply)

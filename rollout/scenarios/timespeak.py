"""timespeak: the user asks to be reminded every N seconds, and may later say stop.

The user says, in real recordings, ``[filler] <number> second(s)``. The model should repeat the number and then say the
reminder word every N seconds after that. In some scenarios the user says "goodbye" after some reminders (`STOP_WORD`;
the recordings have no "stop"), after which the model should be silent.

The user reacts: the stop comes after the n-th reminder that it *heard*, so a model that never reminds is never told to
stop. The scripted expert may look at the user's facts, which include the end of an utterance that has begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.errors import MetronomeError
from model.program.ranges import Ascending, Few, Length, Probability, Range, SecondsPair, SomeChunks
from rollout.seeds import generator
from rollout.turn.action import CHUNK_SAMPLES, CHUNKS_PER_SECOND, LISTEN, Action, speak
from rollout.turn.observation import Observation
from rollout.world.base import ChunkIndex, Mistakes, Scenario, Span, User
from rollout.world.sound import SoundConfig, Track, background, seconds_to_samples
from rollout.world.speech import NUMBER_WORDS, Clip, SpeechBank, Split, pick

FAMILY = "timespeak"
STOP_WORD = "goodbye"
REMINDER = "breathe"


@dataclass(frozen=True)
class TimespeakMistakes(Mistakes):
    """Mistakes of demonstrations. The warm-started policy learns the task with them, and leaves RL something to
    learn."""

    wrong_number: Probability = 0.12  # probability of repeating a wrong number, and then using its interval
    jitter: Probability = 0.08  # standard deviation of an interval, as a fraction of it
    omission: Probability = 0.10  # probability, for each reminder, of leaving it out
    ignored_stop: Probability = 0.60  # probability of continuing after the stop
    gross_jitter: Probability = 0.3  # replaces ``jitter`` in plays for reward models

    def gross(self) -> TimespeakMistakes:
        """With `gross_jitter` most intervals are outside every scoring window. A reward model that was trained only
        with single misplaced reminders gave full reward to one that was late by a third of its interval."""
        return replace(self, jitter=self.gross_jitter)


_Some = Annotated[int, Range(1, 100)]


@dataclass(frozen=True)
class TimespeakConfig:
    """Defaults are the quickstart's. Ranges are uniform and inclusive."""

    chunks: SomeChunks = 60  # 12 s
    seconds: Annotated[tuple[Annotated[int, Range(1, 10)], ...], Length(1, 10)] = (1, 2, 3, 4)  # possible intervals
    filler: Probability = 0.5  # fraction of scenarios with a filler before the request
    filler_s: SecondsPair = (0.4, 1.1)
    gap_s: SecondsPair = (0.2, 0.5)  # between filler and number
    unit_gap_s: SecondsPair = (0.02, 0.1)  # between number and "seconds"
    # Fraction of scenarios in which the user intends to say stop, if the episode is long enough.
    stop: Probability = 0.6
    stop_after: Annotated[tuple[_Some, _Some], Ascending()] = (1, 4)  # reminders heard before the stop
    # From hearing the last of these to the stop's first sample.
    stop_delay_chunks: Annotated[tuple[Few, Few], Ascending(strictly=True)] = (1, 3)
    sound: SoundConfig = field(default_factory=SoundConfig)
    mistakes: TimespeakMistakes = field(default_factory=TimespeakMistakes)


@dataclass(frozen=True)
class TimespeakFacts:
    """What happened on the user's side. Example: "four seconds" spoken in chunks 2 to 8, stopped at chunk 45:
    ``TimespeakFacts(60, "four", 20, 2, 5, 8, 41, 45)``."""

    chunks: ChunkIndex
    number: str  # the word to repeat
    interval: ChunkIndex  # chunks between reminders
    request_start: ChunkIndex  # chunk with the first sample of the user's first word, filler included
    number_end: ChunkIndex  # chunk with the number's last sample
    request_end: ChunkIndex  # chunk with the request's last sample
    stop_start: ChunkIndex | None  # chunk with the stop's first sample, None if the user never said it
    stop_end: ChunkIndex | None  # chunk with its last sample
    reminder: str = REMINDER

    def to_json(self) -> dict[str, Any]:
        return {"family": FAMILY, **asdict(self)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> TimespeakFacts:
        return TimespeakFacts(**{name: value for name, value in fields.items() if name != "family"})

    def title(self) -> str:
        return f'timespeak: "{self.number}", {self.reminder!r} every {self.interval} chunks'

    def spans(self) -> list[Span]:
        """Letters: ``f`` the request, ``N`` the chunk in which the number ends, ``s`` the stop."""
        letters = ["f"] * (self.request_end + 1 - self.request_start)
        letters[self.number_end - self.request_start] = "N"
        request = f"… {self.number} seconds"
        spans = [Span(self.request_start, self.request_end, "request", request, "".join(letters))]
        if self.stop_start is not None and self.stop_end is not None:
            letters = ["s"] * (self.stop_end + 1 - self.stop_start)
            spans.append(Span(self.stop_start, self.stop_end, "stop", STOP_WORD, "".join(letters)))
        return spans


@dataclass(frozen=True, eq=False)
class TimespeakScenario(Scenario):
    """One request. All that the user will say is fixed; only the time of the stop depends on the model."""

    noise: NDArray[np.float32]  # [chunks * CHUNK_SAMPLES]
    request: tuple[tuple[int, Clip], ...]  # (first sample, clip): filler if any, number, unit
    gain: float
    number: str
    numbers: tuple[str, ...]  # all that the family's settings allow
    interval: int  # chunks
    stop: Clip
    stop_after: int | None  # reminders heard before the stop, None for never
    stop_delay: int  # samples from the start of the chunk in which the last of them was heard

    def user(self) -> TimespeakUser:
        return TimespeakUser(self)


class TimespeakUser(User):
    """Makes the request, counts the reminders that it hears, and says stop after enough of them."""

    def __init__(self, scenario: TimespeakScenario) -> None:
        super().__init__(scenario.chunks)
        self._scenario = scenario
        self._track = Track(scenario.noise)
        for first, clip in scenario.request:
            self._track.add(clip.samples, first, scenario.gain)
        (_, number), (unit_first, unit) = scenario.request[-2:]
        self._request_start = scenario.request[0][0] // CHUNK_SAMPLES
        self._number_end = (scenario.request[-2][0] + len(number.samples) - 1) // CHUNK_SAMPLES
        self._request_end = (unit_first + len(unit.samples) - 1) // CHUNK_SAMPLES
        self._reminders_heard = 0
        self._stop: tuple[int, int] | None = None  # first and last chunk

    def _produce(self, k: int, heard: Action | None) -> Observation:
        scenario = self._scenario
        if heard is not None and heard.speaks and k - 1 > self._request_end and REMINDER in heard.words:
            self._reminders_heard += 1
            if self._stop is None and self._reminders_heard == scenario.stop_after:
                self._say_stop(k * CHUNK_SAMPLES + scenario.stop_delay)
        return Observation(torch.from_numpy(self._track.chunk(k)))

    def _say_stop(self, first: int) -> None:
        last = first + len(self._scenario.stop.samples) - 1
        if last >= (self._chunks - 2) * CHUNK_SAMPLES:
            return  # too late in the episode for silence after it to mean anything
        self._track.add(self._scenario.stop.samples, first, self._scenario.gain)
        self._stop = (first // CHUNK_SAMPLES, last // CHUNK_SAMPLES)

    def facts(self) -> TimespeakFacts:
        start, end = self._stop or (None, None)
        return TimespeakFacts(
            chunks=self._chunks,
            number=self._scenario.number,
            interval=self._scenario.interval,
            request_start=self._request_start,
            number_end=self._number_end,
            request_end=self._request_end,
            stop_start=start,
            stop_end=end,
        )


def timespeak(split: Split, seed: int, bank: SpeechBank, config: TimespeakConfig) -> TimespeakScenario:
    """The scenario of a seed. Raises `SpeechError` when the bank lacks a word that the family needs."""
    rng = generator(FAMILY, split, seed)
    sound = config.sound
    seconds = int(rng.choice(config.seconds))
    number = NUMBER_WORDS[seconds]
    at = seconds_to_samples(rng.uniform(*sound.start_s))
    request: list[tuple[int, Clip]] = []
    if rng.random() < config.filler:
        filler = pick(rng, bank.fillers(split, words=(1, 3), seconds=config.filler_s))
        request.append((at, filler))
        at += len(filler.samples) + seconds_to_samples(rng.uniform(*config.gap_s))
    number_clip = pick(rng, bank.saying(number))
    request.append((at, number_clip))
    at += len(number_clip.samples) + seconds_to_samples(rng.uniform(*config.unit_gap_s))
    unit = pick(rng, bank.saying("second" if seconds == 1 else "seconds"))
    request.append((at, unit))
    end = (at + len(unit.samples) - 1) // CHUNK_SAMPLES
    if end >= config.chunks:
        raise MetronomeError(
            f"scenarios.timespeak.chunks is {config.chunks}, too few: the request of seed {seed} ends in chunk {end}"
        )

    gain, noise_rms = sound.draw(rng, split)
    stop = pick(rng, bank.saying(STOP_WORD))
    interval = seconds * CHUNKS_PER_SECOND
    stop_delay = int(
        rng.integers(config.stop_delay_chunks[0] * CHUNK_SAMPLES, config.stop_delay_chunks[1] * CHUNK_SAMPLES)
    )
    # The silence after the stop is a test only if another reminder would have been due before the episode ends.
    after_stop = (stop_delay + len(stop.samples)) // CHUNK_SAMPLES + 2
    last_heard = config.chunks - 1 - max(after_stop, interval + 1)
    latest = min(config.stop_after[1], (last_heard - end - 1) // interval)
    wants_stop = rng.random() < config.stop
    stop_after = int(rng.integers(config.stop_after[0], max(latest, config.stop_after[0]) + 1))
    return TimespeakScenario(
        family=FAMILY,
        split=split,
        seed=seed,
        chunks=config.chunks,
        noise=background(rng, split, noise_rms, config.chunks),
        request=tuple(request),
        gain=gain,
        number=number,
        numbers=tuple(NUMBER_WORDS[s] for s in config.seconds),
        interval=interval,
        stop=stop,
        stop_after=stop_after if wants_stop and latest >= config.stop_after[0] else None,
        stop_delay=stop_delay,
    )


class TimespeakExpert:
    """Repeats the number one chunk after the request, then reminds until the user has said stop."""

    def __init__(
        self, scenario: TimespeakScenario, user: User, rng: np.random.Generator, config: TimespeakConfig
    ) -> None:
        self._user = user
        self._rng = rng
        self._mistakes = config.mistakes
        facts = self._facts()
        others = [number for number in scenario.numbers if number != facts.number]
        wrong = rng.random() < self._mistakes.wrong_number and others
        self._number = others[int(rng.integers(len(others)))] if wrong else facts.number
        self._interval = NUMBER_WORDS.index(self._number) * CHUNKS_PER_SECOND
        self._ignores_stop = rng.random() < self._mistakes.ignored_stop
        self._omits = rng.random() < self._mistakes.omission
        self._echo = facts.request_end + 1
        self._due = self._echo + self._jittered()

    def _facts(self) -> TimespeakFacts:
        facts = self._user.facts()
        assert isinstance(facts, TimespeakFacts)
        return facts

    def _jittered(self) -> int:
        return max(1, round(self._interval * (1.0 + self._mistakes.jitter * _nearly_normal(self._rng))))

    def act(self, k: int) -> Action:
        facts = self._facts()
        if facts.stop_end is not None and k >= facts.stop_end and not self._ignores_stop:
            return LISTEN
        if k == self._echo:
            return speak(self._number)
        if k != self._due:
            return LISTEN
        omitted = self._omits
        self._omits = self._rng.random() < self._mistakes.omission
        self._due = k + self._jittered()
        return LISTEN if omitted else speak(facts.reminder)


def _nearly_normal(rng: np.random.Generator) -> float:
    """A draw of mean 0 and standard deviation 1: the sum of twelve uniform numbers, minus 6 (Irwin-Hall). Computed from
    integers, it has the same bits on every machine; numpy's normal numbers need libm's logarithm."""
    return sum(rng.integers(1 << 32, size=12).tolist()) / (1 << 32) - 6.0

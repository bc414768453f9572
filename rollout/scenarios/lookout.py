"""lookout: a shape appears in a picture now and then, and the model says in which part of it, once.

The user shows a small picture and says nothing. Every few seconds a shape appears at the left, right, top or bottom,
moves a little and goes after some chunks. The model should say "left", "right", "up" or "down" soon after a shape has
appeared, and be silent otherwise: also while the whole picture flickers, and when a small, faint spot is seen.

The user reacts. A shape whose place is named goes at once, and the next one comes the sooner; at any other word it
stays, and blinks from then on. Scenarios of the split held_out have other shapes, sizes, speeds and backgrounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.errors import MetronomeError
from model.program.ranges import Ascending, Probability, Range, SomeChunks
from rollout.seeds import generator
from rollout.turn.action import LISTEN, Action, speak
from rollout.turn.observation import NO_FRAMES, Observation
from rollout.world.base import ChunkIndex, Mistakes, Scenario, Span, User
from rollout.world.picture import STEPS, Colour, Figure, LooksConfig, Pixels, developed, draw, grain, paint, to_and_fro
from rollout.world.sound import SoundConfig, Track, background
from rollout.world.speech import SpeechBank, Split

FAMILY = "lookout"
PLACES: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""From the words to directions from the picture's centre, (right, down)."""
FLICKER: Literal["flicker"] = "flicker"
SPOT: Literal["spot"] = "spot"

_Some = Annotated[int, Range(1, 100)]
_SomePair = Annotated[tuple[_Some, _Some], Ascending()]


@dataclass(frozen=True)
class LookoutMistakes(Mistakes):
    """Probabilities of mistakes in demonstrations."""

    wrong_place: Probability = 0.15  # for each shape: another place is named
    wrong_delay: Probability = 0.25  # for each shape: the answer comes at once, or late
    omission: Probability = 0.08  # for each shape: no answer
    false_alarm: Probability = 0.30  # for each flicker or spot: a place is named
    repetition: Probability = 0.15  # for each answer: it is said again in the next chunk


@dataclass(frozen=True)
class LookoutConfig:
    """Defaults are those of configs/eyes.yaml. Ranges are uniform and inclusive."""

    chunks: SomeChunks = 40  # 8 s
    frame_every: _Some = 1  # chunks from a frame to the next one; the first is in chunk 0
    gap: _SomePair = (3, 7)  # chunks without a shape, before the first one and between two
    stay: _SomePair = (8, 12)  # chunks that a shape stays when its place is not named
    flickers: Probability = 0.35  # probability of a flicker in a gap
    spots: Probability = 0.35  # probability of a faint spot in a gap
    flicker_chunks: _SomePair = (1, 2)
    spot_chunks: _SomePair = (2, 4)  # both end with the gap at the latest
    looks: LooksConfig = field(default_factory=LooksConfig)
    sound: SoundConfig = field(default_factory=SoundConfig)
    mistakes: LookoutMistakes = field(default_factory=LookoutMistakes)

    @property
    def frame(self) -> tuple[int, int]:
        """See `rollout.scenarios.family.Settings`."""
        return self.looks.side, self.looks.side


@dataclass(frozen=True)
class Appearance:
    """A shape in the picture. Example: ``Appearance(5, 6, "left")``: it was named in chunk 6."""

    start: ChunkIndex  # chunk with the first frame that shows it
    end: ChunkIndex  # the last chunk before it went, or of the episode
    place: str  # a word of `PLACES`


@dataclass(frozen=True)
class Distraction:
    """What must not be answered. Example: ``Distraction(9, 9, "flicker")``."""

    start: ChunkIndex
    end: ChunkIndex  # last chunk
    kind: Literal["flicker", "spot"]


@dataclass(frozen=True)
class LookoutFacts:
    """What was to be seen. Example: ``LookoutFacts(40, ("left", "down"), (Appearance(5, 6, "left"),), ())``."""

    chunks: ChunkIndex
    places: tuple[str, ...]  # of all shapes that would appear if each were named at once
    shapes: tuple[Appearance, ...]  # that appeared, in order
    distractions: tuple[Distraction, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "family": FAMILY,
            "chunks": self.chunks,
            "places": list(self.places),
            "shapes": [asdict(shape) for shape in self.shapes],
            "distractions": [asdict(one) for one in self.distractions],
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> LookoutFacts:
        return LookoutFacts(
            fields["chunks"],
            tuple(fields["places"]),
            tuple(Appearance(**one) for one in fields["shapes"]),
            tuple(Distraction(**one) for one in fields["distractions"]),
        )

    def title(self) -> str:
        return f"lookout: {len(self.shapes)} shapes, {len(self.distractions)} distractions"

    def spans(self) -> list[Span]:
        """Letters: ``l``, ``r``, ``u``, ``d`` a shape at the left, right, top, bottom; ``*`` a flicker, ``o`` a
        spot."""
        shown = [(one.start, one.end, "shape", one.place, one.place[0]) for one in self.shapes]
        letters = {FLICKER: "*", SPOT: "o"}
        shown += [(one.start, one.end, one.kind, one.kind, letters[one.kind]) for one in self.distractions]
        spans = [
            Span(first, last, kind, text, (last + 1 - first) * letter) for first, last, kind, text, letter in shown
        ]
        return sorted(spans, key=lambda span: span.first)


@dataclass(frozen=True)
class PlannedDistraction:
    """A flicker or spot in a gap; times in chunks from the gap's first."""

    first: int
    last: int
    flash: int  # brightness added to the whole picture
    spot: tuple[Figure, int, int] | None  # and its x and y, in eighths of a pixel from the centre


@dataclass(frozen=True)
class PlannedShape:
    """A shape, and the gap before it. Positions and speeds in eighths of a pixel."""

    gap: int  # chunks
    distraction: PlannedDistraction | None
    place: str
    figure: Figure
    x: int  # from the centre
    y: int
    speed: tuple[int, int]  # right and down, a chunk
    travel: int  # the most that it is away from (x, y) in each direction
    stay: int  # chunks, when not named

    def at(self, age: int) -> tuple[int, int]:
        """Where it is ``age`` chunks after it appeared: it goes to and fro."""
        right, down = (to_and_fro(age * speed, self.travel) for speed in self.speed)
        return self.x + right, self.y + down


@dataclass(frozen=True, eq=False)
class LookoutScenario(Scenario):
    """One picture. What may appear in it is fixed; when it does depends on the model."""

    noise: NDArray[np.float32]  # [chunks * CHUNK_SAMPLES]
    backdrop: Pixels  # int32 [side, side, 3]
    brightness: tuple[int, ...]  # [chunks], added to the whole picture
    grain: int
    frame_every: int
    plan: tuple[PlannedShape, ...]

    def user(self) -> LookoutUser:
        return LookoutUser(self)


class LookoutUser(User):
    """Shows the picture, and takes a shape away whose place it hears."""

    def __init__(self, scenario: LookoutScenario) -> None:
        super().__init__(scenario.chunks)
        self._scenario = scenario
        self._track = Track(scenario.noise)
        self._gap_start = 0  # first chunk of the latest gap
        self._shapes: list[Appearance] = []
        self._distractions: list[Distraction] = []
        self._visible = False  # whether the latest of `_shapes` is still in the picture
        self._blinks_from: int | None = None  # chunk

    def _produce(self, k: int, heard: Action | None) -> Observation:
        if self._visible:
            self._consider(k, heard)
        if not self._visible:
            self._wait(k)
        return Observation(torch.from_numpy(self._track.chunk(k)), self._frame(k))

    def _consider(self, k: int, heard: Action | None) -> None:
        """Decides whether the shape is still there in chunk k."""
        start, place = self._shapes[-1].start, self._shapes[-1].place
        speaks = heard is not None and heard.speaks
        if (heard is not None and speaks and heard.words == (place,)) or k - start >= self._latest.stay:
            self._visible, self._gap_start = False, k
            return
        self._shapes[-1] = Appearance(start, k, place)
        if speaks and self._blinks_from is None:
            self._blinks_from = k

    def _wait(self, k: int) -> None:
        """What there is to see in a gap, and whether the next shape appears in chunk k."""
        scenario = self._scenario
        if len(self._shapes) == len(scenario.plan):
            return
        planned, waited = scenario.plan[len(self._shapes)], k - self._gap_start
        if waited >= planned.gap and k % scenario.frame_every == 0:
            self._shapes.append(Appearance(k, k, planned.place))
            self._visible, self._blinks_from = True, None
        elif (seen := planned.distraction) and seen.first <= waited <= seen.last:
            if waited > seen.first:
                self._distractions.pop()
            start = self._gap_start + seen.first
            self._distractions.append(Distraction(start, k, SPOT if seen.spot else FLICKER))

    @property
    def _latest(self) -> PlannedShape:
        return self._scenario.plan[len(self._shapes) - 1]

    def _frame(self, k: int) -> torch.Tensor:
        """The frames of chunk k: uint8 [1, side, side, 3] or [0, 0, 0, 3]."""
        scenario = self._scenario
        if k % scenario.frame_every:
            return NO_FRAMES
        canvas, light = scenario.backdrop, scenario.brightness[k]
        if self._visible:
            latest, since = self._latest, self._blinks_from
            if since is None or (k - since) // scenario.frame_every % 2:
                canvas = paint(canvas, latest.figure, *latest.at(k - self._shapes[-1].start))
        elif self._distractions and self._distractions[-1].end == k:
            seen = scenario.plan[len(self._shapes)].distraction
            assert seen is not None
            light += seen.flash
            if seen.spot:
                canvas = paint(canvas, *seen.spot)
        rng = generator(FAMILY, scenario.split, scenario.seed, "grain", k)
        return torch.from_numpy(developed(canvas + light + grain(rng, len(canvas), scenario.grain))[None])

    def facts(self) -> LookoutFacts:
        places = tuple(planned.place for planned in self._scenario.plan)
        return LookoutFacts(self._chunks, places, tuple(self._shapes), tuple(self._distractions))


def lookout(split: Split, seed: int, bank: SpeechBank, config: LookoutConfig) -> LookoutScenario:
    """The scenario of a seed. Raises MetronomeError when an episode is too short for a shape."""
    rng = generator(FAMILY, split, seed)
    if config.gap[1] + config.frame_every >= config.chunks:
        raise MetronomeError(
            f"scenarios.lookout.chunks is {config.chunks}, too few: gaps (scenarios.lookout.gap) are of up to "
            f"{config.gap[1]} chunks, and a frame comes every {config.frame_every}"
        )
    level, canvas = config.looks.background(rng, split)
    plan: list[PlannedShape] = []
    room = config.chunks
    while room > 0:  # a shape is there for one chunk at least
        plan.append(_planned(rng, split, level, config))
        room -= plan[-1].gap + 1
    _, rms = config.sound.draw(rng, split)
    return LookoutScenario(
        family=FAMILY,
        split=split,
        seed=seed,
        chunks=config.chunks,
        noise=background(rng, split, rms, config.chunks),
        backdrop=canvas,
        brightness=config.looks.brightness(rng, config.chunks),
        grain=config.looks.grain,
        frame_every=config.frame_every,
        plan=tuple(plan),
    )


def _planned(rng: np.random.Generator, split: Split, level: Colour, config: LookoutConfig) -> PlannedShape:
    """The next shape, with the gap before it; ``level``: the background's at the centre."""
    looks = config.looks
    gap = draw(rng, config.gap)
    place = list(PLACES)[rng.integers(len(PLACES))]
    right, down = PLACES[place]
    along, aside = looks.steps(draw(rng, looks.distance)), looks.steps(draw(rng, (-looks.aside, looks.aside)))
    return PlannedShape(
        gap=gap,
        distraction=_distraction(rng, gap, level, config),
        place=place,
        figure=looks.figure(rng, split, level),
        x=right * along + down * aside,
        y=down * along + right * aside,
        speed=looks.velocity(rng, split),
        travel=looks.steps(looks.travel),
        stay=draw(rng, config.stay),
    )


def _distraction(rng: np.random.Generator, gap: int, level: Colour, config: LookoutConfig) -> PlannedDistraction | None:
    looks, chance = config.looks, rng.random()
    if chance >= config.flickers + config.spots:
        return None
    flickers = chance < config.flickers
    first = draw(rng, (min(1, gap - 1), gap - 1))
    chunks = draw(rng, config.flicker_chunks if flickers else config.spot_chunks)
    half = looks.side * STEPS // 2
    spot = looks.spot(rng, level), draw(rng, (-half, half)), draw(rng, (-half, half))
    return PlannedDistraction(
        first=first,
        last=min(first + chunks, gap) - 1,
        flash=draw(rng, looks.flicker) if flickers else 0,
        spot=None if flickers else spot,
    )


class LookoutExpert:
    """Names a shape's place in the chunk after the one in which it appeared."""

    DELAY = 1  # chunks from a shape's appearance to the answer
    WRONG_DELAYS = (0, 3, 4, 6)  # the same, for mistakes

    def __init__(self, user: User, rng: np.random.Generator, config: LookoutConfig) -> None:
        self._user = user
        self._rng = rng
        self._mistakes = config.mistakes
        self._answers: dict[int, str] = {}  # chunk -> word
        self._seen = [0, 0]  # shapes and distractions for which a decision was made

    def act(self, k: int) -> Action:
        facts = self._user.facts()
        assert isinstance(facts, LookoutFacts)
        seen = [len(facts.shapes), len(facts.distractions)]
        if seen[0] > self._seen[0]:
            self._plan(k, facts.shapes[-1].place)
        if seen[1] > self._seen[1] and self._happens(self._mistakes.false_alarm):
            self._answers[k + self.DELAY] = self._any_of(list(PLACES))
        self._seen = seen
        return speak(self._answers[k]) if k in self._answers else LISTEN

    def _plan(self, k: int, place: str) -> None:
        """Decides when to say what about a shape that has appeared in chunk k."""
        if self._happens(self._mistakes.omission):
            return
        if self._happens(self._mistakes.wrong_place):
            place = self._any_of([other for other in PLACES if other != place])
        late = self._happens(self._mistakes.wrong_delay)
        when = k + (self.WRONG_DELAYS[int(self._rng.integers(len(self.WRONG_DELAYS)))] if late else self.DELAY)
        self._answers[when] = place
        if self._happens(self._mistakes.repetition):
            self._answers[when + 1] = place

    def _happens(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def _any_of(self, words: list[str]) -> str:
        return words[int(self._rng.integers(len(words)))]

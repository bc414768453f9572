"""Base classes of all families: scenario, simulated user, facts, mistakes.

A scenario is a reproducible situation. It is immutable and may be shared by many rollouts; each rollout gets a `User`
of its own from it, who reacts to the model: it hears the model's action of chunk k - 1 before it makes the audio of
chunk k. After the episode the user's `Facts` are what a scorer needs to know; they are plain data, stored with the
episode. Nothing in this module knows rewards. `rollout.scenarios.family` defines what a family adds to these classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Protocol, Self

from model.program.ranges import Range
from rollout.turn.action import Action
from rollout.turn.observation import Observation
from rollout.world.speech import Split

ChunkIndex = Annotated[int, Range(0, 1_000_000)]
"""Number of a chunk, or a count of chunks, in facts; its range holds for those that are read from a file."""

Script = Callable[[int], Action]
"""A scripted policy: from k to the action of chunk k. It is called once for every chunk, in order, after the user has
produced chunk k."""


@dataclass(frozen=True)
class Span:
    """Something that the user did, for display. Example: ``Span(2, 5, "request", "four", "ffNf")``."""

    first: int  # chunk
    last: int  # chunk
    kind: str  # "request", "turn", … : one word
    text: str  # what was said or done
    letters: str  # [last - first + 1], one per chunk, for a timeline in text; later spans overwrite earlier ones


class Facts(Protocol):
    """What happened in an episode on the user's side. Times are chunk indices."""

    @property
    def chunks(self) -> int:
        """Length of the episode in chunks."""

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON-serialisable data; "family" is the name of the family whose `Family.facts` reads them."""

    def title(self) -> str:
        """One line about the episode, for display."""

    def spans(self) -> list[Span]:
        """What the user did, for display."""


@dataclass(frozen=True)
class Mistakes:
    """Rates of the deliberate mistakes of a family's scripted expert. All fields are numbers; 0 turns a mistake off."""

    def scaled(self, factor: float) -> Self:
        """All rates multiplied by ``factor``; at 0 the expert is faultless."""
        return type(self)(**{field.name: factor * getattr(self, field.name) for field in fields(self)})

    def gross(self) -> Self:
        """The mistakes used to train reward models: a family overrides this if some of its mistakes are so small that
        a reward model could not learn that they are wrong."""
        return self


class User(ABC):
    """One simulated user in one episode of ``chunks`` chunks. It decides chunk by chunk what to say."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._next = 0

    def next_chunk(self, heard: Action | None) -> Observation:
        """The observation of the next chunk. ``heard``: the model's action in the chunk before it, None before chunk 0.
        Raises ValueError after the last chunk, and for None or an action where the other is due."""
        k = self._next
        if k >= self._chunks:
            raise ValueError(f"the episode has {self._chunks} chunks: chunk {k} does not exist")
        if (heard is None) != (k == 0):
            raise ValueError(f"chunk {k}: give the action of chunk k - 1, and None before chunk 0 only")
        self._next += 1
        return self._produce(k, heard)

    @abstractmethod
    def _produce(self, k: int, heard: Action | None) -> Observation:
        """The observation of chunk k."""

    @abstractmethod
    def facts(self) -> Facts:
        """The facts so far; complete after the last chunk."""


@dataclass(frozen=True)
class Scenario(ABC):
    """One situation of a family, determined by its id, the recordings and the family's settings."""

    family: str
    split: Split
    seed: int
    chunks: int

    @property
    def id(self) -> str:
        """Unique name, "family/split/seed"."""
        return f"{self.family}/{self.split}/{self.seed}"

    @abstractmethod
    def user(self) -> User:
        """A fresh user at the start of the episode."""

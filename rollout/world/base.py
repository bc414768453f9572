"""What a scenario is, whatever its family: a reproducible situation with a simulated user who reacts to the model.

A scenario is immutable and may be shared by many rollouts; each rollout asks it for a fresh `User`. A user hears the
model's action of chunk k - 1 before it makes the audio of chunk k. After the episode the user's `Facts` say what a
scorer has to know; they are plain data and are stored with the episode. Neither users nor facts know anything of
rewards.

What a kind of scenarios brings beside this is in `rollout.scenarios.family`; kinds are found through
`rollout.scenarios.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

from rollout.turn.action import Action
from rollout.turn.observation import Observation
from rollout.world.speech import Split

Script = Callable[[int], Action]
"""The model's action of chunk k, after the user's audio of chunk k; called once for every chunk, in order."""


@dataclass(frozen=True)
class Span:
    """Something that the user did, as people are shown it. Example: ``Span(2, 5, "request", "four", "ffNf")``."""

    first: int  # chunk
    last: int  # chunk
    kind: str  # "request", "turn", … : one word
    text: str  # what was said or done
    letters: str  # in a drawing of one letter a chunk, [last - first + 1]; later spans are drawn over earlier ones


class Facts(Protocol):
    """What happened in an episode on the user's side. Times are chunk indices."""

    @property
    def chunks(self) -> int:
        """Length of the episode."""

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable form; its key "family" names the family that reads it back."""

    def title(self) -> str:
        """The episode's situation in a line, for people."""

    def spans(self) -> list[Span]:
        """What the user did, for people."""


@dataclass(frozen=True)
class Mistakes:
    """How a family's scripted expert errs on purpose. Every field is a number that 0 turns off."""

    def scaled(self, factor: float) -> Self:
        """All numbers times ``factor``: at 0 the expert is faultless."""
        return type(self)(**{field.name: factor * getattr(self, field.name) for field in fields(self)})

    def gross(self) -> Self:
        """For plays that reward models learn from: none so small that a model could take it for right."""
        return self


class User(ABC):
    """One simulated user in one episode. It owns its audio and decides, chunk by chunk, what to say next."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._next = 0

    def next_chunk(self, heard: Action | None) -> Observation:
        """What the user does in the next chunk, after hearing the model's last action (None before the first chunk)."""
        k = self._next
        if k >= self._chunks:
            raise ValueError(f"the episode has {self._chunks} chunks: chunk {k} does not exist")
        if (heard is None) != (k == 0):
            raise ValueError(f"chunk {k}: give the action of chunk k - 1, and None before chunk 0 only")
        self._next += 1
        return self._produce(k, heard)

    @abstractmethod
    def _produce(self, k: int, heard: Action | None) -> Observation:
        """What the model observes in chunk k."""

    @abstractmethod
    def facts(self) -> Facts:
        """What is known so far; complete after the last chunk."""


@dataclass(frozen=True)
class Scenario(ABC):
    """One situation of a family. Two scenarios with one id (and one bank and config) sound the same, bit for bit."""

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

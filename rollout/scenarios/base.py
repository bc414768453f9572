"""What a scenario is, whatever its family: a reproducible situation with a simulated user who reacts to the model.

A scenario is immutable and may be shared by many rollouts; each rollout asks it for a fresh `User`. A user hears the
model's action of chunk k - 1 before it makes the audio of chunk k. After the episode the user's `Facts` say what a
scorer has to know; they are plain data and are stored with the episode. Neither users nor facts know anything of
rewards.

Families live in modules of their own and are found through `rollout.scenarios.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from rollout.chunk import Action
from rollout.speech import Split
from rollout.turn.observation import Observation


class Facts(Protocol):
    """What happened in an episode on the user's side. Times are chunk indices."""

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable form; its key "family" names the family that reads it back."""


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

"""What the loop needs of whatever rolls plays out: this process, or worker processes beside it
(`rollout.engines.workers.pool`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.engines.engine import Engine
from rollout.play import Play, play
from rollout.record.episode import Episode


class Roller(Protocol):
    """Rolls plays out under the weights last taken over. Who does it never shows in the bits."""

    def publish(self) -> None:
        """Takes over the model's present weights."""

    def play(self, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
        """An episode of each play, in their order."""


@dataclass(frozen=True)
class InProcess:
    """Rolls out here, on one engine."""

    engine: Engine

    def publish(self) -> None:
        self.engine.publish()

    def play(self, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
        return play(self.engine, plays, seed, temperature)

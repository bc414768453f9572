"""The training loop's interface for making rollouts, in this process or in worker processes
(`rollout.engines.workers.pool`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.engines.engine import Engine
from rollout.play import Play, play
from rollout.record.episode import Episode


class Roller(Protocol):
    """Makes episodes with the weights of the last `publish`. All implementations give the same bits."""

    def publish(self) -> None:
        """Copies the model's present weights to wherever episodes are sampled."""

    def play(self, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
        """One episode for each play, in order. ``seed``: the run's; it keys the sampling (`rollout.seeds`)."""


@dataclass(frozen=True)
class InProcess:
    """Makes episodes in this process, on one engine."""

    engine: Engine

    def publish(self) -> None:
        self.engine.publish()

    def play(self, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
        return play(self.engine, plays, seed, temperature)

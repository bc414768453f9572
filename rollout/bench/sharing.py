"""Time saved by making a group's rollouts as forks of one session, for a step of the quickstart.

It depends on the policy: rollouts are computed once until their tokens differ, so a trained policy, of low entropy,
saves most. Both ways give the same episodes, bit for bit (tests/rollout/test_sharing.py).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

from model.backbone.transformer import InteractionModel
from rollout.bench.timing import GROUPS, MAX_TOKENS, ROLLOUTS, seconds, step_plays
from rollout.engines.embedded import SessionEngine
from rollout.engines.session import Session
from rollout.play import play
from rollout.turn.vocabulary import Vocabulary


class UnsharedEngine(SessionEngine):
    """An engine without sharing: a fork, which must be of an empty session, is a separate session."""

    def fork(self, session: Session, key: int) -> Session:
        if session.chunks:
            raise ValueError("UnsharedEngine: only sessions that have heard nothing can be forked")
        return self.open(key, session.temperature)


@dataclass(frozen=True)
class SharingSpeed:
    """Seconds for all rollouts of a step, and the rows that the model computed."""

    shared_s: float
    separate_s: float
    shared_rows: int
    separate_rows: int

    @property
    def times(self) -> float:
        return self.separate_s / self.shared_s


def measure_sharing(model: InteractionModel, rounds: int) -> SharingSpeed:
    """The engines take turns, so that other load on the machine affects both."""
    plays, vocabulary = step_plays(), Vocabulary.of(model)
    engines = [
        kind(model, vocabulary, slots=len(plays), max_tokens=MAX_TOKENS) for kind in (SessionEngine, UnsharedEngine)
    ]
    for engine in engines:
        play(engine, plays, 0)  # warm
    rows = [int(engine.stats()["rows"]) for engine in engines]
    taken = [[seconds(partial(play, engine, plays, 0)) for engine in engines] for _ in range(rounds)]
    shared_s, separate_s = (statistics.median(column) for column in zip(*taken, strict=True))
    result = SharingSpeed(shared_s, separate_s, *rows)
    print(
        f"{GROUPS} groups of {ROLLOUTS}: {shared_s:.2f} s as forks, {separate_s:.2f} s apart, {result.times:.2f} "
        f"times; {rows[0]} rows for {rows[1]}"
    )
    return result

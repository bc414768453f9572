"""Time that a group's rollouts save by being forks of one session, in the quickstart's shape: 8 scenarios, 6 rollouts.

How much depends on the policy: rollouts are computed once for as long as they say the same, so a policy that is sure of
what it does (a trained one) saves most. Both ways play the same episodes, bit for bit (tests/rollout/test_sharing.py).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

from model.backbone.transformer import InteractionModel
from rollout.bench.text import seconds
from rollout.engines.embedded import SessionEngine
from rollout.engines.session import Session
from rollout.play import Play, play
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank

GROUPS, ROLLOUTS = 8, 6
MAX_TOKENS = 512


class UnsharedEngine(SessionEngine):
    """Computes every session by itself: a fork of a session that has heard nothing is one more such session."""

    def fork(self, session: Session, key: int) -> Session:
        if session.chunks:
            raise ValueError("UnsharedEngine: only sessions that have heard nothing can be forked")
        return self.open(key, session.temperature)


@dataclass(frozen=True)
class SharingSpeed:
    """Seconds to play all rollouts of a step, and rows that the model computed for it."""

    shared_s: float
    separate_s: float
    shared_rows: int
    separate_rows: int

    @property
    def times(self) -> float:
        return self.separate_s / self.shared_s


def measure_sharing(model: InteractionModel, rounds: int) -> SharingSpeed:
    """Plays alternate, so that a busy moment of the machine hits both."""
    bank, vocabulary = SpeechBank.load(), Vocabulary.build(model.vocab)
    items = [ScenarioConfig().in_turn(i, "train", i, bank) for i in range(GROUPS)]
    plays = [Play(item, r) for item in items for r in range(ROLLOUTS)]
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

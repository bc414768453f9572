"""Whole steps of RL while workers are killed at random moments: not one bit of an episode or a weight changes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest

from reward.source import RewardSource
from rl.config import RLConfig, TrainConfig
from rl.learner.deepspeed import Learner
from rl.rollers import start_roller
from rl.run import build_model
from rl.step import loop
from rollout.engines.workers.pool import ATTEMPTS, WorkerPool
from rollout.play import Play
from rollout.record.episode import Episode
from rollout.world.speech import SpeechBank
from tests.support.episodes import unequal_fields

KILLS = 30
CONFIG = TrainConfig(rl=RLConfig(steps=60, groups=2, rollouts=3))  # at most; as many as `KILLS` kills take
KILLS_A_STEP = ATTEMPTS - 1  # fewer than make the pool give up, whomever they hit


class Killed:
    """A roller whose workers are killed while they play, at moments drawn from a seed."""

    def __init__(self, roller: WorkerPool, seed: int) -> None:
        self.pool, self.random, self.kills = roller, random.Random(seed), 0

    def publish(self) -> None:
        self.pool.publish()

    def play(self, plays: list[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
        done = threading.Event()
        killer = threading.Thread(target=self._kill, args=(self.pool, done))
        killer.start()
        try:
            return self.pool.play(plays, seed, temperature)
        finally:
            done.set()
            killer.join()

    def _kill(self, pool: WorkerPool, done: threading.Event) -> None:
        for _ in range(KILLS_A_STEP):
            # The first ones while all are at their task, later ones also while their successors start.
            if done.wait(self.random.choice([0.02, 0.3, 1.0, 4.0]) * self.random.random()):
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(pool.pids), signal.SIGKILL)
                self.kills += 1


def train(
    bank: SpeechBank, workers: int, seed: int = 0, steps: int = CONFIG.rl.steps, kill: bool = False
) -> tuple[list[loop.StepResult], int]:
    """Every step's result, and how many workers were killed; with ``kill`` no more steps than `KILLS` kills take."""
    config = replace(CONFIG, seed=seed, rollout=replace(CONFIG.rollout, workers=workers, worker_threads=1))
    model = build_model(CONFIG)
    learner = Learner(model, config.rl.optim, config.rl.steps)
    source = RewardSource(config.scenarios, "rules", [])
    with start_roller(config, model) as roller:
        kills = 0
        if kill:
            assert isinstance(roller, WorkerPool)
            roller = Killed(roller, seed=7)
        results = []
        for result in islice(loop.steps(config, bank, roller, learner, source, None, 0, {}), steps):
            results.append(result)
            kills = roller.kills if isinstance(roller, Killed) else 0
            if kills >= KILLS:
                break
    return results, kills


def differing(one: list[loop.StepResult], other: list[loop.StepResult]) -> Iterator[str]:
    """Every field of every episode, and every step's weights, that differ."""
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.metrics["weights_digest"] != b.metrics["weights_digest"]:
            yield f"weights after step {step}"
        for x, y in zip(a.episodes, b.episodes, strict=True):
            for name in unequal_fields(x, y):
                yield f"{name} of {x.name} in step {step}"


@pytest.mark.slow
def test_killing_workers_changes_no_bit(world: None) -> None:
    bank = SpeechBank.open()
    killed, kills = train(bank, workers=2, kill=True)
    assert kills >= KILLS
    alone, _ = train(bank, workers=0, steps=len(killed))
    assert list(differing(alone, killed)) == []
    assert len({result.metrics["weights_digest"] for result in killed}) == len(killed) >= 2
    other, _ = train(bank, workers=0, seed=1, steps=2)
    assert "weights after step 1" in differing(alone[:2], other), "the control: another seed is seen"

"""Time measurement, and the rollouts that benches measure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kernels import dispatch
from kernels.tools.device_time import wait
from rollout.play import Play
from rollout.scenarios.registry import ScenarioConfig
from rollout.world.speech import SpeechBank

GROUPS, ROLLOUTS, MAX_TOKENS = 8, 6, 512  # of a step of the quickstart


class Stopwatch:
    """Seconds spent inside the functions that it wraps, each until the device has done what was asked of it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                result = call(*args, **kwargs)
                wait(dispatch.device())
                return result
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    watch = Stopwatch()
    watch.around(call)()
    return watch.seconds


def step_plays() -> list[Play]:
    """The rollouts of a step of the quickstart, [GROUPS * ROLLOUTS]."""
    bank = SpeechBank.open()
    items = [ScenarioConfig().in_turn(i, "train", i, bank) for i in range(GROUPS)]
    return [Play(item, rollout) for item in items for rollout in range(ROLLOUTS)]

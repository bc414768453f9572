"""Over-optimisation of a learned reward (the proxy): it still rises while the rules' score falls.

The signal: at ``patience`` evaluations in a row the proxy is higher, and the rules' score more than ``drop`` lower,
than at the evaluation with the best rule score so far. Both must hold: a rule score that falls together with the proxy
is a bad step, and one that stays while the proxy rises does no harm. The evaluation of the warm-started policy counts
as the first, so that a proxy which only ever did harm is noticed too. All evaluations must be on one set of scenarios:
a policy scores differently on another one.

Knows numbers only, not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from kernels.errors import MetronomeError
from model.program.ranges import Fraction, Range, check


@dataclass(frozen=True)
class WatchConfig:
    """When training on a learned reward should end."""

    drop: Fraction = 0.05  # fall of the rule score, in [0, 1], since its best evaluation
    patience: Annotated[int, Range(1, 10**6)] = 2  # number of evaluations in a row that must show the signal
    stop: bool = False  # whether the run then stops, or only reports it


@dataclass(frozen=True)
class Point:
    """Both rewards of one policy. Example: ``Point(40, 0.81, 3.2)``."""

    step: int  # finished RL steps
    rule: float  # mean score by the rules, in [0, 1]
    proxy: float  # mean learned reward of an episode, in the models' own unit


@dataclass(frozen=True)
class Alarm:
    """Over-optimisation was noticed at ``now``; ``best`` is the evaluation with the best rule score before."""

    best: Point
    now: Point

    def __str__(self) -> str:
        return (
            f"over-optimisation at step {self.now.step}: the learned reward went from {self.best.proxy:.3g} to "
            f"{self.now.proxy:.3g} since step {self.best.step} while the held-out rule score fell from "
            f"{self.best.rule:.1%} to {self.now.rule:.1%}; take the checkpoint nearest to step {self.best.step}"
        )


def alarm(held_out: Sequence[Point], config: WatchConfig) -> Alarm | None:
    """The first alarm in a run's evaluations, which are in the order of steps; None without one. Raises MetronomeError
    for a reward that is not finite, which would compare as neither higher nor lower, and for settings out of range."""
    check(config, "source.watch.")
    for point in held_out:
        if not (math.isfinite(point.rule) and math.isfinite(point.proxy)):
            raise MetronomeError(
                f"the evaluation after step {point.step} is not finite (rule score {point.rule}, learned reward "
                f"{point.proxy}), so that the watch over learned rewards can say nothing; see to the reward models"
            )
    agreeing = 0
    best: Point | None = None
    for now in held_out:
        if best is None or now.rule > best.rule:
            best = now
        agreeing = agreeing + 1 if now.proxy > best.proxy and now.rule < best.rule - config.drop else 0
        if agreeing == config.patience:
            return Alarm(best, now)
    return None

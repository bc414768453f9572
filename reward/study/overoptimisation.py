"""Over-optimisation of a learned reward: the proxy goes on rising while what it stands for falls.

The stopping signal, stated: at ``patience`` evaluations in a row the proxy is above, and the rules' score more than
``drop`` below, what they were at the evaluation with the best rule score so far. Both must hold: a rule score that
falls together with the proxy is a bad step, and one that stays while the proxy rises is no harm.
Evaluations count from the warm-started policy on, so that a proxy which only ever did harm is seen too.

Knows numbers only, not where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WatchConfig:
    """When training on a learned reward should end."""

    drop: float = 0.05  # rule score lost since the best evaluation, of 1
    patience: int = 2  # evaluations in a row that must agree
    stop: bool = False  # whether the run ends there, or only says so


@dataclass(frozen=True)
class Point:
    """Both rewards of one policy. Example: ``Point(40, 0.81, 3.2)``."""

    step: int  # finished RL steps
    rule: float  # mean score by the rules, in [0, 1]
    proxy: float  # mean score of an episode by the learned models, in their own unit


@dataclass(frozen=True)
class Alarm:
    """Over-optimisation was seen at ``now``; ``best`` is the policy to go back to."""

    best: Point
    now: Point

    def __str__(self) -> str:
        return (
            f"over-optimisation at step {self.now.step}: the learned reward went from {self.best.proxy:.3g} to "
            f"{self.now.proxy:.3g} since step {self.best.step} while the held-out rule score fell from "
            f"{self.best.rule:.1%} to {self.now.rule:.1%}; take the checkpoint nearest to step {self.best.step}"
        )


def alarm(held_out: Sequence[Point], config: WatchConfig) -> Alarm | None:
    """The first alarm in a run's evaluations, which are in order of steps."""
    agreeing = 0
    best: Point | None = None
    for now in held_out:
        if best is None or now.rule > best.rule:
            best = now
        agreeing = agreeing + 1 if now.proxy > best.proxy and now.rule < best.rule - config.drop else 0
        if agreeing == config.patience:
            return Alarm(best, now)
    return None

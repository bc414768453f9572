"""Over-optimisation of a learned reward: the proxy goes on rising while what it stands for falls.

The stopping signal, stated: at ``patience`` evaluations in a row the proxy is above, and the rules' score more than
``drop`` below, what they were at the evaluation with the best rule score so far. Both must hold: a rule score that falls
together with the proxy is a bad step, and one that stays while the proxy rises is a proxy with another scale.
Every evaluation counts from the warm-started policy on, so that a proxy which only ever did harm is seen too.

Knows numbers only, not where they come from.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RULE, PROXY = "tab:blue", "tab:orange"


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


def draw(
    training: Sequence[Point], held_out: Sequence[Point], drift: Sequence[tuple[int, float]], seen: Alarm | None
) -> bytes:
    """PNG of both rewards over training, one against the other, and how far the policy went from its reference:
    ``drift`` gives (step, nats a token)."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    over_steps, against, distance = figure.subplots(1, 3)
    _over_steps(over_steps, training, held_out, seen)
    _against(against, held_out, seen)
    distance.plot([step for step, _ in drift], [nats for _, nats in drift], color="tab:green")
    distance.set(title="distance from the warm-started policy", xlabel="RL step", ylabel="reference KL, nats a token")
    distance.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _over_steps(axes: Axes, training: Sequence[Point], held_out: Sequence[Point], seen: Alarm | None) -> None:
    twin = axes.twinx()
    for axis, field, colour in ((axes, "rule", RULE), (twin, "proxy", PROXY)):
        for points, style in ((training, {"alpha": 0.35, "linewidth": 1}), (held_out, {"marker": "o", "linewidth": 2})):
            axis.plot([p.step for p in points], [getattr(p, field) for p in points], color=colour, **style)
        axis.tick_params(axis="y", labelcolor=colour)
    axes.set(title="over training (pale: training rollouts; dots: held-out)", xlabel="RL step")
    axes.set_ylabel("score by the rules", color=RULE)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    twin.set_ylabel("learned reward of an episode", color=PROXY)
    axes.grid(alpha=0.3)
    if seen is not None:
        axes.axvline(seen.now.step, color="tab:red", linestyle="--")
        axes.annotate("signal", (seen.now.step, axes.get_ylim()[0]), color="tab:red", rotation=90, va="bottom", ha="right")


def _against(axes: Axes, held_out: Sequence[Point], seen: Alarm | None) -> None:
    axes.plot([p.proxy for p in held_out], [p.rule for p in held_out], color="tab:grey", marker="o")
    for p in held_out:
        axes.annotate(str(p.step), (p.proxy, p.rule), textcoords="offset points", xytext=(5, 4), fontsize=8)
    if seen is not None:
        for point, colour in ((seen.best, "tab:green"), (seen.now, "tab:red")):
            axes.plot(point.proxy, point.rule, "o", color=colour, markersize=10)
    axes.set(title="held-out, one against the other (labels: RL step)", xlabel="learned reward of an episode")
    axes.set_ylabel("score by the rules")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)

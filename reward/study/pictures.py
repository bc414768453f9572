"""Pictures of learned rewards, as PNG. Imports matplotlib, which takes a second: import this where one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reward.study.bestofn import Pick
from reward.study.overoptimisation import Alarm, Point

RULE, PROXY = "tab:blue", "tab:orange"


def overoptimisation(
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
    return _png(figure)


def _over_steps(axes: Axes, training: Sequence[Point], held_out: Sequence[Point], seen: Alarm | None) -> None:
    twin = axes.twinx()
    for axis, field, colour in ((axes, "rule", RULE), (twin, "proxy", PROXY)):
        for points, style in ((training, {"alpha": 0.35, "linewidth": 1}), (held_out, {"marker": "o", "linewidth": 2})):
            axis.plot([p.step for p in points], [getattr(p, field) for p in points], color=colour, **style)
    axes.set(title="over training (pale: training rollouts; dots: held-out)", xlabel="RL step")
    _scales(axes, twin, "score by the rules", "learned reward of an episode")
    if seen is not None:
        axes.axvline(seen.now.step, color="tab:red", linestyle="--")
        axes.annotate(
            "signal", (seen.now.step, axes.get_ylim()[0]), color="tab:red", rotation=90, va="bottom", ha="right"
        )


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


def best_of_n(curves: Sequence[Sequence[Pick]]) -> bytes:
    """PNG with one panel a curve: the rules' score of the learned models' pick of n, and what it could have been."""
    figure = Figure(figsize=(5 * len(curves), 4.5), layout="constrained")
    for axes, picks in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        n = [p.n for p in picks]
        errors = [math.nan if p.rule_error is None else p.rule_error for p in picks]  # NaN: no bar
        axes.errorbar(n, [p.rule for p in picks], errors, color=RULE, marker="o", capsize=3)
        axes.plot(n, [p.oracle for p in picks], color=RULE, linestyle="--", alpha=0.6)
        twin = axes.twinx()
        twin.plot(n, [p.proxy for p in picks], color=PROXY, marker="o")
        axes.set(title=f"{picks[0].family} (dashed: the rules' own pick)", xlabel="best of n")
        _scales(axes, twin, "score of the pick by the rules", "learned reward of the pick")
        axes.set_xscale("log", base=2)
        axes.set_xticks(n, [str(k) for k in n])
    return _png(figure)


def _scales(axes: Axes, twin: Axes, rule: str, proxy: str) -> None:
    """The rules' score on the left, the learned reward on the right."""
    for axis, label, colour in ((axes, rule, RULE), (twin, proxy, PROXY)):
        axis.set_ylabel(label, color=colour)
        axis.tick_params(axis="y", labelcolor=colour)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()

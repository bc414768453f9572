"""The watch over learned rewards in a run: what its records say of over-optimisation, and the picture in its report.

Everything is read from the run's records, so that a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

from reward.study.overoptimisation import Alarm, Point, WatchConfig, alarm
from rl.evaluate import HeldOut
from rl.folder import RunFolder
from rl.learner import ranks

PICTURE = "report/overoptimisation.png"


def watch(folder: RunFolder, held_out: list[Point], config: WatchConfig) -> Alarm | None:
    """Draws the run so far into its folder and returns the alarm, if there is cause for one."""
    seen = alarm(held_out, config)
    if ranks.rank() == 0:
        from reward.study.pictures import overoptimisation

        records = folder.metrics()
        training = [Point(r["step"], r["reward/score"], r["proxy/mean"]) for r in records]
        drift = [(r["step"], r["reference/kl_k1"]) for r in records]
        folder.write_bytes(PICTURE, overoptimisation(training, held_out, drift, seen))
    return seen


def evaluations(folder: RunFolder, before: HeldOut) -> list[Point]:
    """The held-out results after warm start and during RL."""
    during = [
        Point(r["step"] + 1, r["eval/held_out"], r["proxy/held_out"]) for r in folder.metrics() if "proxy/held_out" in r
    ]
    return [point(0, before), *during]


def point(step: int, found: HeldOut) -> Point:
    return Point(step, found.score[""], found.proxy[""])


def summary(seen: Alarm | None) -> dict[str, float | int | str]:
    """What summary.json says of it."""
    if seen is None:
        return {"overoptimisation/signal": 0}
    return {
        "overoptimisation/signal": 1,
        "overoptimisation/step": seen.now.step,
        "overoptimisation/best_step": seen.best.step,
    }

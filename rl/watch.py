"""Watches a run for over-optimisation of its learned rewards, and draws the picture for its report.

All its points are on one set of scenarios, those that are evaluated during RL: of the evaluations before and after RL,
which are of more scenarios, it takes the means over these alone (`rl.evaluate.WATCHED`).

Everything is read from the run's records, so that a resumed run decides as an uninterrupted one would.
"""

from __future__ import annotations

from kernels.errors import MetronomeError
from model.program import ranks
from reward.study.overoptimisation import Alarm, Point, WatchConfig, alarm
from rl.evaluate import WATCHED, HeldOut
from rl.folder import RunFolder

PICTURE = "report/overoptimisation.png"


def watch(folder: RunFolder, held_out: list[Point], config: WatchConfig) -> Alarm | None:
    """The alarm, if over-optimisation was noticed; draws the run so far into `PICTURE` in its folder. ``held_out``: the
    evaluations in order, as `evaluations` gives them."""
    seen = alarm(held_out, config)
    if ranks.rank() == 0:
        from reward.study.pictures import overoptimisation

        records = folder.metrics()
        training = [Point(r["step"], r["reward/score"], r["proxy/mean"]) for r in records]
        drift = [(r["step"], r["reference/kl_k1"]) for r in records]
        folder.write_bytes(PICTURE, overoptimisation(training, held_out, drift, seen))
    return seen


def evaluations(folder: RunFolder, before: HeldOut) -> list[Point]:
    """The held-out results of both rewards: ``before`` RL, then during it."""
    during = [
        Point(r["step"] + 1, r["eval/held_out"], r["proxy/held_out"]) for r in folder.metrics() if "proxy/held_out" in r
    ]
    return [point(0, before), *during]


def point(step: int, result: HeldOut) -> Point:
    """Both rewards after ``step`` RL steps over the watched scenarios. Raises MetronomeError when ``result`` has none:
    it is of other scenarios, or of a run without reward models."""
    if WATCHED not in result.score or WATCHED not in result.proxy:
        raise MetronomeError(
            f"the evaluation after step {step} does not say what was found in the scenarios that the watch compares: "
            "an older version began this run; start a new one under another --name"
        )
    return Point(step, result.score[WATCHED], result.proxy[WATCHED])


def summary(seen: Alarm | None) -> dict[str, float | int | str]:
    """The alarm as entries of summary.json."""
    if seen is None:
        return {"overoptimisation/signal": 0}
    return {
        "overoptimisation/signal": 1,
        "overoptimisation/step": seen.now.step,
        "overoptimisation/best_step": seen.best.step,
    }

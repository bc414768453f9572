"""A run that is told to stop when its learned reward is over-optimised stops there, says so, and does not go on."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels.errors import MetronomeError
from reward.study.overoptimisation import Alarm, Point, WatchConfig
from rl import watch
from rl.evaluate import INTERVAL, WATCHED, HeldOut, evaluate
from rl.folder import RunFolder
from rl.run import Run
from rl.train import parse
from rollout.world.base import Scenario, User
from tests.support.models import reward_model

BEFORE = HeldOut({"": 0.1, WATCHED: 0.9}, {"": 7.0, WATCHED: 1.0})


def record(step: int, rule: float, proxy: float, evaluated: bool) -> dict[str, float]:
    held_out = {"eval/held_out": rule, "proxy/held_out": proxy} if evaluated else {}
    return {"step": step, "reward/score": rule, "proxy/mean": proxy, "reference/kl_k1": 0.1, **held_out}


def test_evaluations_are_read_from_the_records(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "r", "")
    for step in range(4):
        folder.append_metrics(record(step, 0.9 - 0.1 * step, 1.0 + step, evaluated=step % 2 == 1))
    points = watch.evaluations(folder, BEFORE)
    assert points == [Point(0, 0.9, 1.0), Point(2, pytest.approx(0.8), 2.0), Point(4, pytest.approx(0.6), 4.0)]
    seen = watch.watch(folder, points, WatchConfig(drop=0.05, patience=2))
    assert seen == Alarm(points[0], points[2])
    assert (tmp_path / "r" / watch.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert watch.summary(seen)["overoptimisation/step"] == 4
    assert watch.summary(None) == {"overoptimisation/signal": 0}


def test_an_evaluation_of_other_scenarios_is_no_point() -> None:
    for result in (HeldOut({"": 0.9}, {"": 1.0}), HeldOut({"": 0.9, WATCHED: 0.9}, {})):
        with pytest.raises(MetronomeError, match="scenarios that the watch compares"):
            watch.point(0, result)


class Judge:
    """In place of reward sources: a score and a reward of each scenario that are known."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def judge(self, episodes: list[Any]) -> Any:
        values = [self.scores[e.scenario] for e in episodes]
        proxy = [SimpleNamespace(total=10 * v) for v in values]
        return SimpleNamespace(scores=[SimpleNamespace(value=v, tight=v / 2) for v in values], proxy=proxy)


class Names:
    """In place of who rolls out: an episode is its scenario's name."""

    def play(self, plays: list[Any], seed: int, temperature: float) -> list[Any]:
        return [SimpleNamespace(scenario=p.scenario.id, family=p.scenario.family) for p in plays]


class Unplayed(Scenario):
    def user(self) -> User:
        raise NotImplementedError


ITEMS = [Unplayed(family, "held_out", seed, 1) for seed in range(4) for family in ("a", "b")]
SCORES = {item.id: 0.1 * i**2 / 5 for i, item in enumerate(ITEMS)}


@pytest.mark.usefixtures("world")
def test_the_watched_mean_is_that_of_these_scenarios_alone() -> None:
    def found(items: list[Scenario], watched: int, scores: dict[str, float]) -> HeldOut:
        return evaluate(Names(), items, Judge(scores), 0, 1.0, watched)  # type: ignore[arg-type]

    whole, few = found(ITEMS, 4, SCORES), found(ITEMS[:4], 4, SCORES)
    assert whole.score[WATCHED] == few.score[""] == few.score[WATCHED] != whole.score[""]
    assert whole.proxy[WATCHED] == few.proxy[""] != whole.proxy[""]
    assert found(ITEMS, 6, SCORES).score[WATCHED] != few.score[""] and WATCHED not in found(ITEMS, 0, SCORES).score
    assert watch.point(3, whole) == Point(3, few.score[""], few.proxy[""])
    with pytest.raises(MetronomeError, match=r"held-out scenario b/held_out/1: the score by the rules is nan"):
        found(ITEMS, 4, SCORES | {"b/held_out/1": math.nan})


@pytest.mark.usefixtures("world")
def test_a_mean_has_its_interval() -> None:
    """By hand: of family a the scores 0.2 and 0.4, variance 0.02; of b three times 0.5 and once 0.9, variance 0.04."""
    items = [Unplayed(f, "held_out", seed, 1) for f, n in (("a", 2), ("b", 4)) for seed in range(n)]
    scores = dict(zip([item.id for item in items], [0.2, 0.4, 0.5, 0.5, 0.5, 0.9], strict=True))
    found = evaluate(Names(), items, Judge(scores), 0, 1.0).score  # type: ignore[arg-type]
    assert found[INTERVAL] == pytest.approx(1.96 * math.sqrt(0.02 / 2 + 0.04 / 4) / 2)
    assert found[""] == pytest.approx(0.45)
    alone = evaluate(Names(), items[1:], Judge(scores), 0, 1.0).score  # type: ignore[arg-type]
    assert INTERVAL not in alone and alone["a"] == 0.4  # of one score no interval can be given


def test_a_watch_without_scenarios_is_refused() -> None:
    learned = ["--source.models", "[somewhere]", "--source.rewards", "learned"]
    parse([*learned, "--eval.during", "1"])  # the control
    with pytest.raises(MetronomeError, match=r"eval\.during is 0"):
        parse([*learned, "--eval.during", "0"])


@pytest.mark.slow
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("stop", [True, False])
def test_a_run_stops_at_the_signal_and_stays_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: bool
) -> None:
    def seen(held_out: list[Point], config: WatchConfig) -> Alarm | None:
        return Alarm(held_out[0], held_out[2]) if len(held_out) > 2 else None

    monkeypatch.setattr(watch, "alarm", seen)
    reward_model(seed=1).save(tmp_path / "both")
    arguments = ["--runs", str(tmp_path / "runs"), "--warmstart.steps", "0", "--eval.scenarios", "2"]
    arguments += ["--rl.steps", "4", "--rl.groups", "2", "--rl.rollouts", "2", "--rl.evaluate_every", "1"]
    arguments += ["--eval.during", "1", "--source.rewards", "learned", "--source.watch.stop", str(stop).lower()]
    arguments += ["--source.models", f"[{tmp_path / 'both'}]"]
    for resume in ("false", "true"):
        config, resumes, recipe = parse([*arguments, "--resume", resume])
        run = Run(config, recipe, resumes)
        run.execute()
        assert [m["step"] for m in run.folder.metrics()] == list(range(2 if stop else 4))
        assert run.folder.latest_checkpoint()[0] == (2 if stop else 4)
        assert ("over-optimisation at step 2" in capsys.readouterr().out) == (resume == "false")

"""The stopping signal sees over-optimisation, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kernels.errors import MetronomeError
from reward.study.overoptimisation import Alarm, Point, WatchConfig, alarm
from reward.study.pictures import overoptimisation

CONFIG = WatchConfig(drop=0.05, patience=2)
PNG = b"\x89PNG\r\n"


def points(rule: list[float], proxy: list[float]) -> list[Point]:
    return [Point(20 * i, r, p) for i, (r, p) in enumerate(zip(rule, proxy, strict=True))]


def test_proxy_up_and_rule_down_for_two_evaluations() -> None:
    run = points([0.5, 0.8, 0.9, 0.8, 0.7, 0.6], [0, 1, 2, 3, 4, 5])
    assert alarm(run, CONFIG) == Alarm(best=run[2], now=run[4])
    assert alarm(run[:4], CONFIG) is None  # one is not yet enough
    assert "step 80" in str(alarm(run, CONFIG)) and "step 40" in str(alarm(run, CONFIG))


def test_a_proxy_that_only_ever_did_harm_is_seen() -> None:
    run = points([0.5, 0.4, 0.3], [0, 1, 2])
    assert alarm(run, CONFIG) == Alarm(run[0], run[2])


def test_no_alarm() -> None:
    assert alarm([], CONFIG) is None
    assert alarm(points([0.5, 0.7, 0.9, 0.95], [0, 1, 2, 3]), CONFIG) is None  # both rise
    assert alarm(points([0.5, 0.9, 0.6, 0.5], [0, 3, 2, 1]), CONFIG) is None  # both fall: a bad step, no hack
    assert alarm(points([0.5, 0.9, 0.86, 0.86, 0.86], [0, 1, 2, 3, 4]), CONFIG) is None  # fell by less than drop
    assert alarm(points([0.5, 0.9, 0.8, 0.89, 0.8], [0, 1, 2, 3, 4]), CONFIG) is None  # not twice in a row


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (WatchConfig(patience=0), r"watch\.patience"), (WatchConfig(patience=-1), r"watch\.patience"),
        (WatchConfig(drop=math.nan), r"watch\.drop"), (WatchConfig(drop=-0.1), r"watch\.drop"),
        (WatchConfig(drop=math.inf), r"watch\.drop"),
    ],
)  # fmt: skip
def test_a_watch_that_could_not_ring_or_rings_at_once_is_refused(config: WatchConfig, says: str) -> None:
    for run in ([], points([0.9, 0.5, 0.3], [1, 2, 3])):
        with pytest.raises(MetronomeError, match=says):
            alarm(run, config)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_points_that_are_no_numbers_are_refused(bad: float) -> None:
    run = points([0.9, 0.5, 0.3], [1, 2, 3])
    assert alarm(run, CONFIG) is not None  # the control
    for which in ("rule", "proxy"):
        with pytest.raises(MetronomeError, match="after step 20 is not finite"):
            alarm([run[0], replace(run[1], **{which: bad}), run[2]], CONFIG)


def test_a_new_best_begins_anew() -> None:
    run = points([0.8, 0.7, 0.9, 0.8, 0.8], [0, 1, 2, 3, 3])
    assert alarm(run, CONFIG) == Alarm(run[2], run[4])


def test_picture_is_drawn_with_and_without_an_alarm() -> None:
    run = points([0.5, 0.9, 0.7, 0.6], [0, 1, 2, 3])
    with_alarm = overoptimisation(run, run, [(0, 0.0), (1, 0.1)], alarm(run, CONFIG))
    without = overoptimisation(run, run, [(0, 0.0), (1, 0.1)], None)
    assert with_alarm.startswith(PNG) and without.startswith(PNG) and with_alarm != without
    assert overoptimisation([], run[:1], [], None).startswith(PNG)

"""Tracking may be off, work, fail or hang: the run neither stops nor waits for it; and each step is kept once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import MetronomeError
from rl.tracking import backends
from rl.tracking import tracker as tracker_module
from rl.tracking.settings import TrackingConfig, check
from rl.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[2]
ON = TrackingConfig(trackers=("wandb",))


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type = name, type
        self.files: list[tuple[str, str]] = []

    def add_file(self, path: str, policy: str) -> None:
        self.files.append((path, policy))


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False
        self.artifacts: list[Artifact] = []

    def log_artifact(self, artifact: Artifact) -> None:
        self.artifacts.append(artifact)

    def log(self, metrics: dict[str, Any], step: int, commit: bool) -> None:
        assert commit
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


def install(monkeypatch: pytest.MonkeyPatch, init: Any, config: dict[str, Any] | None = None) -> None:
    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    fake.Settings = dict  # type: ignore[attr-defined]
    fake.Artifact = Artifact  # type: ignore[attr-defined]
    kept = {} if config is None else config
    fake.config = types.SimpleNamespace(update=lambda new, **_: kept.update(new))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)


def test_off_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rl.tracking.settings import *; from rl.tracking.tracker import *; "
        "check(TrackingConfig()); t = Tracker(TrackingConfig(), 'a', Path(sys.argv[1]), {}); t.log(0, {}); t.close(); "
        "assert not {'wandb', 'accelerate', 'matplotlib', 'rl.tracking.samples'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert not list(tmp_path.iterdir())


def test_metrics_arrive_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, asked, config = FakeRun(), {}, {}

    def init(**arguments: Any) -> FakeRun:
        asked.update(arguments)
        return run

    install(monkeypatch, init, config)
    tracker = Tracker(ON, "a", tmp_path, {"seed": 3, "rl": {"steps": 20, "models": ()}})
    for step in range(20):
        tracker.log(step, {"reward/mean": step})
    report = tmp_path / "audit/report.html"
    report.parent.mkdir()
    report.write_text("a report")
    tracker.artifact(report.parent)
    tracker.close()
    assert [(a.name, a.type, a.files) for a in run.artifacts] == [("audit", "report", [(str(report), "immutable")])]
    assert run.logged == [(step, {"reward/mean": step}) for step in range(20)] and run.finished
    assert config == {"seed": 3, "rl.steps": 20, "rl.models": "()"}
    assert (asked["mode"], asked["name"], asked["dir"]) == ("offline", "a", str(tmp_path))
    assert asked["id"] == (tmp_path / "tracking/id").read_text()


def test_a_run_that_was_renamed_is_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def resumed(folder: Path) -> list[tuple[int, dict[str, Any]]]:
        run = FakeRun()
        install(monkeypatch, lambda **given: asked.append(given) or run)
        tracker = Tracker(ON, folder.name, folder, {})
        tracker.log(0, {"x": 1})
        tracker.close()
        return run.logged

    (tmp_path / "a").mkdir()
    assert resumed(tmp_path / "a") == [(0, {"x": 1})]
    moved = (tmp_path / "a").rename(tmp_path / "b")
    resumed(moved)
    assert (moved / "tracking/journal.jsonl").read_text().count("\n") == 1
    (moved / "tracking/id").write_text("")  # the control: as a crash in the middle of writing it would leave it
    resumed(moved)
    assert [given["name"] for given in asked] == ["a", "a", "a"]
    assert asked[0]["id"] == asked[1]["id"] != asked[2]["id"] and len(asked[2]["id"]) == 8
    assert [given["dir"] for given in asked] == [str(tmp_path / "a"), str(moved), str(moved)]


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "3",
        '{"step": -1, "metrics": {}}',
        '{"step": "1", "metrics": {}}',
        '{"step": 1, "metrics": {"x": NaN}}',
        "\xff",
    ],
)
def test_a_damaged_journal_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    run = FakeRun()
    install(monkeypatch, lambda **_: run)
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking/journal.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.warns(UserWarning, match=r"tracking/ cannot be used: .*journal\.jsonl, line 1"):
        tracker = Tracker(ON, "a", tmp_path, {})
    tracker.log(0, {"x": 1})
    tracker.close()
    assert run.logged == [(0, {"x": 1})]


def test_a_folder_that_was_moved_away_is_not_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, lambda **_: FakeRun())
    (tmp_path / "a").mkdir()
    tracker = Tracker(ON, "a", tmp_path / "a", {})
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.warns(UserWarning, match="tracking/ cannot be used"):
        tracker.log(0, {"x": 1})
    tracker.close()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    run = FakeRun()
    if where != "init":
        monkeypatch.setattr(run, where, fail)
    install(monkeypatch, fail if where == "init" else lambda **_: run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = Tracker(ON, "a", tmp_path, {})
        for step in range(3):
            tracker.log(step, {})
        tracker.close()
    assert [str(w.message) for w in caught] == ["tracking: wandb failed, off from here on: OSError: no route to host"]


def test_episodes_that_cannot_be_drawn_end_the_tracker_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def draw() -> Any:
        raise ZeroDivisionError("nothing to draw")

    run = FakeRun()
    install(monkeypatch, lambda **_: run)
    tracker = Tracker(ON, "a", tmp_path, {})
    with pytest.warns(UserWarning, match="wandb failed, off from here on: ZeroDivisionError"):
        tracker.log(0, {}, draw)
        tracker.close()
    assert run.logged == []


def test_a_disk_that_refuses_the_journal_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = FakeRun()
    install(monkeypatch, lambda **_: run)
    (tmp_path / "tracking").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="tracking/ cannot be used"):
        tracker = Tracker(ON, "a", tmp_path, {})
        tracker.log(0, {"x": 1})
        tracker.close()
    assert run.logged == [(0, {"x": 1})]


def test_a_hang_delays_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = threading.Event()
    install(monkeypatch, lambda **_: release.wait() and FakeRun())
    monkeypatch.setattr(tracker_module, "CLOSE_TIMEOUT_S", 0.2)
    start = time.perf_counter()
    tracker = Tracker(ON, "a", tmp_path, {})
    tracker.log(0, {})
    assert time.perf_counter() - start < 5  # waiting would have no end
    with pytest.warns(UserWarning, match="did not finish"):
        tracker.close()
    release.set()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrackingConfig(("wandbb",)), "no tracker is called 'wandbb'; choose from .*tensorboard.*wandb"),
        (TrackingConfig(("swanlab",)), "swanlab is not installed: `pip install swanlab`"),
    ],
)
def test_what_cannot_work_is_refused(config: TrackingConfig, message: str) -> None:
    with pytest.raises(MetronomeError, match=message):
        check(config)


def test_what_would_leave_the_machine_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["swanlab", "wandb"])
    check(TrackingConfig(("wandb", "swanlab"), mode="online"))
    with pytest.raises(MetronomeError, match="swanlab cannot be held to this machine"):
        check(TrackingConfig(("swanlab",)))


def test_an_unknown_tracker_ends_a_run_before_it_writes(tmp_path: Path) -> None:
    from rl.run import Run
    from rl.train import parse

    config, resume, text = parse(["--runs", str(tmp_path / "runs"), "--tracking.trackers", "[wandbb]"])
    with pytest.raises(MetronomeError, match="wandbb"):
        Run(config, text, resume)
    assert not list(tmp_path.iterdir())


LOG = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from rl.tracking.samples import Sample
from rl.tracking.settings import TrackingConfig
from rl.tracking.tracker import Tracker

kind, folder, first, last, ending = sys.argv[1:]

def sampled():
    sound = np.sin(np.arange(8000, dtype=np.float32) / 10)
    return [Sample("timespeak", "timespeak/train/0#0: four", np.zeros((40, 60, 3), np.uint8), sound)]

tracker = Tracker(TrackingConfig(trackers=(kind,)), Path(folder).name, Path(folder), {"seed": 0, "rl": {"steps": 20}})
for step in range(int(first), int(last)):
    tracker.log(step, {"step": step, "reward/mean": 0.5 * step, "digest": "ab"}, sampled if step in (3, 12) else None)
if ending == "killed":
    while not all(thread._queue.empty() for thread in tracker._threads):
        time.sleep(0.1)
    time.sleep(2)  # so that the tracker has done what it does at once with all that it was given
    os.kill(os.getpid(), signal.SIGKILL)
audit = Path(folder) / "audit"
audit.mkdir()
(audit / "report.html").write_text("a report")
tracker.artifact(audit)
tracker.close()
"""


def log(kind: str, folder: Path, first: int, last: int, ending: str) -> None:
    """Steps ``first`` … ``last`` - 1 of a run, which is killed or ends."""
    done = subprocess.run(
        [sys.executable, "-c", LOG, kind, str(folder), str(first), str(last), ending],
        cwd=ROOT,
        env=os.environ | {"TRACKIO_DIR": str(folder / "trackio")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (-9 if ending == "killed" else 0), done.stderr
    assert "failed" not in done.stderr and (kind == "trackio" or done.stdout == "")


def wandb_steps(folder: Path) -> list[int]:
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.name for path in parts}) == 1, "every part is of one run"
    return [
        step for path in parts for step, values in backends.wandb_history(path) if values["reward/mean"] == 0.5 * step
    ]


def tensorboard_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in read.Images("episode/timespeak")][-1] == 12
    assert read.Audio("heard/timespeak")[-1].sample_rate == 16000
    return [event.step for event in read.Scalars("reward/mean") if event.value == 0.5 * event.step]


def trackio_steps(folder: Path) -> list[int]:
    import json
    import sqlite3

    with sqlite3.connect(folder / "trackio/metronome.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert {"episode/timespeak", "heard/timespeak"} <= set(json.loads(rows[12][1]))
    return [step for step, values in rows if json.loads(values)["reward/mean"] == 0.5 * step]


READERS: dict[str, Callable[[Path], list[int]]] = {
    "wandb": wandb_steps,
    "tensorboard": tensorboard_steps,
    "trackio": trackio_steps,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_a_killed_run_goes_on_with_each_step_once(kind: str, tmp_path: Path) -> None:
    """Ten steps, killed; moved and renamed; resumed from a checkpoint at the sixth. The libraries are the real ones,
    offline."""
    pytest.importorskip(kind)
    (tmp_path / "a").mkdir()
    log(kind, tmp_path / "a", 0, 10, "killed")
    (tmp_path / "runs").mkdir()
    moved = (tmp_path / "a").rename(tmp_path / "runs/b")
    log(kind, moved, 6, 14, "ended")
    assert READERS[kind](moved) == list(range(14))


@pytest.mark.slow
def test_without_the_journal_steps_are_lost_or_doubled(tmp_path: Path) -> None:
    """The control: the same with the journal taken away between the two."""
    log("wandb", tmp_path, 0, 10, "killed")
    (tmp_path / "tracking/journal.jsonl").unlink()
    log("wandb", tmp_path, 6, 14, "ended")
    assert wandb_steps(tmp_path) != list(range(14))


@pytest.mark.slow
def test_wandb_keeps_pictures_and_sound(tmp_path: Path) -> None:
    log("wandb", tmp_path, 0, 5, "ended")
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    values = dict(backends.wandb_history(path))
    kinds = {step: {v for k, v in kept.items() if k.endswith("/_type")} for step, kept in values.items()}
    assert kinds == {0: set(), 1: set(), 2: set(), 3: {"image-file", "audio-file"}, 4: set()}
    media = path.parent / "files/media"
    assert list(media.glob("images/episode/timespeak_3_*.png")) and list(media.glob("audio/heard/timespeak_3_*.wav"))

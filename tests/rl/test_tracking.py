"""Tracking may be off, work, fail or hang: the run neither stops nor waits for it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from rl import tracking
from rl.tracking import Tracker, TrackingConfig

ROOT = Path(__file__).resolve().parents[2]
ON = TrackingConfig(wandb=True)


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

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


def install(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    fake.Settings = dict  # type: ignore[attr-defined]
    fake.Artifact = Artifact  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)


def test_off_imports_nothing() -> None:
    code = (
        "import sys; from pathlib import Path; from rl.tracking import *; "
        "t = Tracker(TrackingConfig(), 'a', Path('.'), {}); t.log(0, {}); t.close(); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_metrics_arrive_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, asked = FakeRun(), {}

    def init(**arguments: Any) -> FakeRun:
        asked.update(arguments)
        return run

    install(monkeypatch, init)
    tracker = Tracker(ON, "a", tmp_path, {"seed": 3})
    for step in range(20):
        tracker.log(step, {"reward/mean": step})
    report = tmp_path / "audit/report.html"
    report.parent.mkdir()
    report.write_text("a report")
    tracker.artifact(report.parent)
    tracker.close()
    assert [(a.name, a.type, a.files) for a in run.artifacts] == [("audit", "report", [(str(report), "immutable")])]
    assert run.logged == [(step, {"reward/mean": step}) for step in range(20)] and run.finished
    assert (asked["mode"], asked["name"], asked["config"], asked["dir"]) == ("offline", "a", {"seed": 3}, str(tmp_path))


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


def test_a_hang_delays_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = threading.Event()
    install(monkeypatch, lambda **_: release.wait() and FakeRun())
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.2)
    start = time.perf_counter()
    tracker = Tracker(ON, "a", tmp_path, {})
    tracker.log(0, {})
    assert time.perf_counter() - start < 5  # waiting would have no end
    with pytest.warns(UserWarning, match="did not finish"):
        tracker.close()
    release.set()


@pytest.mark.slow
def test_the_real_library_writes_offline(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rl.tracking import *; "
        "t = Tracker(TrackingConfig(wandb=True), 'a', Path(sys.argv[1]), {'seed': 0}); "
        "[t.log(s, {'reward/mean': 0.5}) for s in range(3)]; p = Path(sys.argv[1]) / 'audit'; p.mkdir(); "
        "(p / 'report.html').write_text('a report'); t.artifact(p); t.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert "failed" not in done.stderr and done.stdout == ""

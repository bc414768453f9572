"""vLLM's own process dies, stops, hangs or loses its parent: it is named in time, and nothing of it stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.errors import MetronomeError
from rollout.engines.session import Session
from rollout.turn.observation import audio_observations
from rollout.turn.vocabulary import Vocabulary
from tests.model.test_lifeline import ends, runs
from tests.support.models import fresh_model
from tests.support.settings import ROOT

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from rollout.engines.vllm import guard  # noqa: E402
from rollout.engines.vllm.engine import VllmEngine  # noqa: E402
from rollout.engines.vllm.guard import run_engine_core  # noqa: E402
from rollout.engines.vllm.process import FOLDER, start_folder  # noqa: E402

SOUND = audio_observations(torch.zeros(1, 3200))


def start(timeout_s: float = 600.0) -> VllmEngine:
    model = fresh_model(dtype=torch.float32)
    vocabulary = Vocabulary.build(model.vocab)
    return VllmEngine(model, vocabulary, slots=2, max_tokens=200, worker_process=True, timeout_s=timeout_s)


def process_of(engine: VllmEngine) -> int:
    pid: int = engine.core.client.resources.engine_manager.processes[0].pid
    return pid


@pytest.fixture
def engine() -> Iterator[VllmEngine]:
    engine = start()
    yield engine
    engine.core.close()


def named(engine: VllmEngine, fate: str, sessions: list[Session]) -> None:
    """Every session's next input says what became of vLLM's process, and the session is closed."""
    for session in sessions:
        with pytest.raises(MetronomeError, match=rf"vLLM's process \(pid {process_of(engine)}\) {fate}.*--resume"):
            engine.append([session], SOUND)
        assert session.closed
    with pytest.raises(MetronomeError, match=fate):
        engine.publish()
    assert engine.free == 2 and not engine.core.open
    assert ends(process_of(engine), 5)


def test_one_that_is_killed_is_named(engine: VllmEngine) -> None:
    sessions = [engine.open(1), engine.open(2)]
    for session in sessions:
        engine.append([session], SOUND)
    os.kill(process_of(engine), signal.SIGKILL)
    begin = time.monotonic()
    named(engine, "was killed by SIGKILL", sessions)
    assert time.monotonic() - begin < 5


def test_one_that_is_stopped_is_named_unless_it_goes_on(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert guard.STOPPED_S < 20
    monkeypatch.setattr(guard, "STOPPED_S", 2.0)
    sessions = [engine.open(1), engine.open(2)]
    pid = process_of(engine)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(4)  # nobody waits for it
    with subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {pid}"]):
        assert engine.append(sessions, [*SOUND, *SOUND])
    os.kill(pid, signal.SIGSTOP)
    named(engine, "was stopped by a signal and has not gone on for 2 s", sessions)


def test_no_answer_in_time_is_named(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = engine.core._guard
    assert watch is not None
    monkeypatch.setattr(watch, "_timeout_s", 1.0)
    with pytest.raises(MetronomeError, match="gave no answer within 1 s"), watch.waiting():
        engine.core.client.get_output()  # nothing was asked for


def test_a_process_that_does_not_get_ready_is_given_up() -> None:
    before = len(multiprocessing.active_children())
    with pytest.raises(MetronomeError, match=r"vLLM's process was not ready after 0\.5 s"):
        start(timeout_s=0.5)
    assert len(multiprocessing.active_children()) == before
    assert not list(Path(tempfile.gettempdir()).glob(f"{FOLDER}{os.getpid()}-*"))


def slow_to_connect(*args: object, **kwargs: object) -> None:
    """vLLM's program, on a machine that does not let it look for the socket of its answers at once."""
    from vllm.v1.engine.core import EngineCoreProc

    at_once = EngineCoreProc.process_output_sockets

    def later(*args: object, **kwargs: object) -> None:
        time.sleep(2)
        at_once(*args, **kwargs)

    EngineCoreProc.process_output_sockets = later  # type: ignore[method-assign]
    run_engine_core(*args, **kwargs)


def test_one_that_connects_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was ready, but not yet at the socket, when the folder of the sockets was removed: then no answer came."""
    monkeypatch.setattr(guard, "run_engine_core", slow_to_connect)
    engine = start(timeout_s=60.0)
    session = engine.open(1)
    engine.append([session], SOUND)
    assert session.chunks == 1
    engine.core.close()


LEARNER = """
from tests.rollout.vllm.test_process import process_of, start, time
if __name__ == "__main__":
    engine = start()
    print("ready", process_of(engine), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("stop", [False, True])
def test_it_ends_with_the_learner_and_leaves_nothing(stop: bool) -> None:
    folder = tempfile.TemporaryDirectory(dir="/tmp")
    shared = set(os.listdir("/dev/shm"))
    environment = os.environ | {"TMPDIR": folder.name, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LEARNER]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as learner:
        assert learner.stdout is not None
        pid = int(next(line for line in learner.stdout if line.startswith("ready")).split()[1])
        assert runs(pid)
        if stop:
            os.kill(pid, signal.SIGSTOP)
        learner.send_signal(signal.SIGKILL if stop else signal.SIGTERM)
        learner.wait()
        assert ends(pid, 10)
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if "metronome" in name]
    assert [path.name for path in Path(folder.name).iterdir() if "vllm" in path.name or path.is_socket()] == []
    folder.cleanup()


def test_what_a_killed_start_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, other = tmp_path / f"{FOLDER}{ended.pid}-abc", tmp_path / f"{FOLDER}{os.getppid()}-abc"
    for folder in (left, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    with start_folder(False) as own:
        assert own.is_dir() and not left.exists()
        assert other.is_dir(), "its owner runs"
    assert list(tmp_path.iterdir()) == [other]

"""What dies, stops or is left over is named, and nothing outlives who has started it: real launchers, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.program.heartbeat import Heartbeat

ROOT = Path(__file__).resolve().parents[2]
SILENT_S = 4.0
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
COMMAND = f"""
import os, sys, time
from pathlib import Path
from model.program import ranks

def main():
    ranks.join(silent_s={SILENT_S})
    ranks.gather("all are here")
    Path(sys.argv[1], f"pid{{ranks.rank()}}").write_text(str(os.getpid()))
    if sys.argv[2] == "parts":
        time.sleep({3 * SILENT_S} * ranks.rank())
    elif sys.argv[2] == "sums":
        end = time.monotonic() + 600
        while time.monotonic() < end:
            ranks.gather("still here")
            time.sleep(0.1)
    elif sys.argv[2] == "computes":
        # One long step of rank 1, while rank 0 waits for its part.
        end = time.monotonic() + {2 * SILENT_S} * ranks.rank()
        while time.monotonic() < end:
            sum(range(100_000))
        ranks.gather("done")
    ranks.leave()
"""


@contextmanager
def launched(folder: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """Two processes in the state ``what`` of `COMMAND`; waits until both run."""
    (folder / "some_command.py").write_text(COMMAND)
    (folder / "start.py").write_text("from model.program.startup import run_command\nrun_command('some_command')\n")
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "METRONOME_BACKEND": "reference"}
    command = [*LAUNCHER, "-m", "start", str(folder), what]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: all((folder / f"pid{r}").exists() for r in range(2)) or process.poll() is not None, 120)
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(happens: Callable[[], bool], within_s: float) -> float:
    """Seconds until it happened."""
    start = time.monotonic()
    while not happens():
        assert time.monotonic() - start < within_s, "it never happened"
        time.sleep(0.1)
    return time.monotonic() - start


def pids(folder: Path) -> list[int]:
    return [int((folder / f"pid{r}").read_text()) for r in range(2)]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_stopped_process_is_named_and_the_run_ends(tmp_path: Path, silent: int) -> None:
    with launched(tmp_path, "sums") as launcher:
        pid = pids(tmp_path)[silent]
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        error = launcher.communicate(timeout=SILENT_S + 30)[1]
        assert time.monotonic() - start < SILENT_S + 15
        assert launcher.returncode != 0
        assert error.count(f"process {silent} of this run (pid {pid} on ") == 2, "once, and in the launcher's report"
        assert not any(map(runs, pids(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["computes", "parts"])
def test_control_long_work_and_an_early_end_name_nobody(tmp_path: Path, what: str) -> None:
    with launched(tmp_path, what) as launcher:
        error = launcher.communicate(timeout=100)[1]
    assert launcher.returncode == 0, error
    assert "not answered" not in error and "Warning" not in error, error


@pytest.mark.slow
def test_learners_end_with_their_launcher_even_stopped_ones(tmp_path: Path) -> None:
    with launched(tmp_path, "sums") as launcher:
        learners = pids(tmp_path)
        os.kill(learners[1], signal.SIGSTOP)
        launcher.kill()
        wait_for(lambda: not any(map(runs, learners)), 10)


def test_a_heartbeat_that_stops_closes_its_socket() -> None:
    heartbeat = Heartbeat(0, ("127.0.0.1", 9), lambda place: [place])
    assert heartbeat._socket.fileno() >= 0, "the control"
    heartbeat.stop()
    assert heartbeat._socket.fileno() == -1

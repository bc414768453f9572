"""A process that follows its parent ends when that is killed; the launcher's variables are read whole or refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernels.errors import MetronomeError
from model.program import lifeline
from model.program.launched import Launched, local_world
from tests.support.settings import ROOT

FOLLOWS = "from model.program.lifeline import follow; follow(os.getppid())"
BY_THREAD = "import model.program.lifeline as l; l._started_by_main_thread = lambda _: False; l.follow(os.getppid())"
PARENT = """
import subprocess, sys, threading, time
start = lambda: subprocess.Popen([sys.executable, "-c", {child!r}], stdout=sys.stdout)
if {thread}:
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
time.sleep(60)
"""


@contextmanager
def family(how: str, thread: bool = False) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A parent process and the id of a child that has done ``how``, started by the parent's main thread or another."""
    child = f"import os, time\n{how}\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    program = PARENT.format(child=child, thread=thread)
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        yield parent, pid
    finally:
        if runs(pid):
            os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.communicate()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not runs(pid)


@pytest.mark.parametrize(("how", "thread"), [(FOLLOWS, False), (FOLLOWS, True), (BY_THREAD, False)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent(how: str, thread: bool, number: signal.Signals) -> None:
    with family(how, thread) as (parent, pid):
        assert runs(pid), "it outlives the thread that has started it"
        parent.send_signal(number)
        parent.wait()
        assert ends(pid, 5)


def test_also_when_it_is_stopped() -> None:
    with family(FOLLOWS) as (parent, pid):
        assert not lifeline.stopped(pid)
        os.kill(pid, signal.SIGSTOP)
        while not lifeline.stopped(pid):
            time.sleep(0.01)
        parent.kill()
        parent.wait()
        assert ends(pid, 5)


def test_control_a_child_that_follows_nobody_lives_on() -> None:
    with family("") as (parent, pid):
        parent.kill()
        parent.wait()
        assert not ends(pid, 3)


def test_only_a_launchers_processes_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[int] = []
    monkeypatch.setattr(lifeline, "follow", followed.append)
    for name in (*lifeline.LAUNCHED, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    lifeline.follow_launcher()
    assert followed == []
    monkeypatch.setenv(lifeline.LAUNCHED[0], "none")
    lifeline.follow_launcher()
    assert followed == [os.getppid()]


WHOLE = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_what_a_launcher_says() -> None:
    assert Launched.read(WHOLE) == Launched(
        rank=1, local_rank=0, world=2, local_world=2, address="127.0.0.1", port=29500
    )
    for nobody in ({}, {"MASTER_ADDR": "somewhere", "MASTER_PORT": "x"}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        assert Launched.read(nobody) is None


def test_how_many_are_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WHOLE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "nonsense")
    assert local_world() == 1, "without a launcher, nobody has said it"
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    for value in ("nonsense", "0", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        with pytest.raises(MetronomeError, match=r"LOCAL_WORLD_SIZE=.*: a number from 1 to 2"):
            local_world()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert local_world() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert local_world() == 2


@pytest.mark.parametrize("name", WHOLE)
def test_a_variable_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(MetronomeError, match=rf"but not {name}\. .*unset "):
        Launched.read({k: v for k, v in WHOLE.items() if k != name})


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "-1", "2x", "٣", "1e0", "9" * 400, "99999999"])
def test_a_variable_that_is_no_such_number_is_named(name: str, value: str) -> None:
    with pytest.raises(MetronomeError, match=rf"{name}=.*: a number from .*unset ") as caught:
        Launched.read(WHOLE | {name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["", "nosuch.invalid", "٣", "9" * 400])
def test_an_address_of_no_machine_is_named(value: str) -> None:
    launched = Launched.read(WHOLE | {"MASTER_ADDR": value})
    assert launched is not None
    with pytest.raises(MetronomeError, match=r"MASTER_ADDR=.*no machine of that name"):
        launched.check_address()


def test_a_leftover_variable_alone_is_refused() -> None:
    with pytest.raises(MetronomeError, match="has RANK='0', but not LOCAL_RANK, WORLD_SIZE"):
        Launched.read({"RANK": "0"})

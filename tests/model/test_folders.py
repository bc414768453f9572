"""One writer at a time: a lock is refused in one line that names its holder, freed with its process and never stale."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kernels.errors import MetronomeError
from model.program import folders
from model.program.folders import locate, locked

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from model.program import folders
with folders.locked(Path(sys.argv[1])):
    if sys.argv[2:] == ["inherit"]:
        folders._held.clear()
    forks = sys.argv[2:] in (["fork"], ["inherit"])
    if forks and os.fork() == 0:
        print("held", flush=True)
        time.sleep(600)
    if sys.argv[2:] == ["exec"]:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    if not forks:
        print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: str | Path, *how: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock; it and what it started are killed at the block's end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *how],
        cwd=cwd or ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def is_free(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except MetronomeError:
        return False


def test_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    folder = tmp_path / "runs/a"
    with holder(folder) as other:
        with pytest.raises(MetronomeError) as error, locked(folder):
            pass
        assert f"runs/a is being written by process {other.pid} on " in str(error.value)
        assert "\n" not in str(error.value)
        assert is_free(tmp_path / "runs/b") and is_free(folder / "audit"), "the control: other folders"
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
        assert is_free(folder)
    assert not list(tmp_path.iterdir()), "nothing is left, not even the folder that was made for the lock"


@pytest.mark.parametrize("how", ["", "fork", "exec", "inherit"])
def test_a_killed_holder_leaves_no_lock_whatever_it_started(tmp_path: Path, how: str) -> None:
    with holder(tmp_path / "a", *([how] if how else [])) as other:
        assert not is_free(tmp_path / "a")
        other.kill()
        other.wait()
        assert (tmp_path / ".a.lock").exists(), "the control: its file is still there"
        assert is_free(tmp_path / "a") == (how != "inherit"), "the control: a child that were not told would keep it"


def test_one_folder_under_many_names(tmp_path: Path) -> None:
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs/x")
    (tmp_path / "other").symlink_to("runs")
    with holder("./x/../x", cwd=tmp_path / "runs"):
        for name in ("runs/x", "runs/./x", "runs/y/../x", "link", "other/x"):
            assert not is_free(tmp_path / name), name
        (tmp_path / "runs/x").rmdir()  # deleted while it is locked
        assert not is_free(tmp_path / "runs/x")
        assert is_free(tmp_path / "runs/y")


def test_waiting(tmp_path: Path) -> None:
    with holder(tmp_path / "a") as other:
        start = time.monotonic()
        with pytest.raises(MetronomeError, match="being written"), locked(tmp_path / "a", wait_s=0.3):
            pass
        assert time.monotonic() - start >= 0.3
        assert other.stdin is not None
        other.stdin.close()  # ends, while we wait
        with locked(tmp_path / "a", wait_s=60):
            pass


def test_the_same_process_has_one_lock_too(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), pytest.raises(MetronomeError, match=f"process {os.getpid()} on"):
        with locked(tmp_path / "a"):
            pass
    assert is_free(tmp_path / "a")


def test_an_error_in_the_block_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a/b/c"):
        (tmp_path / "a/b/c").mkdir()  # by its user: stays
        raise ZeroDivisionError
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["a", "a/b", "a/b/c"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(MetronomeError, match=f"cannot be locked \\({os.strerror(number)}\\)"), locked(tmp_path / "a"):
        pass
    assert not folders._held


def test_where_only_the_folder_itself_can_be_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a volume that is mounted into a container."""
    folder, opened = tmp_path / "a", os.open

    def refuse(path: Path, *rest: int, **more: int) -> int:
        if Path(path).parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MetronomeError, match="cannot be locked"), locked(folder):
        pass
    folder.mkdir()
    with locked(folder):
        assert [p.name for p in folder.iterdir()] == [".lock"] and not is_free(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("place", ["/proc/a", "/proc/a/b", "/dev/null/a", "loop/a", "file/a", "taken", "\0"])
def test_places_that_cannot_be_locked(tmp_path: Path, place: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    (tmp_path / ".taken.lock").mkdir()
    with pytest.raises(MetronomeError) as error, locked(tmp_path / place):
        pass
    assert "cannot be locked" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../a", "a/b", "a/", "/a", ".hidden", "a b", "a\n", "a\0", "ä", "-a", "_", "a" * 101),
        *("a" * 5000, ".a.lock", ".step_000001.partial", "~", "$HOME", "a\\b", "a\u202eb"),
    ],
)
def test_names_that_are_no_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(MetronomeError, match="cannot name a run's folder") as error:
        locate(tmp_path, name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "a" * 100, "0", "x.lock", "a..b"])
def test_names_that_are(tmp_path: Path, name: str) -> None:
    assert locate(tmp_path / "runs", name) == tmp_path / "runs" / name
    with locked(locate(tmp_path / "runs", name)):
        pass
    assert not list(tmp_path.iterdir())


def test_runs_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for runs in ("", "file", "file/runs", "/dev/null", "/proc", "a\0", "dangling"):
        with pytest.raises(MetronomeError, match=r"^runs '") as error:
            locate(tmp_path / runs if runs and not runs.startswith("/") else runs, "a")
        assert "\n" not in str(error.value)
    with pytest.raises(MetronomeError, match=r"^name '.*file': .*no folder"):
        locate(tmp_path, "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]


def test_what_is_there_and_takes_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MetronomeError, match="file is no folder; give another path"), locked(tmp_path / "file"):
        raise AssertionError("the work was begun")
    (tmp_path / "folder").mkdir()
    with locked(tmp_path / "folder"), locked(tmp_path / "none yet"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]

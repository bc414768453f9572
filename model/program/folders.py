"""Folders that a command writes: one rule for their names, and one writer at a time.

A lock is a file beside the folder, ``runs/.quickstart.lock`` for ``runs/quickstart``, locked by ``flock``; it names its
process. The kernel frees it when its process ends, however it ends, so a lock is never stale: a file that a killed
process left is taken over. Processes that the holder starts do not inherit it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program.outputs import check_folder, problem_of_writing
from model.program.ranges import shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HOLDER = re.compile(r"process \d+ on [\w.-]+")
POLL_S = 0.2

_held: set[int] = set()
"""Handles of the locks of this process."""


def locate(runs: str | Path, name: str) -> Path:
    """The folder of the run ``name``. Raises MetronomeError for a name that cannot name a folder within ``runs``, and
    when ``runs`` or the folder is no folder or cannot be written into."""
    if problem := RunName().problem(name):
        raise MetronomeError(f"name is {shown(name)}: {problem}")
    check_folder("runs", runs)
    path = Path(runs) / name
    if os.path.lexists(path):
        check_folder("name", path)
    return path


@dataclass(frozen=True)
class RunName:
    """In a recipe's types: a text that can name a run's folder."""

    def __repr__(self) -> str:
        return "a folder's name"

    def problem(self, value: Any) -> str | None:
        """As `model.program.ranges.Limit.problem`."""
        if NAME.fullmatch(value):
            return None
        return (
            "it cannot name a run's folder; use up to 100 letters, digits, '.', '_' and '-', beginning with one of the "
            "first two"
        )


@contextmanager
def locked(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """While the block runs, no other process can lock ``folder``, which need not exist. Raises MetronomeError, naming
    the process, when one has locked it and has not ended within ``wait_s``; when the file system refuses; and, before
    anything is made, when ``folder`` is there and no folder that can be written into."""
    if os.path.lexists(folder) and (problem := problem_of_writing(folder)):
        raise MetronomeError(f"{folder}: {problem}")
    owner, made = os.getpid(), []
    try:
        folder = Path(os.path.realpath(folder))
        parent = folder.parent
        while not parent.exists():
            made.append(parent)
            parent = parent.parent
        folder.parent.mkdir(parents=True, exist_ok=True)
        path, handle = _take_beside(folder, time.monotonic() + wait_s)
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise MetronomeError(
            f"{folder} cannot be locked ({reason}); give a folder on a disk that takes files"
        ) from None
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not a process forked from it, which has no lock
            with suppress(OSError):
                path.unlink(missing_ok=True)  # while it is locked: whoever waits for it sees that it is gone
            _held.discard(handle)
            os.close(handle)
            with suppress(OSError):  # folders made for a lock only go with it
                for one in made:
                    one.rmdir()


def _take_beside(folder: Path, until: float) -> tuple[Path, int]:
    """(the lock's file, its handle). Within the folder where only that can be written into, as one that is mounted."""
    path = folder.parent / f".{folder.name}.lock"
    try:
        return path, _take(path, folder, until)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not folder.is_dir():
            raise
        return folder / ".lock", _take(folder / ".lock", folder, until)


def _take(path: Path, folder: Path, until: float) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                _held.add(handle)
                return handle
            # else its holder ended between our opening and locking it, and removed it
        except BlockingIOError:
            if time.monotonic() >= until:
                raise MetronomeError(
                    f"{folder} is being written by {_holder(path)}; wait for its end, or choose another name"
                ) from None
            time.sleep(POLL_S)
        finally:
            if handle not in _held:
                os.close(handle)


def _holder(path: Path) -> str:
    """The process that holds a lock, as it has written; "another process" while it has not."""
    with suppress(OSError, ValueError):
        text = path.read_text(encoding="ascii")
        if HOLDER.fullmatch(text):
            return text
    return "another process"


def _close_in_child() -> None:
    """A forked process shares its parent's locks, and would keep them when the parent has died."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)

"""Folders that a command writes: one rule for their names, and one writer at a time.

A lock is a file beside the folder, ``runs/.quickstart.lock`` for ``runs/quickstart``, locked by ``flock``: the kernel
frees it when its process ends, however it ends, so a lock is never stale.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def locate(runs: str | Path, name: str) -> Path:
    """The folder of the run ``name``. Raises MetronomeError for a name that cannot name a folder within ``runs``, or
    when ``runs`` is no folder."""
    if problem := RunName().problem(name):
        raise MetronomeError(f"name is {name!r}: {problem}")
    runs = Path(runs)
    if os.path.lexists(runs) and not runs.is_dir():
        raise MetronomeError(f"runs: {runs} is a file, but must be the folder that holds the runs' folders")
    return runs / name


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
def locked(folder: Path) -> Iterator[None]:
    """While the block runs, no other process can lock ``folder``, which need not exist. Raises MetronomeError, naming
    the process, when one has locked it."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    handle = _take(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: whoever waits for it sees that it is gone
        os.close(handle)


def _take(path: Path, folder: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise MetronomeError(
                f"{folder} is being written by {_holder(path)}; wait for its end, or choose another name"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
            return handle
        os.close(handle)  # its holder ended between our opening and locking it, and removed it


def _holder(path: Path) -> str:
    """The process that holds a lock, as Linux lists it; "another process" where it does not (another machine's)."""
    try:
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return f"process {fields[4]}"
    except (OSError, IndexError):
        pass
    return "another process"

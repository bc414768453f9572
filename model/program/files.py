"""Atomic writes: a file or folder appears complete or not at all. All packages write through this module.

A write that fails, on a full disk for instance, leaves the older file or folder whole and nothing of its own; its error
names the path (`model.program.exhausted`)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.program.exhausted import naming
from model.program.reading import to_json


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` atomically, through a temporary file beside it: readers see the old file or the new
    one. Makes missing parent folders."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes ``value`` as JSON, atomically. Raises MetronomeError for NaN and infinities, before anything is
    written."""
    write_whole(path, to_json(value, indent).encode())


def append_line(path: Path, line: str) -> None:
    """Adds ``line``, which ends with a newline, to a file of lines. Only a crash leaves a part of it
    (`model.program.reading.whole_lines`)."""
    left = line.encode()
    with naming(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except BaseException:
            file.truncate(before)
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to ``path``, replacing an older folder, when the block ends without an
    exception; it is deleted otherwise."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            temporary.chmod(0o755)
            replace_folder(temporary, path)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def replace_folder(new: Path, path: Path) -> None:
    """Renames the finished folder ``new`` to ``path``, beside it, when the disk holds all of its files; deletes an
    older folder of that name, which is put back if the renaming fails."""
    for one in [p for p in new.rglob("*") if p.is_file()] + [new]:
        handle = os.open(one, os.O_RDONLY)
        try:
            os.fsync(handle)  # some disks say only now that they are full
        finally:
            os.close(handle)
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        path.rename(old / path.name)
        new.rename(path)
    except BaseException:
        if not path.exists():
            (old / path.name).rename(path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old)

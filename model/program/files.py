"""Atomic writes: a file or folder appears complete or not at all. All packages write through this module."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.program.reading import to_json


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` atomically, through a temporary file beside it: readers see the old file or the new
    one. Makes missing parent folders."""
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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to ``path``, replacing an older folder, when the block ends without an
    exception; it is deleted otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)

"""Every reader is fed hostile files: it works, or refuses in one line; nothing else is raised, and nothing hangs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from kernels.errors import MetronomeError
from model.program.reading import parse_yaml, read_text
from rl.audit import records
from tests.fuzz.hostile import contents, refusal
from tests.fuzz.readers import READERS, RECORDS, Make

WRITTEN_ANEW = ("manifest", "reward model", "head", "gpu report", "origin of pairs")
"""Readers whose tries write a file themselves, or that find nothing to be a report."""
MAY_BE_MISSING = ("a card's summary", "index", "metrics", "families", "journal", "notes", "end of a reward training")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Make], Path]:
    """The folder that a function fills; each is called once."""
    return cache(lambda make: _made(make, tmp_path_factory.mktemp("made")))


def _made(make: Make, folder: Path) -> Path:
    make(folder)
    return folder


@pytest.fixture
def filled(made: Callable[[Make], Path], name: str, tmp_path: Path) -> Path:
    """A copy of the folder of the reader ``name``."""
    return shutil.copytree(made(READERS[name].make), tmp_path, dirs_exist_ok=True)


@pytest.mark.usefixtures("world", "filled")
@pytest.mark.parametrize("name", READERS)
def test_it_works_or_refuses_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = READERS[name]
    if reader.modules == RECORDS and "config" not in name:  # most of an audit's time here is the recipe's parser
        saved = tmp_path / "a/config.yaml"
        found = records._config(saved, parse_yaml(read_text(saved)), [])
        assert found[0] is not None
        monkeypatch.setattr(records, "_config", lambda path, recipe, gaps: found)
    path = tmp_path / reader.file
    good = path.read_bytes()
    assert refusal(lambda: reader.read(tmp_path)) is None, "the control: the good file is read"
    refused = []

    @settings(
        max_examples=reader.tries, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck
    )
    @given(contents(good, reader.form))
    def spoil(content: bytes) -> None:
        path.write_bytes(content)
        refused.append(refusal(lambda: reader.read(tmp_path)) is not None)

    spoil()
    path.write_bytes(good)
    assert refusal(lambda: reader.read(tmp_path)) is None, "the tries left nothing behind"
    if not name.startswith(("audit", "comparison")):  # there, what cannot be read is a gap
        assert any(refused)


@pytest.mark.usefixtures("world", "filled")
@pytest.mark.parametrize("name", [name for name in READERS if name not in WRITTEN_ANEW])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    """A folder, a pipe, a device and nothing in the file's place."""
    reader = READERS[name]
    path = tmp_path / reader.file
    for put in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: None):
        path.rmdir() if path.is_dir() else path.unlink()
        put()
        text = refusal(lambda: reader.read(tmp_path))
        assert text is not None or name in MAY_BE_MISSING or name.startswith(("audit", "comparison"))


def test_control_a_fault_is_seen() -> None:
    """A reader that raises something else, or says it in two lines, is not taken for one that refuses."""

    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(KeyError):
        refusal(lambda: fails(KeyError("a")))
    with pytest.raises(AssertionError):
        refusal(lambda: fails(MetronomeError("a\nb")))
    assert refusal(lambda: fails(MetronomeError("a"))) == "a" and refusal(lambda: None) is None

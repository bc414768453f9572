"""A name that an output path's check accepts can be written, with all that is written beside it; no longer one can."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.program.files import whole_folder, write_whole
from model.program.folders import locked
from model.program.outputs import problem_of_file, problem_of_folder

LONGEST = 241


@pytest.mark.parametrize("name", ["x" * LONGEST, "é" * (LONGEST // 2) + "x"], ids=["ASCII", "UTF-8"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    file, folder = tmp_path / "files" / name, tmp_path / "folders" / name
    assert problem_of_file(str(file)) is None and problem_of_folder(str(folder)) is None
    for content in (b"a", b"b"):
        write_whole(file, content)
        with locked(folder), whole_folder(folder) as temporary:
            (temporary / "x").write_bytes(content)
    assert file.read_bytes() == (folder / "x").read_bytes() == b"b"
    longer = f"{tmp_path}/{'y' * (LONGEST + 1)}"
    for problem in (problem_of_file(longer), problem_of_folder(longer)):
        assert problem == f"a name of {LONGEST + 1} bytes; give one of at most {LONGEST}"


def test_the_longest_ending_of_what_is_written_beside_counts(tmp_path: Path) -> None:
    name = str(tmp_path / ("x" * (LONGEST - 4)))
    assert problem_of_file(name, (".png",)) is None and problem_of_file(f"{name}x") is None
    assert "at most" in str(problem_of_file(f"{name}x", (".png",)))
    assert problem_of_file(f"{name}.abc", (".png",)) is None, "an ending is replaced"


def test_paths_have_room_for_what_is_written_beside_them(tmp_path: Path) -> None:
    deep = str(tmp_path)
    while len(deep) < 3900:
        deep += "/" + "d" * 90
    deep = (deep + "/").ljust(4081, "f")
    assert problem_of_file(deep) is None
    write_whole(Path(deep), b"x")
    assert problem_of_file(deep + "f") == problem_of_folder(deep + "f") == "give a shorter path"

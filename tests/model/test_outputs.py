"""A name that an output path's check accepts can be written, with all that is written beside it; no longer one can."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from kernels.errors import MetronomeError
from model.program.files import whole_folder, write_whole
from model.program.folders import locked
from model.program.outputs import RUN_FILES, RUN_FOLDERS, OutputFile, problem_of_file, problem_of_folder
from model.program.recipe import read_recipe
from model.weights import manifest

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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of a run's files those that this is about, with a model whose manifest lists its files, and a link to that."""
    folder = tmp_path / "run"
    for name in ("checkpoints/step_000004/model/config.json", *RUN_FILES):
        write_whole(folder / name, b"{}")
    manifest.write(folder / "checkpoints" / "step_000004", "step_000004")
    shutil.copytree(folder / "checkpoints" / "step_000004", tmp_path / "copy")
    (tmp_path / "link").symlink_to("copy")
    return folder


@pytest.mark.parametrize("inside", ["", "model", "model/new", "new"])
@pytest.mark.parametrize("folder", ["copy", "link", "run/checkpoints/step_000004"])
def test_nothing_is_written_into_what_has_a_manifest(run: Path, folder: str, inside: str) -> None:
    place = run.parent / folder / inside
    for problem in (problem_of_file(f"{place}/x.json"), problem_of_folder(str(place))):
        assert problem and ("has a manifest of its files" in problem or "is a part of the run" in problem)
    with locked(run.parent / "copy"):
        pass  # whoever writes a model anew can lock it


def test_another_programs_manifest_is_none(run: Path) -> None:
    (run.parent / "copy" / "manifest.json").write_text('{"name": "a page"}')
    assert problem_of_file(f"{run.parent}/copy/x.json") is None and problem_of_folder(f"{run.parent}/copy") is None


@pytest.mark.parametrize("name", RUN_FILES)
def test_what_a_run_consists_of_is_not_written_over(run: Path, name: str) -> None:
    assert "is a part of the run" in str(problem_of_file(str(run / name)))
    assert problem_of_file(str(run.parent / Path(name).name)) is None, "that name elsewhere"
    beside = str((run / name).with_suffix(".other"))
    assert problem_of_file(beside) is None, "a result in a run's folder"
    assert "is a part of the run" in str(problem_of_file(beside, (Path(name).suffix,)))


@pytest.mark.parametrize("name", RUN_FOLDERS)
def test_folders_of_a_run_take_no_results(run: Path, name: str) -> None:
    assert "is a part of the run" in str(problem_of_folder(str(run / name)))
    assert "is a part of the run" in str(problem_of_file(str(run / name / "x.json")))
    assert problem_of_folder(str(run)) is problem_of_folder(str(run / "audit" / "compare_b")) is None
    for other in set(RUN_FILES) - {"config.yaml"}:
        (run / other).unlink()
    assert problem_of_file(str(run / "tracking" / "x.json")) is None, "a config.yaml alone makes no run"


def test_files_of_a_model_without_a_manifest_are_not_written_over(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        assert problem_of_file(str(tmp_path / name)) is None
        (tmp_path / name).write_text("{}")
    for name in ("config.json", "model.safetensors"):
        assert problem_of_file(str(tmp_path / name)) == "it is a file of a model; give another path"
    assert problem_of_file(str(tmp_path / "x.json")) is None


def test_files_of_speech_are_not_written_over(tmp_path: Path) -> None:
    assert problem_of_file(str(tmp_path / "manifest.jsonl")) is None
    (tmp_path / "manifest.jsonl").write_text("")
    assert problem_of_file(str(tmp_path / "manifest.jsonl")) == "it is a file of a folder of speech; give another path"
    assert problem_of_file(str(tmp_path / "x.json")) is None


@dataclass(frozen=True)
class Results:
    json: Annotated[str, OutputFile(beside=(".png",))]
    labels: tuple[str, ...] = ()


@pytest.mark.parametrize("json", ["labels.yaml", "labels.json"], ids=["the file", "a file beside it"])
def test_what_a_recipe_reads_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, json: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("labels.yaml", "labels.png", "recipe.yaml", "recipe.json"):
        Path(name).write_text("{}")

    def read(*options: str) -> None:
        read_recipe("x.y", "", Results, options)

    with pytest.raises(MetronomeError, match=r"recipe: json is 'labels.*: './labels\.(yaml|png)' is read"):
        read("--json", json, "--labels", f"[other, ./labels{'.png' if json.endswith('json') else '.yaml'}]")
    with pytest.raises(MetronomeError, match=r"recipe: json is '\./recipe.yaml': 'recipe.yaml' is read"):
        read("--config", "recipe.yaml", "--json", "./recipe.yaml")
    read("--json", json, "--labels", "[recipe.yaml]", "--config", "recipe.yaml")

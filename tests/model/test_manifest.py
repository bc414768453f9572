"""A manifest: one wrong bit, a file too many or too few, another step's folder; each is named, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint, manifest
from model.weights.manifest import MANIFEST, CheckpointError
from tests.model.damage import DAMAGES, edit_manifest, flip_bit, pickle_beside

RECIPE = "seed: 0\n"
FILES = {
    "progress.json": b'{"step": 4}',
    "model/config.json": b"{}",
    "learner/optimizer.safetensors": bytes(range(256)),
}


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder with step_000002 and step_000004."""
    for step in (2, 4):
        folder = tmp_path / f"step_{step:06d}"
        for name, data in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data + str(step).encode())
        manifest.write(folder, folder.name, RECIPE)
    return tmp_path


def test_what_was_saved_is_whole(series: Path) -> None:
    manifest.check(series / "step_000004", recipe=RECIPE)
    manifest.check(series / "step_000004", part="model")
    content = json.loads((series / "step_000004" / MANIFEST).read_text())
    assert list(content["files"]) == sorted(FILES) and content["name"] == "step_000004"
    assert content["files"]["progress.json"]["size"] == len(FILES["progress.json"]) + 1


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_each_damage_is_one_line_with_the_file_and_the_checkpoint_before(
    series: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(series / "step_000004")
    with pytest.raises(CheckpointError, match=says) as error:
        manifest.check(series / "step_000004", recipe=RECIPE)
    assert "step_000004" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("whole is step_000002: to resume from it, move step_000004 away")


def test_what_was_put_there_later_is_to_be_removed(series: Path) -> None:
    folder = series / "step_000004"
    pickle_beside(folder)
    with pytest.raises(CheckpointError, match=r"learner/optim_states\.pt is not listed .* whole: remove that file"):
        manifest.check(folder)
    (folder / ".DS_Store").touch()
    with pytest.raises(CheckpointError, match=r"\.DS_Store is not listed .* nor are 1 more.*remove these files"):
        manifest.check(folder, recipe=RECIPE)
    flip_bit(folder / "progress.json")  # the control: then removing them would not do
    with pytest.raises(CheckpointError, match=r"progress\.json is damaged.*move step_000004 away"):
        manifest.check(folder)


@pytest.mark.parametrize("byte", range(0, 256, 51))
@pytest.mark.parametrize("bit", [0, 7])
def test_any_bit_counts(series: Path, byte: int, bit: int) -> None:
    file = series / "step_000004" / "learner/optimizer.safetensors"
    flip_bit(file, byte, bit)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        manifest.check(series / "step_000004")
    flip_bit(file, byte, bit)
    manifest.check(series / "step_000004")


def test_only_a_whole_checkpoint_is_offered(series: Path) -> None:
    shutil.copytree(series / "step_000002", series / "step_000003")  # another one's, under a name of its own
    flip_bit(series / "step_000004" / "progress.json")
    with pytest.raises(CheckpointError, match="whole is step_000002"):
        manifest.check(series / "step_000004", recipe=RECIPE)
    flip_bit(series / "step_000002" / "learner/optimizer.safetensors")
    with pytest.raises(CheckpointError, match="No checkpoint before it is whole: start anew under another --name"):
        manifest.check(series / "step_000004", recipe=RECIPE)


def test_another_runs_checkpoint_is_not_this_runs(series: Path) -> None:
    with pytest.raises(CheckpointError, match="saved by a run of another recipe"):
        manifest.check(series / "step_000004", recipe="seed: 1\n")
    manifest.check(series / "step_000004")  # for loading a model, any run's will do


def test_a_copy_under_a_free_name_is_still_checked(series: Path) -> None:
    copy = Path(shutil.copytree(series / "step_000004", series / "the-good-one"))
    manifest.check(copy)
    flip_bit(copy / "progress.json")
    with pytest.raises(CheckpointError, match=r"progress\.json is damaged.*Copy it again"):
        manifest.check(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"a"', "{}", "[" * 100_000, "\ufeff{}", '{"format": "metronome.manifest/1"}']
)
def test_a_manifest_that_is_none(series: Path, text: str) -> None:
    (series / "step_000004" / MANIFEST).write_text(text)
    for check in (manifest.check, lambda folder: manifest.check_loaded(folder / "model")):
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged.*whole is step_000002"):
            check(series / "step_000004")


@pytest.mark.parametrize(
    "fields",
    [
        {"name": None},
        {"name": 3},
        {"recipe": []},
        {"files": None},
        {"files": []},
        {"files": "x"},
        {"files": {"a": 1}},
        {"files": {"a": {"size": "1", "sha256": 2}}},
    ],
)
def test_fields_of_other_types(series: Path, fields: dict[str, object]) -> None:
    """Even in a manifest whose own digest is right."""
    edit_manifest(series / "step_000004", lambda content: content | fields)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        manifest.check(series / "step_000004", recipe=RECIPE)


def test_a_later_version_is_named(series: Path) -> None:
    edit_manifest(series / "step_000004", lambda content: content | {"format": "metronome.manifest/2"})
    with pytest.raises(CheckpointError, match=r"is of format metronome\.manifest/2"):
        manifest.check(series / "step_000004")


def nano(folder: Path, seed: int = 0) -> None:
    model = InteractionModel(preset("nano"))
    model.init_weights(seed)
    checkpoint.save(model, folder)


def test_every_load_goes_through_the_check(tmp_path: Path) -> None:
    step = tmp_path / "step_000002"
    nano(step / "model")
    (step / "progress.json").write_text("{}")
    manifest.write(step, step.name)
    into = InteractionModel(preset("nano"))
    digest = checkpoint.weights_digest(checkpoint.load(step / "model"))
    weights = step / "model" / checkpoint.WEIGHTS
    (step / "progress.json").write_text("[]")
    assert checkpoint.weights_digest(checkpoint.load(step / "model")) == digest, "only what is read is checked"
    flip_bit(weights, -1)
    for load in (checkpoint.load, lambda folder: checkpoint.load_into(into, folder)):
        with pytest.raises(CheckpointError, match=r"model/model\.safetensors is damaged: its digest"):
            load(step / "model")
    (step / MANIFEST).unlink()  # a run's checkpoint has one; taking it away hides nothing
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        checkpoint.load(step / "model")
    step.rename(tmp_path / "elsewhere")  # the control: a folder that no run saved has none, and the bit is not seen
    assert checkpoint.weights_digest(checkpoint.load(tmp_path / "elsewhere" / "model")) != digest


def test_a_renamed_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    nano(tmp_path / "step_000002" / "model")
    manifest.write(tmp_path / "step_000002", "step_000002")
    (tmp_path / "step_000002").rename(tmp_path / "step_000004")
    with pytest.raises(CheckpointError, match="was saved as step_000002"):
        checkpoint.load(tmp_path / "step_000004" / "model")


def test_other_programs_manifests_are_none_of_ours(tmp_path: Path) -> None:
    nano(tmp_path / "site" / "model")
    for place in (tmp_path / "site", tmp_path / "site" / "model"):
        (place / MANIFEST).write_text('{"name": "My app", "icons": []}')
    checkpoint.load(tmp_path / "site" / "model")


def test_a_checkpoint_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no such folder\. Name a folder that a run saved") as error:
        manifest.check_loaded(tmp_path / "nowhere/checkpoints/step_000004/model")
    assert "\n" not in str(error.value)

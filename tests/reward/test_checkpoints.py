"""Reward training's checkpoints, which are TRL's: checked before `--resume` reads them, and never executed. What is
resumed is in test_resuming.py."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kernels.errors import MetronomeError
from model.program.files import write_json
from model.weights import manifest
from model.weights.tensors import read_tensors
from reward.learned.model import RewardModel
from reward.learned.origin import read_training_origin
from reward.learned.preference import save_preferences
from reward.train import BackboneRecipe, RewardTrainConfig, train
from tests.model.damage import Payload, flip_bit
from tests.reward.test_trainable import pairs
from tests.support.models import reward_model

RECIPE = "name: r\n"
Weights = dict[str, torch.Tensor]
SETTINGS = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; each test undoes its end, or a part of it."""
    folder = tmp_path_factory.mktemp("rewards")
    save_preferences(folder / "pairs", {"train": pairs()})
    train(config(folder), RECIPE, False)
    return folder


def config(folder: Path) -> RewardTrainConfig:
    backbone = BackboneRecipe(preset="nano")
    return RewardTrainConfig(
        "r", str(folder), axes=("timing", "content"), pairs=str(folder / "pairs"), backbone=backbone, trainer=SETTINGS
    )


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(made, tmp_path / "rewards"))
    shutil.rmtree(folder / "r/model")
    return folder


def digest(folder: Path) -> str:
    return str(json.loads((folder / "r/summary.json").read_text())["weights_digest"])


def origin(folder: Path) -> str:
    return read_training_origin(folder / "r").text


def plant(file: Path, trace: Path) -> None:
    state = torch.load(file, weights_only=False)
    torch.save({**state, "extra": Payload(trace)}, file)


def test_a_checkpoint_holds_its_state_and_a_manifest(made: Path) -> None:
    for step in (2, 4):
        folder = made / f"r/checkpoints/checkpoint-{step}"
        manifest.check(folder, recipe=origin(made))
        names = set(json.loads((folder / manifest.MANIFEST).read_text())["files"])
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= names
        assert "training_args.bin" not in names and not [n for n in names if n.endswith((".py", ".bin"))]


def test_a_resumed_training_ends_with_the_same_weights(copy: Path) -> None:
    shutil.rmtree(copy / "r/checkpoints/checkpoint-4")
    before = digest(copy)
    (copy / "r/summary.json").unlink()
    train(config(copy), RECIPE, True)
    assert digest(copy) == before
    RewardModel.load(copy / "r/model")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize(
    ("damage", "says"), [(flip_bit, "is damaged: its digest"), (cut, "is damaged: it has"), (Path.unlink, "is missing")]
)
def test_damage_is_refused_by_name(copy: Path, name: str, damage: Callable[[Path], None], says: str) -> None:
    damage(copy / "r/checkpoints/checkpoint-4" / name)
    with pytest.raises(MetronomeError, match=f"checkpoint-4: {re.escape(name)} {says}.*whole is checkpoint-2"):
        train(config(copy), RECIPE, True)
    assert not (copy / "r/model").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
@pytest.mark.parametrize("forged", [False, True])
def test_a_planted_payload_never_runs(copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, forged: bool) -> None:
    """Not even where the manifest was made anew, so that it lists the payload."""
    folder, trace = copy / "r/checkpoints/checkpoint-2", copy / "EXECUTED"
    shutil.rmtree(copy / "r/checkpoints/checkpoint-4")  # from the last one no optimizer state is read
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # `train` sets it to 1
    plant(folder / name, trace)
    torch.load(folder / name, weights_only=False)
    assert trace.exists(), "the control: the payload works"
    trace.unlink()
    if forged:
        manifest.write(folder, folder.name, origin(copy))
    says = r"is no plain data \(\S*exec\) and was not read" if forged else f"{re.escape(name)} is damaged"
    with pytest.raises(MetronomeError, match=says):
        train(config(copy), RECIPE, True)
    assert not trace.exists() and not (copy / "r/model").exists()


def test_an_unfinished_checkpoint_is_not_resumed_from(copy: Path) -> None:
    (copy / "r/checkpoints/checkpoint-4/manifest.json").unlink()  # as if killed while TRL was writing
    train(config(copy), RECIPE, True)
    manifest.check(copy / "r/checkpoints/checkpoint-4", recipe=origin(copy))
    shutil.rmtree(copy / "r/model")
    (copy / "r/checkpoints/checkpoint-2/manifest.json").unlink()
    (copy / "r/checkpoints/checkpoint-4/manifest.json").unlink()
    with pytest.raises(MetronomeError, match="no finished checkpoint"):
        train(config(copy), RECIPE, True)


def test_another_recipes_checkpoint_is_refused(copy: Path) -> None:
    folder = copy / "r/checkpoints/checkpoint-4"
    manifest.write(folder, folder.name, "seed: 7\n")
    with pytest.raises(MetronomeError, match="saved by a run of another recipe"):
        train(replace(config(copy), seed=0), RECIPE, True)


@pytest.mark.parametrize(
    "file", ["reward.json", "head.safetensors", "backbone/config.json", "backbone/model.safetensors"]
)
def test_a_flipped_bit_in_a_reward_model_is_refused_by_name(tmp_path: Path, file: str) -> None:
    reward_model().save(tmp_path / "saved")
    RewardModel.load(tmp_path / "saved")
    flip_bit(tmp_path / "saved" / file)
    with pytest.raises(MetronomeError, match=f"{re.escape(file)} is damaged: its digest"):
        RewardModel.load(tmp_path / "saved")
    (tmp_path / "saved" / manifest.MANIFEST).unlink()
    with pytest.raises(MetronomeError, match=r"manifest\.json is missing"):
        RewardModel.load(tmp_path / "saved")


@pytest.mark.parametrize("last", [2, 4])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda w: {n: t * math.nan for n, t in w.items()}, "values of .* are not finite: Move the checkpoint away"),
        (lambda w: dict(list(w.items())[1:]), "holds no weights of this model"),
        (lambda w: {n: t[:1].clone() for n, t in w.items()}, "holds no weights of this model"),
        (lambda w: None, "is damaged"),
        (lambda w: w, None),  # the control: the same weights, written again
    ],
)
def test_weights_of_a_checkpoint_are_looked_at(
    copy: Path,
    last: int,
    damage: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None],
    says: str | None,
) -> None:
    """Whether a step is left to take or none, and even where the manifest lists them."""
    (copy / "r/summary.json").unlink()
    if last == 2:
        shutil.rmtree(copy / "r/checkpoints/checkpoint-4")
    folder = copy / f"r/checkpoints/checkpoint-{last}"
    changed = damage(read_tensors(folder / "model.safetensors"))
    if changed is None:
        (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    else:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    manifest.write(folder, folder.name, origin(copy))
    if says is None:
        train(config(copy), RECIPE, True)
        return
    with pytest.raises(MetronomeError, match=says) as caught:
        train(config(copy), RECIPE, True)
    assert "\n" not in str(caught.value) and not (copy / "r/model").exists()


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("r/origin.json", "processes", 0),
        ("r/checkpoints/checkpoint-4/trainer_state.json", "global_step", 0),
        ("r/checkpoints/checkpoint-4/trainer_state.json", "max_steps", -1),
        ("r/checkpoints/checkpoint-4/progress.json", "wall_s", -1.0),
    ],
)
def test_numbers_that_cannot_be_are_refused(copy: Path, file: str, name: str, value: float) -> None:
    found = json.loads((copy / file).read_text())
    write_json(copy / file, found | {name: value})
    if "checkpoint-4" in file:
        manifest.write((copy / file).parent, "checkpoint-4", origin(copy))
    with pytest.raises(MetronomeError, match=rf"{name} is {value}: give a number from"):
        train(config(copy), RECIPE, True)

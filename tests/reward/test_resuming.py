"""Reward training's `--resume` ends with the weights of the uninterrupted run, or refuses by name what would end with
others. A training whose numbers leave fp32 stops, and writes no model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.errors import MetronomeError
from model.program.files import write_json
from model.weights import checkpoint, manifest
from model.weights.finite import NotFiniteError
from reward.learned import resuming
from reward.learned.model import RewardModel
from reward.learned.origin import TRAINING, digest_of, read_pairs_origin, read_training_origin
from reward.learned.preference import save_preferences
from reward.train import BackboneRecipe, RewardTrainConfig, train
from tests.reward.test_trainable import pairs
from tests.support.models import fresh_model

SETTINGS = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
RECIPE = "name: r\n"


def config(folder: Path, **trainer: Any) -> RewardTrainConfig:
    return RewardTrainConfig(
        name="r",
        runs=str(folder),
        axes=("timing", "content"),
        pairs=str(folder / "pairs"),
        backbone=BackboneRecipe(checkpoint=str(folder / "backbone")),
        trainer=SETTINGS | trainer,
    )


def resume(config: RewardTrainConfig) -> None:
    train(config, RECIPE, True)


def inputs(folder: Path) -> None:
    checkpoint.save(fresh_model("nano"), folder / "backbone")
    save_preferences(folder / "pairs", {"train": pairs(count=20)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    folder = tmp_path_factory.mktemp("rewards")
    inputs(folder)
    train(config(folder), RECIPE, False)
    return folder


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "rewards"))


@pytest.fixture
def cut(whole: Path) -> Path:
    """As if it had been killed in its third step."""
    shutil.rmtree(whole / "r/checkpoints/checkpoint-4")
    shutil.rmtree(whole / "r/model")
    (whole / "r/summary.json").unlink()
    return whole


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "r/summary.json").read_text())
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_stays_as_it_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(whole)
    resume(config(whole))
    assert content(whole) == before
    assert f"is finished: 4 steps, weights_digest {summary(whole)['weights_digest']}" in capsys.readouterr().out


def test_a_run_cut_after_its_last_checkpoint_takes_no_further_step(made: Path, whole: Path) -> None:
    shutil.rmtree(whole / "r/model")
    (whole / "r/summary.json").unlink()
    resume(config(whole))
    assert summary(whole)["weights_digest"] == summary(made)["weights_digest"]
    assert summary(whole)["loss"] == summary(made)["loss"] and summary(whole)["steps"] == 4
    assert (whole / "r/model/head.safetensors").read_bytes() == (made / "r/model/head.safetensors").read_bytes()


def test_the_summary_covers_all_parts(made: Path, cut: Path) -> None:
    first = json.loads((cut / "r/checkpoints/checkpoint-2/progress.json").read_text())
    logged = json.loads((made / "r/checkpoints/checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert summary(made)["loss"] == pytest.approx(math.fsum(one["loss"] for one in logged) / 4, rel=1e-6)
    first["wall_s"] = 1000.0
    write_json(cut / "r/checkpoints/checkpoint-2/progress.json", first)
    manifest.write(cut / "r/checkpoints/checkpoint-2", "checkpoint-2", read_training_origin(cut / "r").text)
    resume(config(cut))
    assert summary(cut)["weights_digest"] == summary(made)["weights_digest"]
    assert summary(cut)["loss"] == summary(made)["loss"]
    assert 1000 < summary(cut)["wall_s"] < 1000 + 10 * summary(made)["wall_s"] + 100


def test_a_model_names_what_it_was_made_from(made: Path) -> None:
    origin = RewardModel.load(made / "r/model").origin
    assert origin == summary(made)["origin"]
    assert origin["pairs"] == read_pairs_origin(made / "pairs").digest
    assert origin["backbone"] == checkpoint.weights_digest(checkpoint.load(made / "backbone"))
    assert origin["recipe"] == digest_of(read_training_origin(made / "r").recipe)


def other_pairs(folder: Path) -> None:
    shutil.rmtree(folder / "pairs")
    save_preferences(folder / "pairs", {"train": pairs(count=21)[1:]})


def same_pairs_again(folder: Path) -> None:
    shutil.rmtree(folder / "pairs")
    save_preferences(folder / "pairs", {"train": pairs(count=20)}, recipe="f" * 32)


def other_backbone(folder: Path) -> None:
    checkpoint.save(fresh_model("nano", seed=1), folder / "backbone")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_pairs, r"pairs \S*pairs: other content than the run began with"),
        (other_backbone, r"backbone \S*backbone: other content than the run began with"),
        (same_pairs_again, None),  # the control: equal pairs, written by another recipe
    ],
)
def test_other_content_at_the_same_path_is_refused(
    made: Path, cut: Path, change: Callable[[Path], None], says: str | None
) -> None:
    change(cut)
    if says is None:
        resume(config(cut))
        assert summary(cut)["weights_digest"] == summary(made)["weights_digest"]
        return
    with pytest.raises(MetronomeError, match=says):
        resume(config(cut))
    assert not (cut / "r/model").exists() and not (cut / "r/summary.json").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda c: replace(c, seed=1), "seed is 1, and was 0"),
        (lambda c: replace(c, axes=("content", "timing")), r'axes is \["content", "timing"\], and was'),
        (lambda c: replace(c, margin_scale=0.5), "margin_scale is 0.5, and was 1.0"),
        (lambda c: replace(c, rationality=2.0), "rationality is 2.0, and was null"),
        (lambda c: replace(c, trainer=c.trainer | {"max_steps": 5}), "trainer.max_steps is 5, and was 4"),
        (lambda c: replace(c, trainer=c.trainer | {"learning_rate": 1e-3}), "learning_rate is 0.001, and was the def"),
        (lambda c: replace(c, backbone=BackboneRecipe(preset="nano")), None),  # fresh weights of seed 0: the same
        (lambda c: replace(c, trainer=c.trainer | {"max_grad_norm": 1, "adam_beta1": 0.9}), None),
        (lambda c: replace(c, trainer=c.trainer | {"save_steps": 1, "logging_steps": 2, "save_total_limit": 9}), None),
    ],
)
def test_what_decides_weights_must_be_equal(
    made: Path, cut: Path, changed: Callable[[RewardTrainConfig], RewardTrainConfig], says: str | None
) -> None:
    if says is None:
        train(changed(config(cut)), "# another text\nname: r\n", True)
        assert summary(cut)["weights_digest"] == summary(made)["weights_digest"]
        return
    with pytest.raises(MetronomeError, match=f"cannot be resumed.*{says}"):
        resume(changed(config(cut)))
    assert not (cut / "r/model").exists()


def test_a_moved_run_resumes_and_saves_as_its_recipe_now_says(made: Path, cut: Path, tmp_path: Path) -> None:
    shutil.move(cut, tmp_path / "moved")
    resume(config(tmp_path / "moved", save_steps=1))
    assert summary(tmp_path / "moved")["weights_digest"] == summary(made)["weights_digest"]
    assert (tmp_path / "moved/r/checkpoints/checkpoint-3").is_dir()


def test_other_processes_or_kernels_are_refused(made: Path) -> None:
    origin = read_training_origin(made / "r")
    assert list(origin.differences(origin, "p", "b")) == []
    other = replace(origin, processes=2, contract_id="0" * 16)
    assert [line.split(",")[0] for line in origin.differences(other, "p", "b")] == [
        "2 processes",
        f"the kernels' contract is {'0' * 16}",
    ]


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "progress.json", "model.safetensors"]
)
def test_a_checkpoint_without_a_part_of_the_state_is_refused(cut: Path, name: str) -> None:
    """Even where its manifest does not list the part either, as with TRL's ``save_only_model``."""
    folder = cut / "r/checkpoints/checkpoint-2"
    (folder / name).unlink()
    manifest.write(folder, folder.name, read_training_origin(cut / "r").text)
    with pytest.raises(MetronomeError, match=f"checkpoint-2: has no {name}, without which"):
        resume(config(cut))
    assert not (cut / "r/model").exists()


def test_a_run_without_its_origin_is_refused(cut: Path) -> None:
    (cut / "r" / TRAINING).unlink()
    with pytest.raises(MetronomeError, match=r"has no origin\.json, so what its training began from is not known"):
        resume(config(cut))


def test_a_finished_run_of_no_step_is_refused(whole: Path) -> None:
    write_json(whole / "r/summary.json", summary(whole) | {"steps": 0})
    with pytest.raises(MetronomeError, match="steps is 0: give a number from"):
        resume(config(whole))


def test_a_finished_run_whose_model_was_replaced_is_named(whole: Path) -> None:
    model = RewardModel.load(whole / "r/model")
    with torch.no_grad():
        model.heads.weight[0, 0] += 1
    model.save(whole / "r/model")
    with pytest.raises(MetronomeError, match=r"has the weights \w+, but summary\.json says that the run ended with"):
        resume(config(whole))


@pytest.mark.parametrize(
    ("trainer", "checkpoints"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_steps": 100}, [4]),
        ({"save_strategy": "epoch"}, [4]),
        ({"save_steps": 1, "save_total_limit": 2}, [3, 4]),
        ({"save_only_model": True, "gradient_accumulation_steps": 1}, [2, 4]),
    ],
)
def test_when_checkpoints_are_written_decides_no_weight(
    made: Path, tmp_path: Path, trainer: dict[str, Any], checkpoints: list[int]
) -> None:
    inputs(tmp_path)
    train(config(tmp_path, **trainer), RECIPE, False)
    found = sorted(int(p.name.rpartition("-")[2]) for p in (tmp_path / "r/checkpoints").glob("checkpoint-*"))
    assert found == checkpoints and summary(tmp_path)["weights_digest"] == summary(made)["weights_digest"]
    if not checkpoints:
        shutil.rmtree(tmp_path / "r/model")
        with pytest.raises(MetronomeError, match="holds no finished checkpoint"):
            resume(config(tmp_path, **trainer))
    (tmp_path / "r/summary.json").unlink()
    if trainer.get("save_only_model"):
        with pytest.raises(MetronomeError, match=r"has no optimizer\.pt"):
            resume(config(tmp_path, **trainer))
    else:
        resume(config(tmp_path, **trainer))
        assert summary(tmp_path)["weights_digest"] == summary(made)["weights_digest"]


def test_a_run_cut_before_its_first_checkpoint_begins_anew(made: Path, whole: Path) -> None:
    """And only with what it began with; nor is it taken for an empty folder while it holds any result."""
    shutil.rmtree(whole / "r/model")
    (whole / "r/summary.json").unlink()
    with pytest.raises(MetronomeError, match=r"already holds results of a run \(checkpoints\)"):
        train(config(whole), RECIPE, False)
    shutil.rmtree(whole / "r/checkpoints")
    with pytest.raises(MetronomeError, match=r"cannot be resumed.*seed is 1, and was 0"):
        resume(replace(config(whole), seed=1))
    resume(config(whole))
    assert {k: v for k, v in summary(whole).items() if k != "wall_s"} == {
        k: v for k, v in summary(made).items() if k != "wall_s"
    }


@pytest.mark.parametrize("result", ["model", "metrics.jsonl", "episodes"])
def test_a_folder_with_any_runs_results_is_not_begun_in(tmp_path: Path, result: str) -> None:
    (tmp_path / "r" / result).mkdir(parents=True)
    with pytest.raises(MetronomeError, match=rf"already holds results of a run \({result}\)"):
        train(config(tmp_path), RECIPE, False)


@pytest.mark.parametrize(("rate", "steps"), [(1e38, 1), (1e30, 4), (1e38, 4)])
@pytest.mark.parametrize("centred", [None, 1e-5])
def test_a_training_that_diverges_writes_no_model(
    tmp_path: Path, rate: float, steps: int, centred: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs(tmp_path)
    diverging = {"learning_rate": rate, "max_steps": steps, "lr_scheduler_type": "constant"}
    with pytest.raises(NotFiniteError, match=r"at step \d|gives rewards that are not finite") as caught:
        train(config(tmp_path, **diverging, center_rewards_coefficient=centred), RECIPE, False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r/model").exists() and not (tmp_path / "r/summary.json").exists()
    assert "loss 0.0000" not in capsys.readouterr().out


def test_progress_survives_the_disk(tmp_path: Path) -> None:
    one = resuming.Progress(loss_sum=0.1 + 0.2, earlier_s=5.0)
    one.write(tmp_path)
    two = resuming.Progress()
    two.read(tmp_path)
    assert two.loss_sum == one.loss_sum and two.earlier_s >= 5.0
    (tmp_path / "progress.json").write_text('{"loss_sum": NaN, "wall_s": 1}')
    with pytest.raises(MetronomeError, match="NaN is no number"):
        two.read(tmp_path)

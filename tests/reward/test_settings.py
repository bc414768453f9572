"""A recipe may set those fields of TRL's trainer that are listed, each within its limits; how `reward.train` is started
is looked at before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from trl import RewardConfig

from kernels import dispatch
from kernels.errors import MetronomeError
from model.program.folders import locked
from model.program.ranges import check
from reward import train as command
from reward.learned.settings import CHOICES, FIXED_FIELDS, RANGES, _check_place
from reward.train import train
from tests.reward.test_resuming import RECIPE, config, inputs


@pytest.mark.parametrize("name", ["logging_nan_inf_filter", "ignore_data_skip", "output_dir", "use_cpu"])
def test_settings_that_would_hide_or_change_what_was_trained_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MetronomeError, match=f"trainer.{name} is set by the program; remove it"):
        train(config(tmp_path, **{name: True}), RECIPE, False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 4.0),
        ("max_steps", "4"),
        ("max_steps", -2),
        ("learning_rate", -1.0),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("logging_steps", 0),
        ("save_steps", -1),
        ("save_total_limit", 0),
        ("num_train_epochs", [3]),
        ("weight_decay", 1.5),
        ("seed", -1),
        ("eval_strategy", "steps"),
        ("save_strategy", "sometimes"),
        ("lr_scheduler_type", "wavy"),
        ("optim", "best"),
        ("optim", "adamw_bnb_8bit"),
        ("optim", "paged_adamw_8bit"),
        ("report_to", ["wandb", "comet_ml"]),
        ("report_to", "all"),
        ("no_such_field", 1),
        ("push_to_hub", True),
        ("hub_model_id", "a/b"),
        ("logging_dir", "/elsewhere"),
        ("resume_from_checkpoint", "/elsewhere"),
        ("deepspeed", {}),
        ("fsdp", "full_shard"),
        ("accelerator_config", {}),
        ("fp16", True),
        ("torch_compile", True),
        ("label_smoothing_factor", 2.0),
        ("neftune_noise_alpha", -1.0),
        ("lr_scheduler_kwargs", {"no": 1}),
    ],
)
def test_a_trainer_field_that_cannot_be_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    inputs(tmp_path)
    given = config(tmp_path, **{name: value})
    with pytest.raises(MetronomeError, match=r"recipe: trainer[.:]") as caught:
        check(given)  # as `read_recipe` does
        train(given, RECIPE, False)
    assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    inputs(tmp_path)
    with pytest.raises(MetronomeError, match=r"recipe: trainer: TensorBoardCallback requires") as caught:
        train(config(tmp_path, report_to="tensorboard"), RECIPE, False)
    assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()


def test_each_number_of_the_trainers_has_a_range_and_all_fields_are_trls() -> None:
    types = get_type_hints(RewardConfig)
    allowed = {**RANGES, **CHOICES, "run_name": None}
    assert allowed.keys() < types.keys() and not allowed.keys() & FIXED_FIELDS.keys()

    def is_number(name: str) -> bool:
        return bool({int, float} & {types[name], *get_args(types[name])})

    assert {name for name in allowed if is_number(name)} == RANGES.keys()
    assert is_number("neftune_noise_alpha") and not is_number("push_to_hub")  # the control


def placed(device: str, **others: int) -> SimpleNamespace:
    """A trainer's arguments, as far as `_check_place` reads them."""
    return SimpleNamespace(device=torch.device(device), **({"n_gpu": 1, "world_size": 1} | others))


def test_a_trainer_that_accelerate_puts_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    _check_place(placed("cpu"))
    with pytest.raises(
        MetronomeError, match=r"placement.device is cpu, but .* works on cuda: .*accelerate/reward.yaml"
    ):
        _check_place(placed("cuda:0"))
    monkeypatch.setattr(dispatch, "device", lambda: torch.device("cuda"))
    _check_place(placed("cuda:0"))
    with pytest.raises(MetronomeError, match=r"placement.device is cuda, but .* works on cpu: .*accelerate/gpu.yaml"):
        _check_place(placed("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # then it divides the work between the two
    with pytest.raises(MetronomeError, match="works on cpu"):
        _check_place(placed("cuda:0"))


def test_a_process_takes_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "device", lambda: torch.device("cuda"))
    arguments = placed("cuda:0", n_gpu=8)
    _check_place(arguments)
    assert arguments._n_gpu == 1


def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _check_place(placed("cpu", world_size=2))
    with pytest.raises(MetronomeError, match="started 2 processes, but accelerate counts 1"):
        _check_place(placed("cpu"))


@pytest.mark.parametrize("trainer", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_a_training_of_no_step_is_refused(tmp_path: Path, trainer: dict[str, Any]) -> None:
    with pytest.raises(MetronomeError, match="give no step"):
        train(config(tmp_path, **trainer), RECIPE, False)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """LOCAL_RANK at the start of each training."""
    found: list[str | None] = []
    monkeypatch.setattr(command, "train", lambda *_: found.append(os.environ.get("LOCAL_RANK")))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"RANK": "1"}, "the environment has RANK='1', but not LOCAL_RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE='2', but not RANK"),
        ({"LOCAL_RANK": "3"}, None),  # left over, for nobody
        ({}, None),  # the control
    ],
)
def test_half_a_launcher_is_refused(
    begun: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], says: str | None
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if says is None:
        command.main(["--runs", str(tmp_path)])
        assert begun == [None]
        return
    with pytest.raises(MetronomeError, match=says):
        command.main(["--runs", str(tmp_path)])
    assert not begun and not list(tmp_path.iterdir())


def test_one_training_at_a_time_writes_into_a_folder(begun: list[str | None], tmp_path: Path) -> None:
    with locked(tmp_path / "r"), pytest.raises(MetronomeError, match=r"r is being written by process \d+"):
        command.main(["--runs", str(tmp_path), "--name", "r"])
    assert not begun
    command.main(["--runs", str(tmp_path), "--name", "r"])
    assert begun

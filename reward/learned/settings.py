"""Settings of TRL's trainer, and of the process that it runs in, by the recipe of `reward.train`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate.utils import parse_flag_from_env
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from kernels import dispatch
from kernels.adamw import AdamW
from kernels.errors import MetronomeError
from model.program.launched import Launched
from model.program.ranges import Limit, Range, shown
from model.program.startup import import_deepspeed, prepare_process

FIXED_FIELDS: dict[str, Any] = {
    "remove_unused_columns": False,  # TRL would drop all but three of our columns
    "max_length": None,
    "gradient_checkpointing": False,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
    "logging_nan_inf_filter": False,  # it shows another loss in the place of one that is not finite
    "ignore_data_skip": False,  # resuming would begin with the first pairs again
    "auto_find_batch_size": False,  # the batch would depend on the machine's memory
    "load_best_model_at_end": False,  # nothing is evaluated during training
}
"""Fields of trl.RewardConfig that the program needs to have these values; a recipe may not set them."""

CHOICES: dict[str, tuple[Any, ...]] = {
    # schedules and optimizers that need no further settings or packages
    "lr_scheduler_type": (
        "linear",
        "cosine",
        "cosine_with_restarts",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ),
    "optim": ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    "logging_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch"),
    "report_to": ("none", "tensorboard", "wandb"),  # these write into the run's folder
    "logging_first_step": (False, True),
    "save_only_model": (False, True),
    "dataloader_drop_last": (False, True),
}
"""What the fields of trl.RewardConfig that are no numbers may be; ``run_name`` is any text."""

_EVERY = Range(0, 10**7, open_low=True)
RANGES: dict[str, Limit] = {
    "learning_rate": Range(0.0, 1.0),
    "weight_decay": Range(0.0, 1.0),
    "adam_beta1": Range(0.0, 0.999999),
    "adam_beta2": Range(0.0, 0.999999),
    "adam_epsilon": Range(0.0, 1.0, open_low=True),
    "max_grad_norm": Range(0.0, 1e6),
    "center_rewards_coefficient": Range(0.0, 1e3),
    "num_train_epochs": Range(0, 10**4, open_low=True),
    "max_steps": Range(-1, 10**7),  # -1: by num_train_epochs
    "warmup_steps": Range(0, 10**7),
    "logging_steps": _EVERY,  # below 1: a share of all steps
    "save_steps": _EVERY,
    "save_total_limit": Range(1, 10**6),
    "per_device_train_batch_size": Range(1, 10**5),
    "gradient_accumulation_steps": Range(1, 10**5),
    "dataloader_num_workers": Range(0, 1024),
    "seed": Range(0, 2**32 - 1),
    "data_seed": Range(0, 2**32 - 1),
}
"""Ranges of numbers in trl.RewardConfig; the recipe's type has them, and so `read_recipe` checks them. With `CHOICES`
these are all fields that a recipe may set: the others read or write elsewhere (``push_to_hub``, ``deepspeed``,
``resume_from_checkpoint``), compute in another precision, or do nothing here."""


def trainer_arguments(folder: Path, seed: int, given: Mapping[str, Any]) -> TrainingArguments:
    """TRL's arguments for the run in ``folder``; ``given``: the recipe's trainer fields. Raises MetronomeError for
    fields or values that cannot be."""
    _prepare_libraries(folder, given)
    from trl import RewardConfig  # after the settings above: it reads them when imported

    _check_fields(get_type_hints(RewardConfig), given)
    if "wandb" in str(given.get("report_to")):
        folder.mkdir(parents=True, exist_ok=True)  # WANDB_DIR
    chosen = {"report_to": "none", "seed": seed} | dict(given)
    try:
        arguments = RewardConfig(
            output_dir=str(folder / "checkpoints"), use_cpu=_stays_on_cpu(), **FIXED_FIELDS, **chosen
        )
    except (TypeError, ValueError) as error:
        raise MetronomeError(f"recipe: trainer: {' '.join(str(error).split())}") from error
    _check_place(arguments)
    if arguments.max_steps == 0 or (arguments.max_steps < 0 and arguments.num_train_epochs <= 0):
        raise MetronomeError(
            "recipe: trainer.max_steps and trainer.num_train_epochs give no step; set one of them to 1 or more"
        )
    return arguments


def _stays_on_cpu() -> bool:
    """Whether accelerate must be told so; it takes a GPU wherever it sees one. Told so it would leave out DeepSpeed."""
    return dispatch.device().type == "cpu" and not uses_deepspeed()


def _check_place(arguments: TrainingArguments) -> None:
    """Raises MetronomeError when accelerate puts the trainer on another device than the recipe, or takes each of
    several processes for the only one."""
    launched, wanted = Launched.read(), dispatch.device().type
    found = "cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else arguments.device.type
    if found != wanted:
        placed, file = ("cpu", "reward.yaml") if wanted == "cpu" else ("cuda", "gpu.yaml")
        raise MetronomeError(
            f"placement.device is {placed}, but as this process was launched the trainer works on {found}: launch with "
            f"configs/accelerate/{file}, or start by `python -m reward.train`"
        )
    if launched is not None and launched.world != arguments.world_size:
        raise MetronomeError(
            f"the launcher started {launched.world} processes, but accelerate counts {arguments.world_size} (on the "
            "CPU its DeepSpeed integration takes every process for the only one): launch with --num_processes 1, or "
            "with configs/accelerate/reward.yaml"
        )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one GPU a process; transformers would split each batch over all that it sees


def _check_fields(types: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises MetronomeError for the first field that a recipe may not set, or whose value cannot be."""
    for name, value in given.items():
        if problem := _problem(types, name, value):
            raise MetronomeError(f"recipe: trainer.{name} is {shown(value)}: {problem}")


def _problem(types: Mapping[str, Any], name: str, value: Any) -> str | None:
    known = {*RANGES, *CHOICES, "run_name"}
    if name not in known:
        return f"reward training has no such field; there are {', '.join(sorted(known))}"
    try:
        TypeAdapter(types[name]).validate_python(value, strict=True)
    except ValidationError as error:
        text = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"])
        return f"{text[:1].lower()}{text[1:]}"
    choices = CHOICES.get(name, ())
    several = value if name == "report_to" and isinstance(value, list) else [value]
    if choices and any(one not in choices for one in several):
        return f"choose {', '.join(map(str, choices[:-1]))} or {choices[-1]}"
    return None


def trainer_defaults(arguments: TrainingArguments) -> dict[str, Any]:
    """Each field's value in a recipe that does not name it."""
    return {f.name: f.default for f in fields(arguments)}


def _prepare_libraries(folder: Path, given: Mapping[str, Any]) -> None:
    """Sets what trl reads when it is imported."""
    prepare_process()
    if wrong := sorted(given.keys() & (FIXED_FIELDS.keys() | {"output_dir", "use_cpu"})):
        raise MetronomeError(f"recipe: trainer.{wrong[0]} is set by the program; remove it")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use otherwise
    if "wandb" in str(given.get("report_to")):
        for name, value in (("MODE", "offline"), ("DIR", str(folder)), ("PROJECT", "metronome"), ("NAME", folder.name)):
            os.environ.setdefault(f"WANDB_{name}", value)
    if uses_deepspeed():
        import_deepspeed()


def uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def optimizer(arguments: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, float]] | None:
    """AdamW by our op where the recipe asks for AdamW, as it does by default; None leaves another choice to TRL."""
    if arguments.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        return None
    numbers = {"beta1": arguments.adam_beta1, "beta2": arguments.adam_beta2, "eps": arguments.adam_epsilon}
    return AdamW, {"lr": arguments.learning_rate, **numbers}

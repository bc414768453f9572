"""Trains a reward model on preference pairs, with TRL's `RewardTrainer` (Bradley-Terry, margin, centring).

    accelerate launch --config_file configs/accelerate/reward.yaml -m reward.train --config configs/reward_timing.yaml

TRL gives the training loop and the form of the loss. Loss, clipping and AdamW are computed by our ops
(`reward.learned.graded`; under accelerate's DeepSpeed, DeepSpeed clips), and the model and the collator are ours: a
conversation that is in several pairs of a batch goes through the model once. Pairs are taken in the order of the data
set, in which pairs that share conversations stand together. ``--resume`` goes on from the newest checkpoint that has a
manifest and exactly the files listed there. Checkpoints are read with ``weights_only``, as tensors and plain values, so
that nothing in them is executed.

    runs/<name>/config.yaml, checkpoints/checkpoint-NNN/ (TRL's), model/ (RewardModel.load), summary.json
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("reward.train")

import json
import os
import pickle
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from kernels import dispatch
from kernels.adamw import AdamW
from kernels.errors import MetronomeError
from model.backbone.size import empty, training_bytes
from model.backbone.transformer import InteractionModel
from model.config import Preset, preset
from model.program.files import write_whole
from model.program.folders import RunName
from model.program.memory import check_room
from model.program.outputs import OutputFolder
from model.program.ranges import Fields, FilePath, Limit, Names, Range, Seed, Weight
from model.program.recipe import read_recipe
from model.program.startup import import_deepspeed, prepare_process
from model.tokenizer import load_tokenizer
from model.weights import checkpoint, manifest
from reward.learned.model import RewardModel
from reward.learned.preference import load_preferences
from reward.learned.trainable import Collator, Trainable

UNREAD_FILES = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py")
"""Files that TRL and DeepSpeed write into a checkpoint and nothing reads (a pickled object, scripts); they are
deleted."""


@dataclass(frozen=True)
class BackboneRecipe:
    """Where the backbone's weights come from."""

    checkpoint: FilePath | None = None  # a policy's folder in transformers' format; None: fresh weights of the preset
    preset: Preset = "tiny"


_EVERY = Range(0, 10**7, open_low=True)
TRAINER: dict[str, Limit] = {
    "learning_rate": Range(0.0, 1.0),
    "weight_decay": Range(0.0, 1.0),
    "adam_beta1": Range(0.0, 0.999999),
    "adam_beta2": Range(0.0, 0.999999),
    "adam_epsilon": Range(0.0, 1.0, open_low=True),
    "max_grad_norm": Range(0.0, 1e6),
    "center_rewards_coefficient": Range(0.0, 1e3),
    "num_train_epochs": Range(0, 10**4, open_low=True),
    "max_steps": Range(-1, 10**7),
    "warmup_steps": Range(0, 10**7),
    "warmup_ratio": Range(0.0, 1.0),
    "logging_steps": _EVERY,
    "save_steps": _EVERY,
    "eval_steps": _EVERY,
    "save_total_limit": Range(1, 10**6),
    "per_device_train_batch_size": Range(1, 10**5),
    "per_device_eval_batch_size": Range(1, 10**5),
    "gradient_accumulation_steps": Range(1, 10**5),
    "dataloader_num_workers": Range(0, 1024),
    "seed": Range(0, 2**32 - 1),
    "data_seed": Range(0, 2**32 - 1),
}
"""Ranges of numbers in trl.RewardConfig."""


@dataclass(frozen=True)
class RewardTrainConfig:
    """The recipe of `reward.train`."""

    name: Annotated[str, RunName()] = "reward_timing"
    runs: Annotated[str, OutputFolder()] = "runs"  # folder that holds run folders
    seed: Seed = 0
    axes: Names = ("timing",)  # axes of reward, a head for each on one backbone
    pairs: FilePath = "runs/reward_pairs"  # data set made by reward.pairs
    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    margin_scale: Weight = 1.0  # the loss subtracts margin_scale * margin; 0 turns margins off
    # If given, margins make soft labels instead (reward.learned.graded).
    rationality: Annotated[float, Range(1e-6, 1e6)] | None = None
    trainer: Annotated[dict[str, Any], Fields(TRAINER)] = field(default_factory=dict)  # any field of trl.RewardConfig


FIXED_FIELDS: dict[str, Any] = {
    "remove_unused_columns": False,  # TRL would drop all but three of our columns
    "max_length": None,
    "gradient_checkpointing": False,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
}
"""Fields of trl.RewardConfig that the program needs to have these values; a recipe may not set them."""


def main(arguments: list[str] | None = None) -> None:
    recipe = read_recipe("reward.train", "Train a reward model.", RewardTrainConfig, arguments, resumes=True)
    train(recipe.config, recipe.text, recipe.resume)


def train(config: RewardTrainConfig, recipe: str, resume: bool) -> None:
    """Trains and writes the run's folder. ``recipe``: the resolved recipe as YAML, saved with the run; ``resume``: go
    on from the newest finished checkpoint. Raises MetronomeError for a recipe, data set or folder that does not fit."""
    start = time.perf_counter()
    _check_room(config)
    folder = Path(config.runs) / config.name
    checkpoints = folder / "checkpoints"
    earlier = _prepare_folder(folder, recipe, resume)
    _prepare_libraries(folder, config)
    from trl import RewardConfig  # after the settings above: it reads them when imported

    from reward.learned.graded import GradedTrainer

    try:
        arguments = RewardConfig(
            output_dir=str(checkpoints), **FIXED_FIELDS, **({"report_to": "none", "seed": config.seed} | config.trainer)
        )
    except (TypeError, ValueError) as error:
        raise MetronomeError(f"recipe: trainer: {error}. The fields are those of trl.RewardConfig") from error
    is_main = arguments.process_index == 0
    model = RewardModel.build(_backbone(config), config.axes)
    rows = load_preferences(Path(config.pairs), "train", config.axes, model.backbone.audio_token_id)
    trainer = GradedTrainer(
        model=Trainable(model),
        args=arguments,
        data_collator=Collator(model.axes, model.backbone.audio_token_id, config.margin_scale, config.rationality),
        train_dataset=rows,
        processing_class=load_tokenizer(),
        optimizer_cls_and_kwargs=_optimizer(arguments),
        callbacks=[
            Report(arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size, recipe)
        ],
    )
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    if is_main:
        weights = sum(p.numel() for p in model.parameters())
        write_whole(folder / "config.yaml", recipe.encode())
        print(f"Run {config.name}: {len(rows)} pairs, {weights:,} parameters, {arguments.world_size} processes")
    try:
        result = trainer.train(resume_from_checkpoint=None if earlier is None else str(earlier))
    except pickle.UnpicklingError as error:
        pickled = re.search(r"GLOBAL (\S+)", str(error))
        kind = pickled[1] if pickled else "a pickle"
        raise MetronomeError(
            f"checkpoint {earlier}: one of its files is no plain data ({kind}) and was not read. "
            "Move the checkpoint away to resume from the one before it"
        ) from error
    model.repack()
    digest = checkpoint.weights_digest(model)
    if is_main:
        model.save(folder / "model")
        summary = {
            "weights_digest": digest,
            "contract_id": dispatch.contract_id(),
            "steps": result.global_step,
            "loss": result.training_loss,
            "pairs": len(rows),
            "wall_s": time.perf_counter() - start,
        }
        write_whole(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        print(f"weights_digest {digest}\nRun folder: {folder.resolve()}")


def _prepare_folder(folder: Path, recipe: str, resume: bool) -> Path | None:
    """The checkpoint to resume from; raises MetronomeError when the folder does not fit."""
    saved = folder / "config.yaml"
    if not resume:
        if saved.exists():
            raise MetronomeError(f"{folder} already holds a run; --resume goes on with it, or choose another --name")
        return None
    if not saved.is_file():
        raise MetronomeError(f"{folder} holds no run to resume (no config.yaml); start without --resume")
    if saved.read_text() != recipe:
        raise MetronomeError(f"{saved} is the recipe of another run; resuming needs the same one")
    finished = [
        (int(m[1]), path)
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / manifest.MANIFEST).exists()
    ]
    if not finished:
        raise MetronomeError(f"{folder / 'checkpoints'} holds no finished checkpoint; start under another --name")
    newest = max(finished)[1]
    manifest.check(newest, recipe=recipe)
    return newest


def _prepare_libraries(folder: Path, config: RewardTrainConfig) -> None:
    """Sets what trl reads when it is imported; raises MetronomeError for a recipe's value that cannot be."""
    prepare_process()
    if wrong := sorted(config.trainer.keys() & (FIXED_FIELDS.keys() | {"output_dir"})):
        raise MetronomeError(f"recipe: trainer.{wrong[0]} is set by the program; remove it")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use otherwise
    if "wandb" in str(config.trainer.get("report_to")):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (("MODE", "offline"), ("DIR", str(folder)), ("PROJECT", "metronome"), ("NAME", config.name)):
            os.environ.setdefault(f"WANDB_{name}", value)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
            raise MetronomeError(
                "on the CPU accelerate's DeepSpeed integration takes every process for the only one: launch with "
                "--num_processes 1, or with configs/accelerate/reward.yaml"
            )
        import_deepspeed()


def _optimizer(arguments: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, float]] | None:
    """AdamW by our op where the recipe asks for AdamW, as it does by default; None leaves another choice to TRL."""
    if arguments.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        return None
    numbers = {"beta1": arguments.adam_beta1, "beta2": arguments.adam_beta2, "eps": arguments.adam_epsilon}
    return AdamW, {"lr": arguments.learning_rate, **numbers}


def _check_room(config: RewardTrainConfig) -> None:
    """Raises MetronomeError for a backbone whose training this machine's memory has no room for."""
    path = config.backbone.checkpoint
    shape = preset(config.backbone.preset) if path is None else checkpoint.config_of(path)
    name = f"backbone.preset {config.backbone.preset!r}" if path is None else f"backbone.checkpoint {path!r}"
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * training_bytes(empty(shape, torch.float32))
    check_room(needed, f"recipe: {name}: training it", "take a smaller model, or a machine with more memory")


def _backbone(config: RewardTrainConfig) -> InteractionModel:
    if config.backbone.checkpoint is not None:
        return checkpoint.load(config.backbone.checkpoint, torch.float32)  # also of a policy in bf16
    model = InteractionModel(preset(config.backbone.preset))
    model.init_weights(config.seed)
    return model


class Report(TrainerCallback):
    """Prints a line at each of the trainer's logs, and writes the manifest of each finished checkpoint."""

    def __init__(self, pairs_a_step: int, recipe: str) -> None:
        self._pairs_a_step = pairs_a_step
        self._recipe = recipe
        self._last: tuple[float, int] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._last is None:
            self._last = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._last is None or logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        (then, before), now = self._last, time.perf_counter()
        self._last = now, state.global_step
        steps = state.global_step - before
        print(
            f"step {state.global_step}/{state.max_steps} · loss {float(logs['loss']):.4f} · pairs in order "
            f"{float(logs['accuracy']):.1%} · {steps * self._pairs_a_step / (now - then):.1f} pairs/s · "
            f"{(state.max_steps - state.global_step) * (now - then) / steps:.0f} s left",
            flush=True,
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes a file of its own
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            for name in UNREAD_FILES:
                (folder / name).unlink(missing_ok=True)
            manifest.write(folder, folder.name, self._recipe)

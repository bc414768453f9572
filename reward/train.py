"""Trains a reward model on preference pairs, with TRL's `RewardTrainer` (Bradley-Terry, margin, centring).

    accelerate launch --config_file configs/accelerate/reward.yaml -m reward.train --config configs/reward_timing.yaml
    python -m reward.train --config configs/reward_timing.yaml --placement.device cuda

TRL gives the training loop and the form of the loss. Loss, clipping and AdamW are computed by our ops
(`reward.learned.graded`; under accelerate's DeepSpeed, DeepSpeed clips), and the model and the collator are ours: a
conversation that is in several pairs of a batch goes through the model once. Pairs are taken in the order of the data
set, in which pairs that share conversations stand together. ``--resume`` goes on from the newest checkpoint that has a
manifest and exactly the files listed there, from the beginning where there is none yet, and ends with the weights of
the uninterrupted run or refuses (`reward.learned.resuming`); a finished run is left as it is. Checkpoints are read with
``weights_only``, as tensors and plain values, so that nothing in them is executed. A training whose numbers cease to be
finite stops with an error. Several processes watch one another as those of `rl.train` do (`model.program.heartbeat`).

    runs/<name>/config.yaml, origin.json (`TrainingOrigin`), checkpoints/checkpoint-NNN/ (TRL's),
                model/ (RewardModel.load), summary.json

The summary's ``loss`` is the mean over all ``steps`` of the loss before each one's update, and ``wall_s`` the time of
all parts of the run that led to its end.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("reward.train")

import copy
import os
import pickle
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.size import empty, training_bytes
from model.backbone.transformer import InteractionModel
from model.config import Preset, preset
from model.placement import Placement, PlacementConfig
from model.program import ranks
from model.program.exhausted import needing
from model.program.files import write_json, write_whole
from model.program.folders import RunName, locate
from model.program.launched import Launched, local_world
from model.program.memory import check_room
from model.program.outputs import OutputFolder
from model.program.ranges import Fields, FilePath, Names, Range, Seed, Weight
from model.program.recipe import read_recipe
from model.program.runs import RECIPE, check_free, sole_writer
from model.weights import checkpoint
from model.weights.card import card
from reward.learned import resuming
from reward.learned.card import facts
from reward.learned.model import RewardModel, check_silent
from reward.learned.origin import (
    TRAINING,
    TrainingOrigin,
    digest_of,
    read_training_origin,
    recipe_differences,
)
from reward.learned.preference import check_words, from_row, load_preferences, origin_of
from reward.learned.report import Report
from reward.learned.resuming import Progress
from reward.learned.settings import RANGES, optimizer, trainer_arguments, trainer_defaults, uses_deepspeed
from reward.learned.trainable import Collator, Trainable
from rollout.turn.vocabulary import Vocabulary

if TYPE_CHECKING:
    from reward.learned.graded import GradedTrainer

CHECKED_PAIRS = 8
"""How many pairs a trained model must be able to score before it is saved."""

SMALLER = (
    "lower trainer.per_device_train_batch_size, and raise trainer.gradient_accumulation_steps by as much (in a new run)"
)
"""What makes a training step need less memory. A run that goes on keeps both (`reward.learned.resuming`)."""


@dataclass(frozen=True)
class BackboneRecipe:
    """Where the backbone's weights come from."""

    checkpoint: FilePath | None = None  # a policy's folder in transformers' format; None: fresh weights of the preset
    preset: Preset = "tiny"


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
    trainer: Annotated[dict[str, Any], Fields(RANGES)] = field(default_factory=dict)  # of trl.RewardConfig's
    placement: PlacementConfig = field(default_factory=PlacementConfig)


def main(arguments: list[str] | None = None) -> None:
    recipe = read_recipe("reward.train", "Train a reward model.", RewardTrainConfig, arguments, resumes=True)
    folder = locate(recipe.config.runs, recipe.config.name)
    Placement.enter(recipe.config.placement, "float32")
    launched = Launched.read()
    if launched is None:
        os.environ.pop("LOCAL_RANK", None)  # accelerate would take it for a launcher's
    several = launched is not None and launched.world > 1  # accelerate takes the group of processes that it finds
    with ranks.joined() if several else nullcontext(), sole_writer(folder):
        train(recipe.config, recipe.text, recipe.resume)


def train(config: RewardTrainConfig, recipe: str, resume: bool) -> None:
    """Trains and writes the run's folder. ``recipe``: the resolved recipe as YAML, saved with the run; ``resume``: go
    on from the newest finished checkpoint, or from the beginning where there is none yet. Raises MetronomeError for a
    recipe, data set or folder that does not fit."""
    progress = Progress()
    folder = locate(config.runs, config.name)
    _check_folder(folder, resume)
    arguments = trainer_arguments(folder, config.seed, config.trainer)
    deciding = resuming.deciding_fields(asdict(config), trainer_defaults(arguments))
    before = read_training_origin(folder) if resume else None
    if before is not None:
        _check_same(folder, list(recipe_differences(before.recipe, deciding)))
        if (end := resuming.finished(folder)) is not None:
            print(
                f"Run {config.name} is finished: {end.steps} steps, weights_digest {end.weights_digest}. Left as it is"
            )
            return
    _check_room(config)
    model = RewardModel.build(_backbone(config), config.axes)
    rows = load_preferences(Path(config.pairs), "train", config.axes, model.backbone.senses)
    check_words(Path(config.pairs), Vocabulary.of(model.backbone))
    origin = TrainingOrigin(
        recipe=deciding,
        pairs=origin_of(Path(config.pairs)).digest,
        backbone=checkpoint.weights_digest(model.backbone),
        processes=arguments.world_size,
        contract_id=dispatch.contract_id(),
    )
    earlier = None
    if before is not None:
        called = config.backbone.checkpoint or config.backbone.preset
        _check_same(folder, list(before.differences(origin, config.pairs, called)))
        origin = before  # equal in meaning, and in the text that its checkpoints name
        earlier = resuming.newest_checkpoint(folder, origin, uses_deepspeed())
        if earlier is not None:
            progress.read(earlier)
    made_from = {"pairs": origin.pairs, "backbone": origin.backbone, "recipe": digest_of(origin.recipe)}

    def card_after(step: int, digests: Mapping[str, str]) -> str:
        made = {f"digest of its {name}": digest for name, digest in made_from.items()}
        return card(facts(config.name, config.axes, step, recipe, {**digests, **made}))

    trainer = _trainer(config, arguments, model, rows, Report(arguments, origin.text, progress, card_after))
    if arguments.process_index == 0:
        weights = sum(p.numel() for p in model.parameters())
        write_json(folder / TRAINING, asdict(origin))
        write_whole(folder / RECIPE, recipe.encode())
        print(f"Run {config.name}: {len(rows)} pairs, {weights:,} parameters, {arguments.world_size} processes")
    steps = _run(trainer, earlier)
    model.repack()
    model.origin = made_from
    model.card = card_after(steps, {"weights digest": checkpoint.weights_digest(model)})
    _check_scores(model, rows)
    summary = {
        "weights_digest": checkpoint.weights_digest(model),
        "contract_id": dispatch.contract_id(),
        "steps": steps,
        "loss": progress.loss_sum / steps,
        "pairs": len(rows),
        "wall_s": progress.wall_s,
        "origin": model.origin,
    }
    if arguments.process_index == 0:
        model.save(folder / resuming.MODEL)
        write_json(folder / resuming.SUMMARY, summary)
        print(f"weights_digest {summary['weights_digest']}\nRun folder: {folder.resolve()}")


def _check_scores(model: RewardModel, rows: Dataset) -> None:
    """Raises NotFiniteError when a trained model cannot score the first pairs: weights can be finite and too large."""
    some = [from_row(rows[i]) for i in range(min(CHECKED_PAIRS, len(rows)))]
    model.score([stretch for pair in some for stretch in (pair.chosen, pair.rejected)])


def _check_folder(folder: Path, resume: bool) -> None:
    if not resume:
        check_free(folder)
        ranks.gather(None)  # all look before the first one writes
    elif not (folder / RECIPE).is_file():
        raise MetronomeError(f"{folder} holds no run to resume (no {RECIPE}); start without --resume")


def _check_same(folder: Path, differences: list[str]) -> None:
    if differences:
        raise MetronomeError(
            f"{folder} cannot be resumed, it would end with other weights: {'; '.join(differences)}. Put back what it "
            "began with, or start a new run under another --name"
        )


def _trainer(
    config: RewardTrainConfig, arguments: TrainingArguments, model: RewardModel, rows: Dataset, report: Report
) -> GradedTrainer:
    from reward.learned.graded import GradedTrainer  # imports trl

    try:
        trainer = GradedTrainer(
            model=Trainable(model),
            args=arguments,
            data_collator=Collator(model.axes, model.backbone.senses.audio, config.margin_scale, config.rationality),
            train_dataset=rows,
            processing_class=copy.deepcopy(Vocabulary.of(model.backbone).tokenizer),  # TRL writes to it
            optimizer_cls_and_kwargs=optimizer(arguments),
            callbacks=[report],
            progress=report.progress,
        )
    except (ValueError, RuntimeError) as error:  # RuntimeError: a tracker is not installed
        raise MetronomeError(f"recipe: trainer: {' '.join(str(error).split())}") from error
    for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(callback)
    return trainer


@needing("the training of a reward model", SMALLER)
def _run(trainer: GradedTrainer, earlier: Path | None) -> int:
    """Trains to the last step, from the checkpoint ``earlier`` if there is one; the number of steps."""
    if earlier is not None:
        resuming.load_weights(trainer.model, earlier)  # TRL does so again, but looks at nothing
        if (steps := resuming.steps_at_end(earlier)) is not None:  # TRL would take one more
            return steps
    try:
        return int(trainer.train(resume_from_checkpoint=None if earlier is None else str(earlier)).global_step)
    except pickle.UnpicklingError as error:
        pickled = re.search(r"GLOBAL (\S+)", str(error))
        kind = pickled[1] if pickled else "a pickle"
        raise MetronomeError(
            f"checkpoint {earlier}: one of its files is no plain data ({kind}) and was not read. "
            "Move the checkpoint away to resume from the one before it"
        ) from error


def _check_room(config: RewardTrainConfig) -> None:
    """Raises MetronomeError for a backbone whose training this machine's memory has no room for."""
    path = config.backbone.checkpoint
    shape = preset(config.backbone.preset) if path is None else checkpoint.config_of(path)
    name = f"backbone.preset {config.backbone.preset!r}" if path is None else f"backbone.checkpoint {path!r}"
    device = dispatch.device()
    sharing = local_world() if device.type == "cpu" else 1  # one GPU a process
    needed = sharing * training_bytes(empty(shape, torch.float32), gradients=0).total
    check_room(needed, f"recipe: {name}: training it", "take a smaller model, or a machine with more memory", device)


def _backbone(config: RewardTrainConfig) -> InteractionModel:
    if config.backbone.checkpoint is not None:
        backbone = checkpoint.load(config.backbone.checkpoint, torch.float32)  # also of a policy in bf16
        check_silent(backbone, f"backbone.checkpoint: {config.backbone.checkpoint}")
        return backbone
    model = InteractionModel(preset(config.backbone.preset))
    model.init_weights(config.seed)
    return model.to(dispatch.device())

"""Resuming a reward training: only what would end with the weights of the uninterrupted run is resumed.

What decides those weights is written into the run's folder at its start (`TrainingOrigin`) and compared at each resume;
the manifest of each checkpoint covers it too. Where to store, log and save decides nothing and may change, and so may
the paths of pairs and backbone, whose content is compared.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from kernels.errors import MetronomeError
from model.program.files import write_json
from model.program.ranges import Range
from model.program.reading import UnreadableError, read_record
from model.weights import checkpoint, manifest
from model.weights.finite import check_finite
from model.weights.tensors import read_tensors
from reward.learned.model import RewardModel
from reward.learned.origin import TrainingOrigin

SUMMARY, MODEL, PROGRESS, STATE = "summary.json", "model", "progress.json", "trainer_state.json"
WEIGHTS = "model.safetensors"
AWAY = "Move the checkpoint away to resume from the one before it"
SAVING_AND_LOGGING = ("logging_", "log_", "save_", "report_to", "run_name", "disable_tqdm")
"""How the names of those trainer fields begin that decide no weight."""

StepCount = Annotated[int, Range(1, 10**9)]
"""A training takes a step at least, and saves after a step only."""


@dataclass
class Progress:
    """What a run did so far, in all its parts; each checkpoint remembers it. Work that was lost with the part after a
    checkpoint does not count."""

    loss_sum: float = 0.0  # over the steps, of the loss before the step's update
    earlier_s: float = 0.0  # wall seconds of the parts before this one
    start: float = field(default_factory=time.perf_counter)

    @property
    def wall_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self.start

    def write(self, folder: Path) -> None:
        write_json(folder / PROGRESS, asdict(Totals(self.loss_sum, self.wall_s)))

    def read(self, folder: Path) -> None:
        totals = read_record(folder / PROGRESS, Totals)
        self.loss_sum, self.earlier_s = totals.loss_sum, totals.wall_s


@dataclass(frozen=True)
class Totals:
    """`Progress` in a checkpoint."""

    loss_sum: float
    wall_s: Annotated[float, Range(0, 10**10)]


@dataclass(frozen=True)
class State:
    """What we read of TRL's record of a training's state."""

    global_step: StepCount  # finished steps
    max_steps: StepCount


@dataclass(frozen=True)
class Finished:
    """What we read of a finished run's summary."""

    weights_digest: str
    steps: StepCount


def deciding_fields(recipe: Mapping[str, Any], trainer_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields that decide weights, by dotted name. ``recipe``: of `reward.train`, as plain values; trainer
    fields that have their default value are left out."""
    kept = {name: recipe[name] for name in ("seed", "axes", "margin_scale", "rationality")}
    kept |= {
        f"trainer.{name}": value
        for name, value in recipe["trainer"].items()
        if not name.startswith(SAVING_AND_LOGGING) and trainer_defaults.get(name, ...) != value
    }
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def finished(folder: Path) -> Finished | None:
    """The end of the run in ``folder``, or None before its end. Raises MetronomeError when its model is damaged or
    another than the one that it ended with."""
    if not (folder / SUMMARY).is_file() or not (folder / MODEL).is_dir():
        return None
    end = read_record(folder / SUMMARY, Finished)
    digest = checkpoint.weights_digest(RewardModel.load(folder / MODEL))
    if digest != end.weights_digest:
        raise MetronomeError(
            f"{folder / MODEL}: has the weights {digest}, but {SUMMARY} says that the run ended with "
            f"{end.weights_digest}; move one of them away to resume from the last checkpoint"
        )
    return end


def newest_checkpoint(folder: Path, origin: TrainingOrigin, deepspeed: bool) -> Path | None:
    """The checkpoint to resume from: the newest that has a manifest; None for a run that was stopped before its first.
    Raises MetronomeError when it is damaged, of another run, or lacks a part of the training's state, and when there is
    none of a run that has come to its end."""
    saved = [
        (int(m[1]), path)
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / manifest.MANIFEST).exists()
    ]
    if not saved:
        if not (folder / SUMMARY).exists():
            return None
        raise MetronomeError(
            f"{folder / 'checkpoints'} holds no finished checkpoint (trainer.save_strategy and trainer.save_steps say "
            "when one is written); start under another --name"
        )
    newest = max(saved)[1]
    manifest.check(newest, recipe=origin.text)
    several = origin.processes > 1
    rng = [f"rng_state_{rank}.pth" for rank in range(origin.processes)] if several else ["rng_state.pth"]
    state = ["latest"] if deepspeed else ["optimizer.pt", "scheduler.pt"]
    for name in (WEIGHTS, STATE, PROGRESS, *state, *rng):
        if not (newest / name).is_file():
            raise MetronomeError(
                f"checkpoint {newest}: has no {name}, without which a resumed training ends with other weights "
                "(trainer.save_only_model leaves it out); start under another --name"
            )
    return newest


def steps_at_end(folder: Path) -> int | None:
    """The number of a training's steps where the checkpoint in ``folder`` is of its last one; None before that."""
    state = read_record(folder / STATE, State)
    return state.global_step if state.global_step >= state.max_steps else None


def load_weights(model: nn.Module, folder: Path) -> None:
    """Sets a trained module's weights to those of a checkpoint. Raises MetronomeError for weights that are damaged, not
    finite, or of another model."""
    stored = read_tensors(folder / WEIGHTS)
    check_finite(f"checkpoint {folder}", stored.items(), AWAY)
    try:
        model.load_state_dict(stored)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise UnreadableError(folder / WEIGHTS, f"holds no weights of this model ({problem}). {AWAY}") from None

"""What `reward.train` adds to TRL's trainer while it runs: a line for people, a check of the weights after each step,
and our part of its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from model.program.files import write_whole
from model.weights import manifest
from model.weights.card import CARD
from model.weights.finite import check_finite
from reward.learned.resuming import Progress

UNREAD_FILES = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py")
"""Files that TRL and DeepSpeed write into a checkpoint and nothing reads (a pickled object, scripts); they are
deleted."""
REMEDY = "no model was written; lower trainer.learning_rate"
"""For a training whose numbers have left those that fp32 can hold."""


def diverged(step: int) -> str:
    """How the one line begins in which such a training ends; ``step``: from 1."""
    return f"training diverged at step {step}"


class Report(TrainerCallback):
    """Prints a line at each of the trainer's logs, checks the weights after each step, and writes what we add to each
    finished checkpoint: `Progress`, a model card and a manifest."""

    def __init__(
        self,
        arguments: TrainingArguments,
        origin: str,
        progress: Progress,
        card: Callable[[int, Mapping[str, str]], str],
    ) -> None:
        """``origin``: text of the run's `TrainingOrigin`; ``progress``: as the trainer counts it; ``card``: the model
        card after so many steps, with some digests."""
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        self.progress = progress
        self._pairs_a_step = batch
        self._origin = origin
        self._card = card
        self._last: tuple[float, int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # when to save and log by this recipe, not by the checkpoint's

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None  # as TRL calls it
        check_finite(diverged(state.global_step), model.named_parameters(), REMEDY)

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
            self.progress.write(folder)
            write_whole(folder / CARD, self._card(state.global_step, {}).encode())
            manifest.write(folder, folder.name, self._origin)

"""Any number of processes takes AdamW's step on the sum of their gradients, exactly, and saves what one can load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import torch

from model.backbone.size import empty, training_bytes
from model.config import preset
from model.weights.checkpoint import weights_digest
from rl.learner.deepspeed import Learner
from tests.rl.steps_of_ranks import STEPS, gradient, learner, take
from tests.support.settings import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("world")]


def launched(folder: Path, processes: int, stage: int, dtype: str, *more: str) -> str:
    """The digest that so many processes end with. Checks that each holds the part of the moments that was foreseen."""
    command = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    command += ["--num_processes", str(processes), "-m", "tests.rl.steps_of_ranks"]
    command += [str(folder), str(stage), dtype, *more]
    done = run(command, {})
    assert done.returncode == 0, done.stderr[-3000:]
    foreseen = training_bytes(empty(preset("nano"), getattr(torch, dtype)), stage, processes).optimizer
    foreseen = foreseen * 2 // 3 if stage else foreseen  # the rest is DeepSpeed's copy of the values
    moments = int(re.findall(r"moments (\d+)", done.stdout)[0])
    assert foreseen <= moments < 1.01 * foreseen, "DeepSpeed pads to a few numbers"
    return re.findall(r"digest ([0-9a-f]{32})", done.stdout)[0]


def summed(of: Learner, processes: int, step: int) -> list[torch.Tensor]:
    """The ranks' gradients added in rank order, as one process hands them over."""
    total, *rest = (gradient(of, rank, step) for rank in range(processes))
    for other in rest:
        total = [a + b for a, b in zip(total, other, strict=True)]
    return total


@pytest.mark.parametrize(
    ("processes", "stage", "dtype"),
    [
        (2, 1, "float32"),
        (3, 1, "float32"),
        (3, 2, "float32"),
        (3, 0, "float32"),
        (3, 1, "bfloat16"),
        (5, 2, "bfloat16"),
    ],
)
def test_steps_are_those_of_one_process(processes: int, stage: Literal[0, 1, 2], dtype: str, tmp_path: Path) -> None:
    """Three and five equal gradients have no exact mean: a third of a sum of three is not always the gradient."""
    digest = launched(tmp_path, processes, stage, dtype)
    one = learner(0, getattr(torch, dtype))
    for step in range(STEPS):
        take(one, summed(one, processes, step))
    assert weights_digest(one.model) == digest
    # The state that they saved together goes on in one process, and takes the step that the one would.
    other = learner(1, getattr(torch, dtype))
    other.model.load_state_dict(one.model.state_dict())
    other.model.repack()
    other = Learner(other.model, other.optim, other.steps)
    other.load(tmp_path)
    for each in (one, other):
        take(each, summed(each, processes, STEPS))
    assert weights_digest(one.model) == weights_digest(other.model) != digest


def test_control_the_mean_of_equal_gradients_is_another_step(tmp_path: Path) -> None:
    """(g + g + g) / 3 is not always g: DeepSpeed's own mean, of what every rank hands over."""
    assert launched(tmp_path, 3, 1, "float32", "mean") != launched(tmp_path, 3, 1, "float32")

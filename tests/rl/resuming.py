"""A tiny run for the tests of `--resume`: started, cut short, resumed and looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import MetronomeError
from rl.resume import finished
from rl.run import Run
from rl.train import parse

TINY: dict[str, Any] = {
    "model.preset": "nano",
    "warmstart.steps": 1,
    "warmstart.episodes": 1,
    "warmstart.optim.lr": "3e-3",
    "scenarios.families": "[timespeak]",
    "rl.steps": 3,
    "rl.groups": 1,
    "rl.rollouts": 2,
    "rl.checkpoint_every": 1,
    "rl.save_episodes_every": 1,
    "eval.scenarios": 1,
    "eval.during": 1,
}


def arguments(runs: Path, name: str, **changed: Any) -> list[str]:
    recipe = TINY | {"runs": runs, "name": name} | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"--{key}={value}" for key, value in recipe.items()]


def go(runs: Path, name: str, resume: bool = True, **changed: Any) -> str:
    """Runs or resumes, and returns what is said of a finished run; "" when it ran."""
    config, _, text = parse(arguments(runs, name, **changed))
    said = finished(config) if resume else ""
    if not said:
        Run(config, text, resume).execute()
    return said


def refusal(runs: Path, name: str, **changed: Any) -> str:
    before = content(runs)
    with pytest.raises(MetronomeError) as error:
        go(runs, name, **changed)
    assert "\n" not in str(error.value) and content(runs) == before, "nothing is written"
    return str(error.value)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def digests(folder: Path) -> list[str]:
    """Of the weights after each step."""
    return [json.loads(line)["weights_digest"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cut(folder: Path, step: int) -> None:
    """Leaves a folder as a run does that is killed in its step ``step``."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (folder / "summary.json").unlink()

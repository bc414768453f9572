"""The recipe of seeing, made short: frames go from the simulated user through sessions, records, learner and audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import MetronomeError
from rl.run import Run
from rl.train import parse
from rollout.record.episode import load_episodes

RECIPE = str(Path(__file__).resolve().parents[2] / "configs/eyes.yaml")
SHORT = ["--model.preset", "nano", "--warmstart.steps", "2", "--warmstart.episodes", "2", "--rl.steps", "2"]
SHORT += ["--rl.groups", "2", "--rl.rollouts", "2", "--eval.scenarios", "2", "--eval.during", "1"]


def summary(runs: Path, name: str, *arguments: str) -> dict[str, Any]:
    config, resume, recipe = parse(["--config", RECIPE, *SHORT, "--runs", str(runs), "--name", name, *arguments])
    Run(config, recipe, resume).execute()
    found: dict[str, Any] = json.loads((runs / name / "summary.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_the_recipe_trains_and_its_bits_are_equal(tmp_path: Path) -> None:
    once = summary(tmp_path, "once")
    assert once["mismatch/num_unequal"] == once["mismatch/rows_unequal"] == 0 < once["mismatch/num_tokens"]
    assert json.loads((tmp_path / "once/audit/report.json").read_text())["verdict"] == "identical"
    assert once.keys() >= {f"eval/{when}/{name}" for when in ("before", "after") for name in ("lookout", "interval")}
    episodes = load_episodes(tmp_path / "once/episodes/step_000000.rank_0.safetensors")
    assert len(episodes) == 4 and all(len(one.frames.chunks()) == 40 for one in episodes)
    assert summary(tmp_path, "again")["weights_digest"] == once["weights_digest"]
    fainter = summary(tmp_path, "fainter", "--scenarios.lookout.looks.contrast", "[69, 70]")  # the control
    assert fainter["weights_digest"] != once["weights_digest"]


@pytest.mark.usefixtures("world")
def test_a_recipe_without_room_for_its_pictures_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match=r"rollout.max_patches is 3, .* 4 patches"):
        summary(tmp_path, "blind", "--rollout.max_patches", "3")
    assert not any(tmp_path.iterdir())

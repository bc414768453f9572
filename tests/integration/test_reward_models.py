"""Reward models by the commands a user gives: pairs, training twice and resumed, evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint
from reward.learned.model import RewardModel

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = [
    str(Path(sys.executable).parent / "accelerate"),
    "launch",
    "--config_file",
    "configs/accelerate/reward.yaml",
    "-m",
]


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


def train(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    done = run(
        [*LAUNCH, "reward.train", "--config", "configs/reward_timing.yaml"], "--name", name, "--runs", str(folder),
        "--pairs", str(folder / "pairs"), "--backbone.checkpoint", "null", "--trainer.max_steps", "4",
        "--trainer.save_steps", "2", "--trainer.logging_steps", "1", "--trainer.per_device_train_batch_size", "4",
        *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pairs/s" in done.stdout
    found: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return found


@pytest.mark.slow
def test_pairs_training_and_evaluation(tmp_path: Path) -> None:
    python = [sys.executable, "-m"]
    made = run(
        [*python, "reward.pairs"], "--out", str(tmp_path / "pairs"), "--corruptions.train_scenarios", "8",
        "--corruptions.held_out_scenarios", "8", "--rollouts.policies", "[]",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]

    first, second = train(tmp_path, "first"), train(tmp_path, "second")
    assert first["weights_digest"] == second["weights_digest"]
    other = train(tmp_path, "other", "--rationality", "1")  # the control: another loss, other weights
    certain = train(tmp_path, "certain", "--rationality", "null")
    assert len({found["weights_digest"] for found in (first, other, certain)}) == 3
    refused = run([*LAUNCH, "reward.train", "--config", "configs/reward_timing.yaml"], "--rationality", "0")
    assert refused.returncode != 0 and "rationality is 0.0" in refused.stderr

    cut = tmp_path / "second"
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")  # as if the run had been killed in its third step
    shutil.rmtree(cut / "model")
    (cut / "summary.json").unlink()
    assert train(tmp_path, "second", "--resume")["weights_digest"] == first["weights_digest"]

    deepspeed = ["--trainer.max_steps", "2", "--name", "deepspeed", "--runs", str(tmp_path)]
    launch = [*LAUNCH[:3], "configs/accelerate/cpu.yaml", "--num_processes"]
    rest = ["-m", "reward.train", "--config", "configs/reward_timing.yaml", "--pairs", str(tmp_path / "pairs")]
    rest += ["--backbone.checkpoint", "null", "--trainer.per_device_train_batch_size", "4", *deepspeed]
    two = run([*launch, "2", *rest])
    assert two.returncode != 0 and "launch with --num_processes 1" in two.stderr
    one = run([*launch, "1", *rest])
    assert one.returncode == 0 and "weights_digest" in one.stdout, one.stderr[-3000:]

    policy = InteractionModel(preset("tiny"))
    policy.init_weights(5)
    checkpoint.save(policy, tmp_path / "policy")
    report = tmp_path / "report.json"
    judged = run(
        [*python, "reward.evaluate"], "--models", f"[{tmp_path / 'first' / 'model'}]", "--pairs",
        str(tmp_path / "pairs"), "--unseen.policy.checkpoint", str(tmp_path / "policy"), "--unseen.scenarios", "3",
        "--json", str(report),
    )  # fmt: skip
    assert judged.returncode == 0, judged.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found.keys() >= {"timing/accuracy", "timing/accuracy/family/timespeak", "timing/ece", "timing/spearman"}
    assert 0 <= found["timing/accuracy"] <= 1 and 0 < found["speed/score_of_rollout/timing"] < 1
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert RewardModel.load(tmp_path / "first" / "model").temperature["timing"] == found["timing/temperature"]

    again = run([*python, "reward.pairs"], "--out", str(tmp_path / "pairs"))
    assert again.returncode == 2 and "takes no others" in again.stderr and "Traceback" not in again.stderr

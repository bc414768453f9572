"""Reward commands, and RL on a learned reward, give on the pretend GPU what they give on the CPU, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from kernels.errors import MetronomeError
from model.weights.tensors import read_tensors
from reward.learned.model import RewardModel
from reward.learned.origin import read_pairs_origin
from reward.train import main as train
from tests.reward.on_a_device import inputs, scores, training
from tests.support.models import reward_model

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ("cpu", "cuda")

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} cannot make a device in Python",
)


def both(*commands: list[str]) -> None:
    """Runs the commands at the same time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for command in commands
    ]  # fmt: skip
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``cpu`` and ``cuda`` with the results of `tests.reward.on_a_device`."""
    folder = tmp_path_factory.mktemp("devices")
    inputs(folder / "cpu")
    shutil.copytree(folder / "cpu", folder / "cuda")
    both(*(["tests.reward.on_a_device", device, str(folder / device)] for device in DEVICES))
    return folder


def test_a_training_ends_with_the_cpus_weights(made: Path) -> None:
    cpu, cuda = (read(made / device / "trained/summary.json") for device in DEVICES)
    assert cuda["weights_digest"] == cpu["weights_digest"] and cuda["loss"] == cpu["loss"]
    assert cuda["contract_id"] != cpu["contract_id"]
    controls = read(made / "cuda/controls.json")
    assert controls["copies"] > 100
    assert controls["spoilt"] != cpu["weights_digest"]


def test_what_is_left_on_the_cpu_is_named_by_its_line(made: Path) -> None:
    said = read(made / "cuda/controls.json")["mixed"]
    assert re.search(r"found at least two devices, .*; reward/learned/trainable\.py:\d+ in stretch_scores\)", said)


def test_scores_are_the_cpus_and_a_model_crosses(made: Path) -> None:
    cpu, cuda = (read_tensors(made / device / "scores") for device in DEVICES)
    assert cpu.keys() == cuda.keys() and all(torch.equal(cpu[i], cuda[i]) for i in cpu)
    crossed = scores(RewardModel.load(made / "cuda/trained/model"))
    assert all(torch.equal(crossed[i], cuda[i]) for i in cuda)
    assert not torch.equal(cpu["2"][:4], cpu["3"][:4])  # the control


def test_pairs_are_the_cpus(made: Path) -> None:
    cpu, cuda = (read_pairs_origin(made / device / "made") for device in DEVICES)
    assert cuda.digest == cpu.digest and cuda.pairs == cpu.pairs and min(cpu.pairs.values()) > 0
    assert cpu.digest != read_pairs_origin(made / "cpu/pairs").digest


def test_evaluation_and_hacks_are_the_cpus(made: Path) -> None:
    cpu, cuda = (read(made / device / "report.json") for device in DEVICES)
    own = {name for name in cpu if name == "contract_id" or name.startswith("speed/")}
    assert {name for name in cpu.keys() | cuda.keys() if cpu.get(name) != cuda.get(name)} == own
    assert {"timing/temperature", "content/accuracy", "unseen_episodes"} <= cpu.keys() - own
    assert read(made / "cuda/hacks.json") == read(made / "cpu/hacks.json")


def test_a_training_is_not_resumed_on_another_device(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cuda", tmp_path / "cuda")
    shutil.rmtree(tmp_path / "cuda/trained/model")
    with pytest.raises(MetronomeError, match=r"cannot be resumed, .*: the kernels' contract is \w+, and was \w+"):
        train([*training("cpu", tmp_path / "cuda", "trained"), "--resume"])


@pytest.mark.slow
def test_a_run_on_learned_rewards_is_the_cpus(tmp_path: Path) -> None:
    reward_model(seed=1).save(tmp_path / "model")
    recipe = [
        "--config", "configs/quickstart_both.yaml", "--runs", str(tmp_path), "--model.checkpoint", "null",
        "--model.preset", "nano", "--source.models", f"[{tmp_path / 'model'}]", "--rl.steps", "2", "--rl.groups", "2",
        "--rl.rollouts", "2", "--eval.scenarios", "1", "--eval.during", "1",
    ]  # fmt: skip
    both(
        ["rl.train", *recipe, "--name", "cpu"],
        ["tests.support.pretend.run", "rl.train", *recipe, "--name", "cuda", "--placement.device", "cuda"],
    )
    cpu, cuda = (read(tmp_path / device / "summary.json") for device in DEVICES)
    assert {name for name in cpu.keys() | cuda.keys() if cpu.get(name) != cuda.get(name)} == {"wall_s"}
    assert cpu["proxy/after/timespeak"] != cpu["proxy/after/turn_taking"] and cpu["mismatch/num_unequal"] == 0

"""Processes started by the real launcher with the shipped files: DeepSpeed compiles nothing, an error is told once, and
several processes with a GPU each, here pretend ones, end as those of a CPU do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def launch(
    folder: Path, body: str, processes: int = 2, launcher: str = "cpu", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``main()`` of a command module holding ``body`` in launched processes."""
    (folder / "some_command.py").write_text(body)
    (folder / "start.py").write_text("from model.program.startup import run_command\nrun_command('some_command')\n")
    variables = {"PYTHONPATH": f"{folder}:{ROOT}", "METRONOME_BACKEND": "reference"} | environment
    return start(launcher, ["--num_processes", str(processes), "-m", "start"], variables)


def start(launcher: str, arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Accelerate's launcher with a shipped file. A variable of no value is taken out of the environment."""
    config = str(ROOT / f"configs/accelerate/{launcher}.yaml")
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config, *arguments],
        cwd=ROOT,
        env={name: value for name, value in (os.environ | variables).items() if value},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_error_of_every_process_is_told_once(tmp_path: Path) -> None:
    done = launch(
        tmp_path, "from kernels.errors import MetronomeError\ndef main(): raise MetronomeError('no such recipe')"
    )
    assert done.returncode != 0
    assert ("\n" + done.stderr).count("\nerror: no such recipe\n") == 1 and "error (process 1)" not in done.stderr
    assert "error: no such recipe" in done.stderr.splitlines()[-2], "the launcher's report ends with it"


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_is_told_though_the_other_waits(tmp_path: Path, failing: int) -> None:
    done = launch(
        tmp_path,
        f"""
import torch.distributed as dist
from kernels.errors import MetronomeError
from model.program import ranks
from model.program.startup import import_deepspeed

def main():
    import_deepspeed().init_distributed(dist_backend="gloo", verbose=False)
    ranks.gather("both are here")
    if dist.get_rank() == {failing}:
        raise MetronomeError("disk full")
    ranks.gather("never comes")
""",
    )
    assert done.returncode != 0
    assert "error (process 1): disk full" in done.stderr if failing else "error: disk full" in done.stderr
    assert "ended unexpectedly" not in done.stderr and "gloo" not in done.stderr


PRETEND = """
from tests.support.pretend.run import be_the_gpu
be_the_gpu()
from model.program import gpu
gpu.COLLECTIVES = "cpu:gloo,pretend:gloo"  # a backend for each device, as between GPUs
"""


@pytest.mark.parametrize(("launcher", "device"), [("cpu", "cpu"), ("gpus", "cuda")])
def test_ranks_tensors_are_added_in_rank_order(launcher: str, device: str, tmp_path: Path) -> None:
    """Three ranks: the order of two cannot be told from a sum. Objects never go by way of the GPU."""
    done = launch(
        tmp_path,
        (PRETEND if device == "cuda" else "")
        + f"DEVICE = {device!r}"
        + """
import torch
import torch.distributed as dist
from kernels import dispatch
from model.placement import Placement, PlacementConfig
from model.program import ranks

def main():
    where = Placement.enter(PlacementConfig(DEVICE), "float32").device
    ranks.join()
    assert dist.distributed_c10d._get_object_coll_device() == "cpu"
    mine = torch.randn(1003, generator=torch.Generator().manual_seed(ranks.rank()))
    first, second, third = ranks.gather(mine)
    found = ranks.sum_in_order(mine.to(where))
    assert found.device.type == where.type == ("cpu" if DEVICE == "cpu" else "pretend")
    found = found.cpu()
    assert torch.equal(found, first + second + third)
    assert not torch.equal(found, third + second + first)
    assert torch.equal(mine, (first, second, third)[ranks.rank()]), "the rank's own tensor stays as it was"
    ranks.leave()
""",
        processes=3,
        launcher=launcher,
        METRONOME_BACKEND="reference" if device == "cpu" else "",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("launcher", ["gpu", "gpus"])
def test_no_gpu_is_one_error_under_the_launcher(launcher: str, tmp_path: Path) -> None:
    arguments = ["-m", "rl.train", "--placement.device", "cuda", "--runs", str(tmp_path / "runs")]
    done = start(launcher, arguments, {"METRONOME_BACKEND": ""})
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    error = f"error: placement.device is cuda, but torch {torch.__version__}"
    assert f"\n{done.stderr}".count(f"\n{error}") == 1 and "error (process 1)" not in done.stderr
    assert error in done.stderr.splitlines()[-2], "the launcher's report ends with it"


def test_two_processes_with_a_gpu_each_end_with_the_weights_of_two_of_the_cpu(tmp_path: Path) -> None:
    recipe = f"""{{name: NAME, runs: {tmp_path}, model: {{preset: nano}}, warmstart: {{steps: 1, episodes: 2}},
        scenarios: {{families: [timespeak]}}, rl: {{steps: 2, groups: 2, rollouts: 2, checkpoint_every: 2}},
        eval: {{scenarios: 1, during: 1}}}}"""
    ended = {}
    for name, launcher, module in (
        ("cpu", "cpu", ["rl.train"]),
        ("cuda", "gpus", ["tests.support.pretend.run", "rl.train"]),
    ):
        (tmp_path / f"{name}.yaml").write_text(recipe.replace("NAME", name))
        arguments = ["-m", *module, "--config", str(tmp_path / f"{name}.yaml"), "--placement.device", name]
        done = start(launcher, arguments, {"METRONOME_BACKEND": ""})
        assert done.returncode == 0, done.stderr[-3000:]
        ended[name] = json.loads((tmp_path / name / "summary.json").read_text())
        contract = json.loads((tmp_path / name / "environment.json").read_text())["contract"]
        assert contract.get("place") == (None if name == "cpu" else "pretend"), "the control: it ran there"
    times = {"wall_s"}
    assert all(ended["cpu"][key] == ended["cuda"][key] for key in ended["cpu"].keys() - times)
    assert ended["cpu"]["processes"] == 2 and ended["cpu"]["mismatch/num_tokens"]


def test_deepspeed_compiles_nothing_and_steps_as_adamw_does(tmp_path: Path) -> None:
    """With compilers on the path that only leave a trace of having been called."""
    for name in ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ninja"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    done = launch(
        tmp_path,
        """
import os, torch
from model.program.startup import import_deepspeed

CONFIG = {
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "gradient_clipping": 0.0,
    "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
}

def main():
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    twin.load_state_dict(model.state_dict())
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=CONFIG)[0]
    plain = torch.optim.AdamW(twin.parameters())
    for _ in range(3):
        gradients = [torch.randn(p.shape) for p in model.parameters()]
        engine.backward(torch.stack([(p * g).sum() for p, g in zip(model.parameters(), gradients)]).sum())
        engine.step()
        for p, g in zip(twin.parameters(), gradients):
            p.grad = g
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    with open(os.environ["MARK"] + os.environ["RANK"], "x"):
        pass
    torch.distributed.destroy_process_group()
""",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        MARK=str(tmp_path / "equal"),
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.glob("equal*")) == ["equal0", "equal1"]
    assert not (tmp_path / "called").exists() and not (tmp_path / "extensions").exists()

"""Two processes started as the README starts them: DeepSpeed compiles nothing, and an error is told once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def launch(folder: Path, body: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``main()`` of a command module holding ``body`` in launched processes."""
    (folder / "some_command.py").write_text(body)
    (folder / "start.py").write_text("from model.program.startup import run_command\nrun_command('some_command')\n")
    config = str(ROOT / "configs/accelerate/cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
    return subprocess.run(
        [*command, "--num_processes", str(processes), "-m", "start"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "METRONOME_BACKEND": "reference"} | environment,
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


def test_ranks_tensors_are_added_in_rank_order(tmp_path: Path) -> None:
    """Three ranks: the order of two cannot be told from a sum."""
    done = launch(
        tmp_path,
        """
import torch
import torch.distributed as dist
from model.program import ranks

def main():
    ranks.join()
    mine = torch.randn(1003, generator=torch.Generator().manual_seed(ranks.rank()))
    first, second, third = ranks.gather(mine)
    found = ranks.sum_in_order(mine)
    assert torch.equal(found, first + second + third)
    assert not torch.equal(found, third + second + first)
    assert torch.equal(mine, (first, second, third)[ranks.rank()]), "the rank's own tensor stays as it was"
    ranks.leave()
""",
        processes=3,
    )
    assert done.returncode == 0, done.stderr


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

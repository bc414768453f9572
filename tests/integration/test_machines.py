"""Several machines: one launcher for each, here both on this one, end with the weights of a single launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_train import ROOT, launch, summary


def machine(tmp_path: Path, rank: int, port: int) -> subprocess.Popen[str]:
    """Starts what the README has a user start on the machine of that rank; the recipe is that of `launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate/machines.yaml", "--num_processes", "2"]
    command += ["--machine_rank", str(rank), "--main_process_port", str(port), "-m", "rl.train"]
    command += ["--config", str(tmp_path / "small.yaml"), "--runs", str(tmp_path / "runs"), "--name", "machines"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_machines_end_with_the_weights_of_one(tmp_path: Path) -> None:
    one = launch(tmp_path, "--name", "one")
    assert one.returncode == 0, one.stderr[-3000:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [machine(tmp_path, rank, port) for rank in (0, 1)]
    for process in both:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
    assert summary(tmp_path, "machines")["weights_digest"] == summary(tmp_path, "one")["weights_digest"]

